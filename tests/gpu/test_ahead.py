"""Replays that run ahead of `generate` on a stream of their own show in time alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import hfsparse
from hfsparse.models.names import text_decoder
from hfsparse.runtime.graphs.recording import Graph
from tests import hybrids
from tests.gpu.common import DEVICE
from tests.patcher.families import choosing, fresh, hosted, left_padded, mixed, packing, tokens
from tests.patcher.runs import forward, generate
from tests.patcher.test_exact import Watching, of_cache

WARPED = dict(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.2)


def two_ways(model, plan, run):
    """What `run(handle)` gives where no step runs ahead, and where they do."""
    for never in ("this test wants none", None):
        with hfsparse.patch(model, plan(model)) as handle:
            ahead = text_decoder(model)._hfsparse.ahead
            ahead.never = never
            yield run(handle)
            assert never or ahead.why is None


def same(want, got) -> None:
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("aside", [False, True], ids=["on the stream", "on another"])
@pytest.mark.parametrize("chosen", [{}, WARPED], ids=["greedy", "warped"])
@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)])
@pytest.mark.parametrize("plan", [mixed, choosing, packing])
def test_nothing_shows(plan, pads, chosen, aside):
    model, (ids, mask) = fresh("qwen2").to(DEVICE), (t.to(DEVICE) for t in left_padded(250, pads))

    def run(handle):
        stream = torch.cuda.stream(torch.cuda.Stream()) if aside else nullcontext()
        with stream:
            out = generate(model, ids, mask, new=60, **chosen)
            logits, stats = torch.stack(out.logits), handle.stats()
        shares = [layer.decode_share for layer in stats.layers], stats.kv_bytes
        return out.sequences.tolist(), logits, shares, torch.cuda.get_rng_state()

    same(*two_ways(model, plan, run))


def rings_and_states():
    model = hybrids.hybrid("qwen3_5") if hybrids.known("qwen3_5") else hybrids.hybrid("lfm2")
    return model, hybrids.rings_and_pages


@pytest.mark.parametrize("made", [lambda: (fresh("qwen2"), choosing), rings_and_states])
def test_what_ends_early_leaves_nothing_behind(made):
    model, plan = made()
    model.to(DEVICE)
    ids, more = tokens(1, 250).to(DEVICE), tokens(1, 20, seed=1).to(DEVICE)
    with hfsparse.patch(model, plan(model)):
        last = int(generate(model, ids, new=13).sequences[0, -1])

    def run(handle):
        streamer = Watching()
        out = generate(model, ids, new=40, eos_token_id=last, streamer=streamer)
        cache, shares = of_cache(out), handle.stats().decode_share
        step = forward(model, ids[:, :1], cache=cache).logits
        turn = torch.cat([out.sequences, ids[:, :1], more], 1)
        turn = generate(model, turn, cache=cache, new=30)
        return streamer.said, shares, step, turn.sequences.tolist(), torch.stack(turn.logits)

    same(*two_ways(model, plan, run))


@pytest.mark.parametrize("chosen", [{}, WARPED], ids=["greedy", "warped"])
@pytest.mark.parametrize(
    ("plan", "fuse"),
    [(mixed, False), (mixed, True), (choosing, False), (packing, False), (hosted, False)],
)
def test_rows_that_have_ended_are_empty(plan, fuse, chosen, monkeypatch):
    """Where tokens alone come back; with logits all rows read on."""
    model, (ids, mask) = fresh("qwen2").to(DEVICE), (t.to(DEVICE) for t in left_padded(250))
    launch, lengths, found = Graph.launch, [], []

    def watched(graph):
        lengths.append(graph.length.clone())
        launch(graph)

    monkeypatch.setattr(Graph, "launch", watched)
    given = dict(new=60, pad_token_id=0, **chosen)
    with hfsparse.patch(model, plan(model), fuse=fuse):
        made = generate(model, ids, mask, eos_token_id=None, **given).sequences[:, 250:]
        given["eos_token_id"] = [int(made[0, 5]), int(made[1, 17])]
        for shown in (True, False):
            lengths.clear()
            more = {} if shown else dict(return_dict_in_generate=False, output_logits=False)
            out = generate(model, ids, mask, **given, **more)
            empty = int((torch.stack(lengths) == 0).sum())
            found.append(((out.sequences if shown else out).tolist(), empty))
    (want, none), (got, some) = found
    assert got == want
    assert none == 0 < some
