"""A hybrid's decode steps as CUDA graphs: linear layers' states are carried on as eagerly."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import DynamicCache

import hfsparse
from hfsparse.runtime.graphs.states import States
from tests import hybrids
from tests.gpu.common import DEVICE
from tests.patcher.families import full, left_padded
from tests.patcher.runs import CACHE, continue_with, forward, generate

INSIDE = [name for name in hybrids.HYBRIDS if name != "recurrent_gemma"]
BY_HAND = [name for name in INSIDE if "moe" not in name]  # outside of generate experts may wait
EAGER = "this test wants it eager"
PLANS = [full, hybrids.rings_and_pages]


def build(family: str, dtype=torch.float32):
    if not hybrids.known(family):
        pytest.skip("this transformers doesn't have it, or keeps its states elsewhere")
    return hybrids.hybrid(family).to(DEVICE, dtype)


def inputs(length: int, pads=(0,), seed: int = 0):
    return (t.to(DEVICE) for t in left_padded(length, pads, seed))


def both(model, plan, run, fuse: bool = False):
    """What `run()` gives with eager steps and with replayed ones, and why the last was no graph."""
    found = []
    for never in (EAGER, None):
        with hfsparse.patch(model, plan(model), fuse=fuse):
            graphs = model.get_decoder()._hfsparse.graphs
            graphs.never = never
            found.append(run())
            why, fused = graphs.why, graphs.fuse
    assert why is not None or fused == fuse, graphs.loose
    return *found, why


def answer(model, ids, mask, new: int = 40, **more):
    """Tokens, logits and the states that are left."""
    cache = DynamicCache()
    out = generate(model, ids, mask, cache=cache, new=new, **more)
    return out.sequences.tolist(), torch.stack(out.logits, 1), States(cache).copies()


def alike(got, want) -> bool:
    """Equal bits, the states' too."""
    same = all(map(torch.equal, got[2], want[2]))
    return got[0] == want[0] and torch.equal(got[1], want[1]) and same


@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", INSIDE)
def test_a_replay_is_the_eager_step_bit_for_bit(family, plan, pads):
    model, (ids, mask) = build(family), inputs(250, pads)
    want, got, why = both(model, plan, lambda: answer(model, ids, mask))
    assert why is None
    assert alike(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", INSIDE)
def test_in_half_precision_too(family, dtype):
    model, (ids, mask) = build(family, dtype), inputs(200, (0, 9))
    want, got, why = both(model, full, lambda: answer(model, ids, mask))
    assert why is None
    assert alike(got, want)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", INSIDE)
def test_fused_steps_say_nearly_the_same(family, plan):
    """In more caches than torch.compile would compile anew for."""
    model, found = build(family), []

    def run():
        for seed in range(10):
            ids, mask = inputs(150, (0, 9), seed)
            found.append(answer(model, ids, mask, new=16))
        return found[-10:]

    want, got, why = both(model, plan, run, fuse=True)
    assert why is None
    for a, b in zip(got, want, strict=True):
        assert a[0] == b[0]
        assert (a[1] - b[1]).abs().max() < 1e-3


@pytest.mark.parametrize("family", INSIDE)
def test_beams_go_on_working(family):
    model, (ids, mask) = build(family), inputs(100)

    def run():
        return generate(model, ids, mask, new=20, num_beams=3).sequences.tolist()

    want, got, _ = both(model, hybrids.rings_and_pages, run)
    assert got == want


@pytest.mark.parametrize("family", ["lfm2", "lfm3"])
def test_lookup_decoding_goes_on_working(family):
    """What takes tokens back needs states that are no recurrence: conv alone."""
    model, (ids, mask) = build(family), inputs(60)
    ids, mask = ids.repeat(1, 3), mask.repeat(1, 3)

    def run():
        return generate(model, ids, mask, new=30, prompt_lookup_num_tokens=3).sequences.tolist()

    want, got, _ = both(model, full, run)
    assert got == want == generate(model, ids, mask, new=30).sequences.tolist()


@pytest.mark.parametrize("family", INSIDE)
def test_turns_over_one_cache_that_grows(family):
    model = build(family)

    def talk():
        cache, answers = DynamicCache(), []
        ids, mask = inputs(120)
        for at, length in enumerate([30, 100, 3, 400, 1]):
            out = generate(model, ids, mask, cache=cache, new=20)
            answers.append(out.sequences[0, ids.shape[1] :].tolist())
            more = left_padded(length, (0,), seed=at + 1)[0].to(DEVICE)
            ids = torch.cat([out.sequences, more], 1)
            mask = continue_with(ids[:, -1:], mask, 20 + length)
        return answers

    want, got, why = both(model, hybrids.rings_and_pages, talk)
    assert why is None
    assert got == want


@torch.no_grad()
@pytest.mark.parametrize("family", BY_HAND)
def test_two_live_caches_in_turn(family):
    model = build(family)
    prompts = [left_padded(n, (0,), seed=n)[0].to(DEVICE) for n in (90, 200)]

    def answers():
        caches, seen = [DynamicCache(), DynamicCache()], []
        last = [model(p, **{CACHE: c}).logits[:, -1:] for p, c in zip(prompts, caches, strict=True)]
        for _ in range(25):
            for i in (0, 1):  # positions are given: Bamba numbers each call from 0 without
                at = torch.tensor([[caches[i].get_seq_length()]], device=DEVICE)
                given = {CACHE: caches[i], "position_ids": at}
                last[i] = model(last[i].argmax(-1), **given).logits
                seen.append(last[i])
        return torch.cat(seen), States(caches[0]).copies()

    want, got, why = both(model, hybrids.rings_and_pages, answers)
    assert why is None
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))


@pytest.mark.parametrize("family", ["qwen3_5", "granite", "lfm2"])
def test_states_that_are_reordered_are_seen(family):
    """A cache whose rows change places between two tokens."""
    model, (ids, mask) = build(family), inputs(80, (0, 6))

    def run():
        cache, seen, covered = DynamicCache(), [], mask
        forward(model, ids, mask, cache)
        for step in range(14):
            if step == 7:
                cache.reorder_cache(torch.tensor([1, 1], device=DEVICE))
                covered = covered[[1, 1]]
            covered = continue_with(ids, covered, 1)
            seen.append(forward(model, ids[:, step : step + 1], covered, cache).logits)
        return torch.cat(seen, 1)

    want, got, why = both(model, full, run)
    assert why is None
    assert torch.equal(got, want)


def test_states_outside_of_the_cache_are_not_recorded():
    model, (ids, mask) = build("recurrent_gemma"), inputs(40)
    want, got, why = both(model, full, lambda: answer(model, ids, mask, new=12))
    assert why == "its linear layers keep their states outside of the cache"
    assert got[0] == want[0]


@pytest.mark.parametrize("fuse", [False, True])
def test_graphs_come_and_go_and_leave_no_memory_reserved(fuse):
    model, (ids, mask), held = build("qwen3_5"), inputs(64), []
    with hfsparse.patch(model, full(model), fuse=fuse):
        for _ in range(40):
            answer(model, ids, mask, new=8)
            assert model.get_decoder()._hfsparse.graphs.why is None
            gc.collect()
            held.append(torch.cuda.memory_reserved())
    assert max(held) <= held[0] + (4 << 20)
