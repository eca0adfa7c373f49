"""Multi-head latent attention: a patched model is the dense one under the plan's mask."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import StaticCache

import hfsparse
from hfsparse import Plan
from hfsparse.errors import CacheError, PatchError, PlanError
from hfsparse.plan import Layer, ModelId
from hfsparse.runtime.cache.ring import SLACK
from hfsparse.runtime.latent import Latents, matrix_of, why_not
from tests import latents
from tests.latents import fresh, tiny
from tests.patcher.families import (
    STREAM,
    full,
    growing,
    left_padded,
    mixed,
    plan_of,
    streaming,
    tokens,
)
from tests.patcher.runs import both, close, continue_with, far, forward, generate, same_generation

LENGTH = 260
PLANS = {plan.__name__: plan for plan in (full, streaming, growing, mixed)}
pytestmark = pytest.mark.skipif(
    not latents.exists("deepseek_v3"), reason="this transformers caches expanded keys"
)
every_plan = pytest.mark.parametrize("plan", PLANS)
every_family = pytest.mark.parametrize("family", latents.FAMILIES)


def model_of(family: str):
    if not latents.exists(family):
        pytest.skip(f"this transformers has no {family}, or caches its expanded keys")
    return tiny(family)


@every_family
def test_every_family_equals_the_oracle_and_undo_leaves_nothing(family):
    """Patterns by q head, rings where all stream, pages of latents chosen for all heads."""
    model, ids = model_of(family), tokens(1, LENGTH)
    before = forward(model, ids).logits
    got, want, stats = both(model, mixed(model), lambda m, cache: generate(m, ids, new=3, **cache))
    same_generation(got, want)
    assert stats.pair_density < 0.8
    assert stats.decode_share < 0.7
    with hfsparse.patch(model) as handle:
        close(forward(model, ids).logits, before)
        assert handle.stats().pair_density == 1
    assert torch.equal(forward(model, ids).logits, before)


def test_the_full_plan_generates_the_stock_models_tokens():
    model, (ids, mask) = tiny(), left_padded(100)
    want = generate(model, ids, mask)
    with hfsparse.patch(model) as handle:
        same_generation(generate(model, ids, mask), want)
        assert handle.stats().decode_share == 1


@every_plan
def test_a_padded_prompt_equals_the_oracle(plan):
    model, (ids, mask) = tiny(), left_padded(LENGTH)
    dense = forward(model, ids, mask).logits
    got, want, stats = both(
        model, PLANS[plan](model), lambda m, cache: forward(m, ids, mask, **cache).logits
    )
    close(got, want, mask)
    if plan == "full":
        close(got, dense, mask)
    else:
        far(got, dense, mask)
        assert stats.pair_density < 0.95


@every_plan
def test_generation_in_chunks_equals_the_oracle(plan):
    model, (ids, mask) = tiny(), left_padded(LENGTH)
    got, want, _ = both(
        model,
        PLANS[plan](model),
        lambda m, cache: generate(m, ids, mask, new=3, prefill_chunk_size=65, **cache),
    )
    same_generation(got, want)


@every_plan
@pytest.mark.parametrize("new", [9, 40], ids=["decode", "chunk"])
def test_a_second_turn_equals_the_oracle(plan, new):
    model, (ids, mask), more = tiny(), left_padded(LENGTH), tokens(3, new, seed=1)

    def turns(m, cache):
        first = forward(m, ids, mask, **cache)
        longer = continue_with(ids, mask, new)
        return forward(m, more, longer, cache=first.past_key_values).logits

    got, want, _ = both(model, PLANS[plan](model), turns)
    close(got, want)


@pytest.mark.parametrize("plan", ["growing"])
def test_beams_equal_the_oracle(plan):
    model, (ids, mask) = tiny(), left_padded(130, (0, 7))
    got, want, _ = both(
        model,
        PLANS[plan](model),
        lambda m, cache: generate(m, ids, mask, new=6, num_beams=3, **cache),
    )
    assert got.sequences.tolist() == want.sequences.tolist()
    assert len(set(got.beam_indices.flatten().tolist())) > 2
    close(torch.stack(got.logits, 1), torch.stack(want.logits, 1))


def test_thresholds_that_rows_cross_equal_the_oracle():
    model, (ids, mask) = tiny(), left_padded(LENGTH)
    plan = mixed(model, below=(250, 262, 256))
    got, want, _ = both(model, plan, lambda m, cache: generate(m, ids, mask, **cache))
    same_generation(got, want)


def test_prompt_lookup_takes_tokens_back():
    model, ids = tiny(), tokens(1, 20).repeat(1, 4)
    with hfsparse.patch(model, streaming(model)):
        want = generate(model, ids, new=40, eos_token_id=1)
        got = generate(model, ids, new=40, eos_token_id=1, prompt_lookup_num_tokens=5)
        cache = forward(model, tokens(1, 100)).past_key_values
        with pytest.raises(CacheError, match=f"a ring keeps {SLACK} tokens"):
            cache.crop(-60)
    assert got.sequences[:, : want.sequences.shape[1]].tolist() == want.sequences.tolist()


def test_static_caches_hold_our_layers():
    model, (ids, mask) = tiny(), left_padded(100)
    with hfsparse.patch(model, streaming(model)):
        want = generate(model, ids, mask)
        got = generate(model, ids, mask, cache_implementation="static")
        assert isinstance(got.past_key_values, StaticCache)
    same_generation(got, want)


def test_a_copied_cache_goes_on_alike():
    model, ids, more = tiny(), tokens(2, 100), tokens(2, 3, seed=1)
    with hfsparse.patch(model, mixed(model)):
        cache = forward(model, ids).past_key_values
        copied = copy.deepcopy(cache)
        assert torch.equal(
            forward(model, more, cache=cache).logits, forward(model, more, cache=copied).logits
        )


def test_selectors_that_read_every_page_equal_dense():
    """One chooses anew, one reads its choice again for 4 tokens, one what the last layer chose."""
    model, (ids, mask), whole = tiny(), left_padded(LENGTH), dict(share=1.0)
    words = ["all"], ["young"], ["again"]
    plan = plan_of(
        model,
        lambda index, windowed: (["full"] * 4, ["full"], words[index]),
        all=("quest", whole),
        young=("quest", dict(whole, refresh=4)),
        again=("reuse", {}),
    )
    want = generate(model, ids, mask)
    with hfsparse.patch(model, plan) as handle:
        same_generation(generate(model, ids, mask), want)
        assert handle.stats().decode_share == 1


# -- what is held ---------------------------------------------------------------------------------


def test_a_full_cache_holds_each_latent_once_and_reads_as_the_stock_one():
    model, ids = tiny(), tokens(2, 128)
    stock = forward(model, ids).past_key_values
    bytes_ = sum(t.nbytes for layer in stock.layers for t in (layer.keys, layer.values))
    with hfsparse.patch(model) as handle:
        ours = forward(model, ids).past_key_values
        stats = handle.stats()
        assert stats.kv_bytes == bytes_ == sum(layer.dense_bytes() for layer in ours.layers)
        assert stats.cache_share == 1
        for layer, other in zip(ours.layers, stock.layers, strict=True):
            store = layer.stores[0]
            assert store.v.data_ptr() == store.k.data_ptr()
            assert torch.allclose(layer.keys, other.keys, atol=1e-5)
            assert torch.allclose(layer.values, other.values, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_the_cache_takes_what_was_predicted(plan):
    from hfsparse.patcher import figures, memory

    model, ids = tiny(), tokens(2, 200)
    plan = PLANS[plan](model)
    with hfsparse.patch(model, plan) as handle:
        cache = forward(model, ids).past_key_values
        cache_share = handle.stats().cache_share
        held = [sum(layer.bytes() for layer in cache.layers)]
        held.append(sum(layer.dense_bytes() for layer in cache.layers))
    assert memory.cache_bytes(model.config, plan, 200, 2, itemsize=4)[1] == held[1]
    assert figures.predict(model.config, plan, 200).cache_share == pytest.approx(cache_share, 0.2)


def test_a_layer_of_rings_holds_their_latents_alone():
    model, ids = tiny(), tokens(1, 1000)
    with hfsparse.patch(model, streaming(model)) as handle:
        forward(model, ids)
        held = [sum(layer.kv_bytes) for layer in handle.stats().layers]
    assert held[0] == held[2] == (2 + 5 + SLACK) * 32 * 4
    assert held[1] == 1024 * 32 * 4


# -- plans ----------------------------------------------------------------------------------------


def test_a_plan_has_a_pattern_a_q_head_and_one_word_of_cache_a_layer():
    this = ModelId.of(tiny())
    assert (this.q_heads, this.kv_heads, this.head_dim) == (4, 1, 32)
    plan = Plan.full(this)
    words = Layer(("full",) * 4, ("full",) * 4, ("full",) * 4)
    wrong = Plan(this, {}, (words, *plan.layers[1:]))
    with pytest.raises(PlanError, match=r"cache has 4 words: give 1, .*the model line's kv_heads"):
        wrong.validate()


def test_a_ring_needs_every_q_head_of_its_layer_to_stream():
    def one_reads_all(index, windowed):
        return ["s", "s", "full", "s"], ["s"], ["ring"]

    with pytest.raises(PlanError, match=r"kv head 0 caches only s, its q heads 2 \(full\) read"):
        plan_of(tiny(), one_reads_all, s=STREAM)


@pytest.mark.parametrize(
    "name", ["kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"]
)
def test_the_fingerprint_knows_what_latents_are_made_into(name):
    config = copy.deepcopy(tiny().config)
    before = ModelId.of(config)
    setattr(config, name, getattr(config, name) + 4)
    assert ModelId.of(config).fingerprint != before.fingerprint


# -- projections that are more than a weight ------------------------------------------------------


class Scaled(nn.Linear):
    """A projection whose weight is not what it multiplies by."""

    def forward(self, x):
        return super().forward(x) * 0.5


@pytest.mark.parametrize("how", ["class", "hook", "forward"])
def test_a_projection_that_is_more_than_its_weight_is_asked(how):
    model, (ids, mask) = fresh(), left_padded(100)
    for layer in model.model.layers:
        projection = layer.self_attn.kv_b_proj
        if how == "class":
            projection.__class__ = Scaled
        elif how == "hook":
            projection.register_forward_hook(lambda module, given, out: out * 0.5)
        else:
            own = projection.forward
            projection.forward = lambda x, own=own: own(x) * 0.5
    got, want = [], generate(model, ids, mask)
    with hfsparse.patch(model):
        got = generate(model, ids, mask)
    same_generation(got, want)


def test_a_plain_projections_weight_is_read_where_it_lies():
    projection, like = nn.Linear(5, 12, bias=False), torch.zeros(1)
    assert matrix_of(projection, 5, like).data_ptr() == projection.weight.data_ptr()
    with torch.no_grad():
        asked = matrix_of(nn.Sequential(projection), 5, like)
    assert torch.equal(asked, projection.weight)


def test_absorbed_products_are_those_of_expanded_keys():
    module, made = tiny().model.layers[1].self_attn, torch.Generator().manual_seed(1)
    q, latent, rotated = (
        torch.randn(2, heads, n, dim, generator=made)
        for heads, n, dim in ((4, 3, 24), (1, 7, 24), (1, 7, 8))
    )
    held = Latents(module, latent, rotated)
    with torch.no_grad():
        k, v = module.expand_kv(latent, rotated)
        for ours, own in zip(held.expand(held.kept[0]), (k, v), strict=True):
            assert torch.allclose(ours, own, atol=1e-6)
        logits = held.absorb(q) @ held.kept[0].mT
        assert torch.allclose(logits, q @ k.mT, atol=1e-4)
        weights = logits.softmax(-1)
        assert torch.allclose(held.values(weights @ held.kept[1]), weights @ v, atol=1e-5)


def test_under_autocast_latents_are_cached_in_its_type():
    model, ids = fresh(), tokens(2, 100)
    with torch.autocast("cpu", torch.bfloat16):
        want = generate(model, ids, new=4)
        with hfsparse.patch(model):
            got = generate(model, ids, new=4, prefill_chunk_size=65)
    assert {layer.stores[0].k.dtype for layer in got.past_key_values.layers} == {torch.bfloat16}
    for ours, own in zip(got.logits, want.logits, strict=True):
        assert (ours - own).norm() < 0.02 * own.norm()


# -- what is refused ------------------------------------------------------------------------------


def test_other_ways_to_make_keys_of_latents_are_refused():
    model = fresh()
    module = model.model.layers[0].self_attn

    class Other(type(module)):
        def expand_kv(self, latent, rotated):
            k, v = super().expand_kv(latent, rotated)
            return k, v.tanh()

    class Normed(type(module)):
        def expand_kv(self, latent, rotated):
            return super().expand_kv(self.kv_a_layernorm(latent), rotated)

    assert why_not(module) is None
    for kind in (Other, Normed):
        module.__class__ = kind
        with pytest.raises(PatchError, match="in a way that hfsparse doesn't know"):
            hfsparse.patch(model)
    module.__class__ = kind.__base__
    module.kv_b_proj = nn.Linear(24, 112)
    with pytest.raises(PatchError, match="adds a bias"):
        hfsparse.patch(model)


def test_a_quantised_projection_has_no_bias():
    """`bias` of torch's own quantised layers is a method."""
    from torch.ao.quantization import quantize_dynamic

    model, ids = quantize_dynamic(fresh(), {nn.Linear}, dtype=torch.qint8), tokens(1, 70)
    stock = forward(model, ids).logits
    with hfsparse.patch(model):
        close(forward(model, ids).logits, stock)


def test_models_with_an_indexer_stay_refused():
    if not hasattr(transformers, "DeepseekV32ForCausalLM"):
        pytest.skip("this transformers has no DeepSeek V3.2")
    from tests.support.models import build_refused

    with pytest.raises(PatchError, match="an indexer of its own"):
        hfsparse.patch(build_refused("deepseek_v32"))


def test_steps_of_latents_are_not_fused_and_it_is_said():
    with hfsparse.patch(fresh(), fuse=True) as handle:
        assert "latents" in handle._patch.graphs.loose


def test_explain_asks_for_kernels_of_both_widths():
    """Of expanded keys in prompts, of latents in steps."""
    model = tiny()
    with hfsparse.patch(model, mixed(model)) as handle:
        said = handle.explain()
    assert "prompt 1 full" in said
    assert "new tokens 1 selected by" in said
    assert "new tokens 1 ring by" in said
