"""stats() counts what was really computed and held; explain() says what runs and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import isnan

import pytest
import torch
import transformers

import hfsparse
from hfsparse import kernels
from hfsparse.errors import PatchError
from hfsparse.kernels import table
from hfsparse.patterns import PATTERNS
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.runtime.call import use_tables
from tests.patcher.families import (
    FAMILIES,
    SIZES,
    choosing,
    full,
    growing,
    left_padded,
    mixed,
    own_window,
    streaming,
    tiny,
    tokens,
)
from tests.patcher.oracle import oracle, whole_cache
from tests.patcher.runs import continue_with, forward, generate


def straddled(model):
    return mixed(model, below=(250, 262, 256))


PLANS = {"growing": growing, "mixed": mixed, "straddled": straddled}


def talk(model, cache):
    """A left-padded prompt, six greedy steps, then a chunk and a step."""
    ids, mask = left_padded(260)
    out = generate(model, ids, mask, new=6, **cache)
    mask = continue_with(ids, mask, 5 + 40)
    cache = out.past_key_values
    forward(model, tokens(3, 40), mask, cache=cache)
    forward(model, tokens(3, 1), continue_with(ids, mask, 1), cache=cache)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
def test_densities_equal_the_oracles_masks_exactly(family, plan):
    model = tiny(family)
    plan = PLANS[plan](model)
    with oracle(model, plan) as truth:
        talk(model, whole_cache())
    with hfsparse.patch(model, plan) as handle:
        talk(model, {})
        stats = handle.stats()
    for index, layer in enumerate(stats.layers):
        kept = [truth.pairs[index, h] for h in range(len(layer.pair_density))]
        causal = [truth.causal[index, h] for h in range(len(layer.pair_density))]
        assert layer.pair_density == [a / b for a, b in zip(kept, causal, strict=True)]
        read = [truth.reads[index, g] for g in range(len(layer.decode_share))]
        total = [truth.total[index, g] for g in range(len(layer.decode_share))]
        assert layer.decode_share == [a / b for a, b in zip(read, total, strict=True)]
    assert stats.pair_density == sum(truth.pairs.values()) / sum(truth.causal.values()) < 0.95
    assert stats.decode_share == sum(truth.reads.values()) / sum(truth.total.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_block_density_lies_between_pair_density_and_one(family):
    model = tiny(family)
    with hfsparse.patch(model, mixed(model)) as handle:
        forward(model, tokens(1, 500))
        for layer in handle.stats().layers:
            for pairs, blocks in zip(layer.pair_density, layer.block_density, strict=True):
                assert 0 < pairs <= 1
                assert pairs == 1 or 0.5 * pairs < blocks <= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
def test_kv_bytes_are_the_bytes_of_the_real_tensors(family, plan):
    model = tiny(family)
    with hfsparse.patch(model, PLANS[plan](model)) as handle:
        cache = talk(model, {})
        stats = handle.stats()
    tensors = {
        id(tensor): tensor
        for layer in cache.layers
        for store in layer.stores
        for tensor in (*vars(store).values(), *getattr(store, "index", {}).values())
        if hasattr(tensor, "nbytes")
    }
    assert stats.kv_bytes == sum(t.untyped_storage().nbytes() for t in tensors.values())
    width = 2 * 16 * 4 * 3 * model.config.num_key_value_heads  # keys and values, 3 rows, float32
    columns = [min(306, 40) if windowed else 306 for windowed in own_window(model)]
    assert stats.kv_bytes_dense == width * sum(columns)
    assert stats.cache_share == stats.kv_bytes / stats.kv_bytes_dense


def test_half_the_heads_streaming_hold_little_more_than_half_the_bytes():
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)) as handle:
        forward(model, tokens(1, 960))
        share = handle.stats().cache_share
        rows = [layer.kv_bytes for layer in handle.stats().layers]
    assert 0.5 < share < 0.56
    assert all(max(row) > 15 * min(row) for row in rows)  # rings against full heads


def test_a_reset_forgets_densities():
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)) as handle:
        assert isnan(handle.stats().pair_density)
        assert isnan(handle.stats().cache_share)
        generate(model, tokens(1, 200), new=3)
        long = handle.stats()
        handle.reset_stats()
        assert isnan(handle.stats().pair_density)
        assert isnan(handle.stats().decode_share)
        generate(model, tokens(1, 20), new=3)
        assert handle.stats().pair_density > long.pair_density + 0.1
        assert str(handle.stats()).splitlines()[0].startswith("pair density 0.")
        assert len(str(handle.stats()).splitlines()) == 2 + 3


def test_calls_without_a_cache_count_pairs_and_leave_the_held_bytes():
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)) as handle:
        generate(model, tokens(1, 100), new=2)
        held = handle.stats().kv_bytes
        handle.reset_stats()
        forward(model, tokens(1, 300), use_cache=False)
        stats = handle.stats()
    assert stats.pair_density < 0.6
    assert isnan(stats.decode_share)
    assert stats.kv_bytes == held > 0


def test_a_failed_call_leaves_the_held_bytes():
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)) as handle:
        forward(model, tokens(1, 100))
        held = handle.stats().kv_bytes
        with pytest.raises(IndexError):
            forward(model, tokens(1, 9) + 1000)
        assert handle.stats().kv_bytes == held > 0


def test_explain_names_kernels_reasons_and_windows():
    model = tiny("gemma3")
    with hfsparse.patch(model, mixed(model)) as handle:
        text = handle.explain()
        assert text == hfsparse.explain(model)
    assert mixed(model).hash()[:19] in text
    assert "full heads, prompt: torch sdpa" in text
    assert "patterned heads, prompt: torch flash over lists (not FA4: " in text
    assert "(not torch sdpa: reads every key, not lists of blocks or pages)" in text
    assert "new tokens: torch flash, store by store" in text
    assert "layers [0] keep the model's own sliding window" in text
    plain = "torch flash over lists"
    assert f"layer 0: prompt 2 full by {plain} + 2 patterned by {plain}; new tokens 1 windo" in text
    assert "in full: prefill 0, decode 0, cache 0" in text
    assert f"layer 1: prompt 1 full by torch sdpa + 3 patterned by {plain}; new tokens" in text
    assert "not verified on these weights" in text
    with pytest.raises(PatchError, match="is not patched"):
        hfsparse.explain(model)


def test_explain_prints_what_serves_each_of_the_six():
    model, why = tiny("qwen2"), "(not Triton: needs a CUDA device, not cpu)"
    for plan in (mixed(model), choosing(model)):
        with hfsparse.patch(model, plan) as handle:
            lines = handle.explain().splitlines()
        steps = [line for line in lines if " heads, new tokens: " in line]
        patterned = [line for line in lines if line.startswith("patterned heads, prompt: ")]
        assert all("torch flash, store by store (not Triton: " in line for line in steps)
        assert all("torch flash over lists" in line for line in patterned)
        assert len(patterned) == (plan.patterns.keys() >= {"s"})
        assert steps[0].startswith("full and ring" if patterned else "full heads")
        assert any(line.startswith("selected pages, new tokens: torch flash") for line in lines)
        for name, pattern in plan.patterns.items():
            what = "prompt: blocks" if pattern.kind in PATTERNS else "new tokens: pages"
            by = "an earlier layer" if pattern.kind == "reuse" else f"PyTorch {why}"
            if pattern.kind == "quest":
                counted = f"PyTorch {why} (not PyTorch, by rows: no refresh, top_p or means)"
                by = counted if pattern.budget.counted else f"PyTorch, by rows {why}"
            assert f"{name} ({pattern.kind}), {what} chosen by {by}" in lines
        assert f"new tokens: stored by PyTorch {why}" in lines
        assert f"kept pairs, prompt: counted by PyTorch {why}" in lines
    unused = replace(full(model), patterns=plan.patterns)
    with hfsparse.patch(model, unused) as handle:
        told = handle.explain()
    assert not any(word in told for word in (*plan.patterns, "ring heads", "patterned", "selected"))


@dataclass(frozen=True)
class Mine(BlockTopK):
    """A pattern that no kernel chooses for."""

    kind = "mine"


def test_a_pattern_without_a_fused_chooser_is_chosen_by_pytorch(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(PATTERNS, "mine", Mine)
    model, ids = tiny("llama"), tokens(1, 260)
    plan = mixed(model)
    own = Mine(**asdict(plan.patterns["blocks"]))
    # Of these rows nothing is known yet, nor is what is found of them here known later.
    anew = kernels.Tables(*(tuple(replace(row) for row in rows) for rows in kernels.TABLES))
    with hfsparse.patch(model, replace(plan, patterns={**plan.patterns, "blocks": own})) as handle:
        found = forward(model, ids).logits
        with monkeypatch.context() as patched, use_tables(anew):
            patched.setattr(table, "no_triton", lambda need: None)
            told = handle.explain().splitlines()
    assert "vs (vertical_slash), prompt: blocks chosen by Triton" in told
    assert "blocks (mine), prompt: blocks chosen by PyTorch (not Triton: mine is not fused)" in told
    with hfsparse.patch(model, plan):
        assert torch.equal(found, forward(model, ids).logits)


@pytest.mark.parametrize("loops", [2, 3])
def test_copies_of_a_looped_layer_count_for_it(loops):
    """Dory's middle layers run several times a call, each time with a cache of their own."""
    if not hasattr(transformers, "DoryForCausalLM"):
        pytest.skip("this transformers has no Dory")
    torch.manual_seed(0)
    shape = dict(num_attention_heads=4, num_key_value_heads=2, n_recurrent_loops=loops)
    parts = dict(n_input_layers=1, n_recurrent_layers=1, n_output_layers=1)
    config = transformers.DoryConfig(
        **{**SIZES, **shape, **parts}, layer_types=["full_attention"] * 3
    )
    model = transformers.DoryForCausalLM(config).eval()
    for plan in (full(model), streaming(model)):
        with hfsparse.patch(model, plan) as handle:
            cache = forward(model, tokens(1, 300)).past_key_values
            stats = handle.stats()
        assert len(cache.layers) == 2 + loops
        assert stats.kv_bytes == sum(layer.bytes() for layer in cache.layers)
        assert stats.kv_bytes_dense == sum(layer.dense_bytes() for layer in cache.layers)
        held = [sum(layer.kv_bytes) for layer in stats.layers]
        assert held[1] == sum(cache.layers[i].bytes() for i in (1, *range(3, 2 + loops)))
        assert held[0] == cache.layers[0].bytes()


@pytest.mark.parametrize("inside", ["patch", "prompt", "reset_stats"])
def test_what_was_begun_in_inference_mode_is_counted_on_outside_it(inside):
    model, ids = tiny("llama"), tokens(1, 200)
    with torch.inference_mode(inside == "patch"):
        handle = hfsparse.patch(model, mixed(model))
    with torch.no_grad(), torch.inference_mode(inside == "prompt"):
        model(ids)
    want = handle.stats()
    with torch.inference_mode(inside == "reset_stats"):
        handle.reset_stats()
    generate(model, ids, new=1)
    assert handle.stats().pair_density == want.pair_density
    assert handle.stats().block_density == want.block_density
    handle.undo()
