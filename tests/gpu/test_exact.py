"""Exact mode on a GPU: the dense model's tokens, by drafts and dense steps that are replayed."""

from __future__ import annotations

import pytest
import torch

import hfsparse
from hfsparse.patcher.state import state_of
from tests.gpu.common import DEVICE
from tests.patcher.families import (
    choosing,
    corrected,
    fresh,
    growing,
    left_padded,
    mixed,
    streaming,
)
from tests.patcher.oracle import CACHE
from tests.patcher.runs import generate

SAMPLED = dict(do_sample=True, top_p=0.9, repetition_penalty=1.2)


def inputs(length: int, pads=(0,)):
    return (t.to(DEVICE) for t in left_padded(length, pads))


def said(model, plan, ids, mask, replay: bool = True, **more):
    """Tokens, logits and drafts of one exact generation, and by how many tokens steps were
    replayed: drafts', and those that verify."""
    with hfsparse.patch(model, plan(model), exact=True) as handle:
        state = state_of(model)
        for graphs in state.all_graphs:
            graphs.never = None if replay else "this test wants it eager"
        out = generate(model, ids, mask, **more)
        first = getattr(out, CACHE).layers[0]
        replayed = [
            {Q for Q, steps in graphs.kept.get(first, {}).items() if steps.graph is not None}
            for graphs in (state.exact.graphs, state.graphs)
        ]
        assert not any(graphs.single for graphs in state.all_graphs)
        return out.sequences.tolist(), torch.stack(out.logits, 1), handle.stats().drafts, replayed


@pytest.mark.parametrize("more", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)])
@pytest.mark.parametrize("plan", [streaming, growing, mixed, choosing, corrected])
def test_tokens_are_the_dense_models_and_replays_are_eager_steps(plan, pads, more):
    """Of a seed, too."""
    model, (ids, mask) = fresh("llama").to(DEVICE), inputs(250, pads)
    want = generate(model, ids, mask, new=40, **more)
    got = said(model, plan, ids, mask, new=40, **more)
    eager = said(model, plan, ids, mask, new=40, replay=False, **more)
    assert got[0] == want.sequences.tolist()
    assert (got[1] - torch.stack(want.logits, 1)).abs().max() < 1e-3
    assert torch.equal(got[1], eager[1])
    assert (got[2], eager[3]) == (eager[2], [set(), set()])
    assert got[3][0] == {1}


def test_drafts_that_are_right_are_taken_in_bfloat16_too():
    """A plan that reads all pages drafts what the model says, but for rounding."""
    model, (ids, mask) = fresh("llama").to(DEVICE, torch.bfloat16), inputs(250)

    def whole(model):
        plan = choosing(model)
        plan.patterns["young"] = plan.patterns["top"] = type(plan.patterns["top"])(share=1.0)
        return plan

    *_, drafts, replayed = said(model, whole, ids, mask, new=200, **SAMPLED)
    assert drafts.acceptance > 0.8
    assert replayed[0] == {1}
    assert 8 in replayed[1]


def test_steps_that_verify_are_fused_and_compiled_once():
    model, (ids, mask) = fresh("llama").to(DEVICE), inputs(250)
    want = generate(model, ids, mask, new=40)
    torch.compiler.reset()
    with hfsparse.patch(model, mixed(model), fuse=True, exact=True) as handle:
        out = generate(model, ids, mask, new=40)
        graphs = state_of(model).graphs
        first = getattr(out, CACHE).layers[0]
        assert any(Q > 1 and steps.graph for Q, steps in graphs.kept[first].items())
        assert graphs.fuse
        assert not graphs.unfused
        assert handle.stats().drafts.steps > 2
    assert out.sequences.tolist() == want.sequences.tolist()
    gap = torch.stack(out.logits) - torch.stack(want.logits)
    assert gap.abs().max() < 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3", "qwen3"])
def test_lookup_is_replayed_by_the_number_of_its_tokens(family):
    model, (ids, mask) = fresh(family).to(DEVICE), inputs(250)
    ids, mask = (torch.cat([t, t[:, :60]], 1) for t in (ids, mask))
    found, more = [], dict(new=60, prompt_lookup_num_tokens=5, eos_token_id=3)
    for never in (None, "this test wants it eager"):
        with hfsparse.patch(model, streaming(model) if family != "qwen3" else mixed(model)):
            graphs = state_of(model).graphs
            graphs.never = never
            out = generate(model, ids, mask, **more)
            kept = graphs.kept.get(getattr(out, CACHE).layers[0], {})
            assert never or any(Q > 1 and steps.graph is not None for Q, steps in kept.items())
            found.append((out.sequences.tolist(), torch.stack(out.logits, 1)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_a_cache_goes_on_in_a_second_turn():
    model, (ids, mask) = fresh("llama").to(DEVICE), inputs(200)
    found = []
    for exact in (False, True):
        handle = hfsparse.patch(model, mixed(model), exact=True) if exact else None
        first = generate(model, ids, mask, new=30)
        more = torch.cat([first.sequences, left_padded(40, (0,), seed=1)[0].to(DEVICE)], 1)
        second = generate(model, more, cache=getattr(first, CACHE), new=30)
        found.append(second.sequences.tolist())
        if handle is not None:
            handle.undo()
    assert found[0] == found[1]
