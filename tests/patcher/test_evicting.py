"""Caches that evict, in whole models: what the oracle says, in chunks, batches, beams and turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hfsparse
from hfsparse.errors import CacheError, PlanError
from hfsparse.evictions import EVICTIONS
from hfsparse.models.layers import layer_shapes
from hfsparse.patcher.figures import one_head, predict
from tests import hybrids, latents
from tests.patcher.families import (
    evicting,
    full,
    heads,
    left_padded,
    plan_of,
    snapkv,
    tiny,
    tokens,
)
from tests.patcher.oracle import oracle, whole_cache
from tests.patcher.runs import (
    both,
    close,
    continue_with,
    far,
    forward,
    generate,
    same_generation,
)
from tests.support import models

LENGTH = 60


def talk(m, cache):
    """A left-padded prompt, a chunk of 40, and steps of one token and of three."""
    ids, mask = left_padded(LENGTH)
    out, found = forward(m, ids, mask, **cache), []
    for seed, new in enumerate((40, 1, 3, 1)):
        mask = continue_with(ids, mask, new)
        out = forward(m, tokens(3, new, seed=seed), mask, cache=out.past_key_values)
        found.append(out.logits)
    return found


def build(family: str):
    if family in latents.FAMILIES and latents.exists(family):
        return latents.fresh(family)
    known = models.exists(family) and (family != "lfm2" or hybrids.known(family))
    return models.tiny(family) if known else pytest.skip("not in this version")


@pytest.mark.parametrize("below", [0, 80])
@pytest.mark.parametrize(
    "family", ["gpt_oss", "gemma2", "gemma3n", "gemma4_shared", "deepseek_v3", "lfm2"]
)
def test_other_logits_shared_keys_latents_and_hybrids_equal_the_oracle(family, below):
    """Sink logits, softcaps, layers that read others' keys, one latent for all heads."""
    model = build(family)
    kinds = ("full", "snap", "h2o", "s") if heads(model)[1] > 1 else ("snap", "h2o", "full", "s")
    if any(shape.producer is not None for shape in layer_shapes(model)):
        kinds = "full", "s", "snap", "snap"
    plan = evicting(model, (0, 0, below), kinds=kinds)
    got, want, stats = both(model, plan, talk)
    for ours, truth in zip(got, want, strict=True):
        close(ours, truth)
    assert stats.free.decode_share < 0.9
    with hfsparse.patch(model):
        far(got[-1], talk(model, {})[-1])


def only(model, kind: str, **given):
    """Every head that may evicts, and reads prompts in full."""
    Hq, Hkv = heads(model)

    def layer(index, windowed):
        kept, read = ("full", "full") if windowed else ("it", "kept")
        return ["full"] * Hq, [kept] * Hkv, [read] * Hkv

    return plan_of(model, layer, it=(kind, given))


@pytest.mark.parametrize("kind", EVICTIONS)
@pytest.mark.parametrize("size", [2, LENGTH + 12])
def test_what_is_large_enough_is_dense_and_what_is_not_is_not(kind, size):
    model, (ids, mask) = tiny("llama"), left_padded(LENGTH)
    dense = generate(model, ids, mask)
    with hfsparse.patch(model, only(model, kind, size=size, window=1)) as handle:
        got = generate(model, ids, mask)
        share = handle.stats().decode_share
    if size > LENGTH:
        same_generation(got, dense)
        assert share == 1
    else:
        close(got.logits[0], dense.logits[0])  # a prompt is read before it evicts
        far(torch.stack(got.logits, 1), torch.stack(dense.logits, 1))
        assert share < 0.2


@pytest.mark.parametrize("kinds", [("snap", "h2o", "full", "s"), ("alisa", "adore", "full", "s")])
def test_each_chunk_of_a_prompt_evicts_and_steps_do_where_scores_add_up(kinds):
    model, (ids, mask) = tiny("llama"), left_padded(LENGTH)
    plan = evicting(model, kinds=kinds)
    with oracle(model, plan, prompt=LENGTH):
        want = generate(model, ids, mask, prefill_chunk_size=23, **whole_cache())
    with hfsparse.patch(model, plan) as handle:
        got = generate(model, ids, mask, prefill_chunk_size=23)
        assert "in one call (each chunk evicts keys that the next" in handle.explain()
    same_generation(got, want)
    for ours, truth in zip(*both(model, plan, talk)[:2], strict=True):
        close(ours, truth)


def test_rows_of_a_batch_and_beams_are_alone():
    model, (ids, mask) = tiny("qwen2"), left_padded(LENGTH)
    with hfsparse.patch(model, evicting(model)):
        together = generate(model, ids, mask, num_beams=2).sequences
        for row, pads in enumerate((0, 7, 13)):
            alone = generate(model, ids[row : row + 1, pads:], num_beams=2).sequences
            assert together[row, pads:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("plan", [evicting, snapkv])
def test_drafts_are_refused_and_no_token_is_said(plan):
    model, said = tiny("llama"), []
    hook = model.register_forward_hook(lambda *args: said.append(args))
    with hfsparse.patch(model, plan(model)), pytest.raises(CacheError, match="drafts are taken"):
        generate(model, tokens(1, LENGTH), prompt_lookup_num_tokens=4)
    hook.remove()
    assert not said


@pytest.mark.parametrize(("kind", "back"), [("snapkv", True), ("h2o", False)])
def test_steps_can_be_taken_back_where_they_evict_nothing(kind, back):
    model, ids = tiny("llama"), tokens(1, LENGTH)
    with hfsparse.patch(model, only(model, kind, size=20, window=5)):
        cache = forward(model, ids).past_key_values
        first = forward(model, ids[:, :3], cache=cache).logits
        if back:
            cache.crop(-3)
            assert torch.equal(forward(model, ids[:, :3], cache=cache).logits, first)
        with pytest.raises(CacheError, match=f"at {LENGTH + 3 * (not back)} tokens {kind} chose"):
            cache.crop(-4 if back else -3)
        with pytest.raises(CacheError, match="can't be read or rebuilt"):
            _ = cache.layers[0].keys


@pytest.mark.parametrize("size", [20, 62, 63, 200])
def test_what_is_predicted_is_what_a_step_reads_and_the_cache_holds(size):
    model, ids = tiny("llama"), tokens(1, 63)
    plan = evicting(model, size=size)
    with hfsparse.patch(model, plan) as handle:
        cache = forward(model, ids[:, :-1]).past_key_values
        forward(model, ids[:, -1:], cache=cache)
        found = handle.stats()
    told = predict(model.config, plan, 63)
    for one, other in zip(found.layers, told.layers, strict=True):
        assert one.reads == other.reads
        assert one.cache == other.cache
        assert one.evicting == other.evicting
    assert found.kv_bytes == sum(layer.bytes() for layer in cache.layers)
    assert "3 kv heads evict: what they keep was chosen before any later question" in str(found)
    assert one_head(63, plan.patterns["snap"])[1] == min(size + 1, 63) / 63


def test_steps_of_a_layer_whose_keys_others_read_evict_none():
    model = build("gemma4_shared")
    with pytest.raises(PlanError, match="whose steps evict some by it"):
        only(model, "h2o").check(model)


def test_words_that_do_not_go_together_are_refused():
    model = tiny("llama")
    plan = only(model, "snapkv")
    whole, layer = full(model).layers[0], plan.layers[0]
    for cache, decode in ((whole.cache, layer.decode), (layer.cache, whole.decode)):
        wrong = replace(plan, layers=(replace(layer, cache=cache, decode=decode),) * 3)
        with pytest.raises(PlanError, match="kept where it evicts"):
            wrong.validate()
    with pytest.raises(PlanError, match="prefill can't be it, a snapkv"):
        replace(plan, layers=(replace(layer, prefill=("it",) * 4),) * 3).validate()
