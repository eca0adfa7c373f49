"""What a call's layers share is made once, and dies with the call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hfsparse
from hfsparse.lists import Band, BlockLists, Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.ring import Ring
from hfsparse.runtime.call import Call, call_of, enter, leave, running
from hfsparse.runtime.graphs import parts
from hfsparse.runtime.graphs.obstacles import Through
from hfsparse.runtime.layer_plan import layer_plan_of, layer_plans_of, observed
from tests.patcher.families import (
    BLOCKS,
    STREAM,
    VS,
    fresh,
    left_padded,
    mixed,
    plan_of,
    streaming,
    tiny,
    tokens,
)
from tests.patcher.oracle import CACHE
from tests.patcher.runs import forward, generate


def counted(monkeypatch, owner, name: str) -> list:
    """A list that grows with each call of a function."""
    calls, real = [], getattr(owner, name)

    def count(*args, **more):
        calls.append((args, more))
        return real(*args, **more)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_lists_of_a_band_belong_to_one_grid_of_one_call():
    grid, call = Grid.causal(2, 100), Call()
    made = call.once(BlockLists.of, grid, 4, None, Band(2, 10))
    assert call.once(BlockLists.of, grid, 4, None, Band(2, 10)) is made
    other = replace(grid, window=30)
    assert call.once(BlockLists.of, other, 4, None, Band(2, 10)).grid is other
    assert Call().once(BlockLists.of, grid, 4, None, Band(2, 10)) is not made


def test_layers_share_a_grid_lists_and_lengths(monkeypatch):
    """All layers stream the same heads: one grid, one list of each kind, one count of tokens."""
    model = tiny("llama")
    words = ["s", "s", "full", "full"], ["s", "full"], ["ring", "full"]
    with hfsparse.patch(model, plan_of(model, lambda *at: words, s=STREAM)):
        lists, grids = (counted(monkeypatch, at, "of") for at in (BlockLists, Lengths))
        first = forward(model, *left_padded(100))
        assert (len(lists), len(grids)) == (1, 1)
        lists.clear(), grids.clear()
        _, mask = left_padded(120)
        forward(model, tokens(3, 20), mask, cache=first.past_key_values)
        rings = sum(isinstance(s, Ring) for x in first.past_key_values.layers for s in x.stores)
        assert (len(lists), len(grids)) == (rings + 1, 1)  # of each ring, and one of full heads


def test_layers_share_the_blocks_that_positions_alone_choose(monkeypatch):
    model = tiny("llama")
    words = ["p", "p", "full", "p"], ["full"] * 2, ["full"] * 2
    strided = ("strided", dict(stride=2, recent=1))
    with hfsparse.patch(model, plan_of(model, lambda *at: words, p=strided)):
        lists = counted(monkeypatch, BlockLists, "of")
        forward(model, *left_padded(100))
        assert len(lists) == 1


def test_a_layer_that_runs_by_itself_has_a_call_of_its_own():
    enter("a")
    try:
        assert call_of("a") is running()
        assert call_of("b") is not running()
        assert not call_of("b").updated
    finally:
        leave("a")
    assert running() is None


def test_an_observer_sees_each_layer_and_is_gone_afterwards():
    model, seen = tiny("llama"), []

    def observe(module, q, k, v, logits):
        seen.append(layer_plan_of(module).index)

    with hfsparse.patch(model, streaming(model)):
        with observed(model, observe):
            forward(model, tokens(1, 20))
        assert seen == [0, 1, 2]
        with pytest.raises(ZeroDivisionError), observed(model, lambda *args: 1 / 0):
            forward(model, tokens(1, 20))
        forward(model, tokens(1, 20))
        assert seen == [0, 1, 2]
        assert [plan.index for plan in layer_plans_of(model)] == [0, 1, 2]
    assert layer_plans_of(model) == []


@pytest.mark.parametrize("kind", [VS, BLOCKS])
@pytest.mark.parametrize("rings_first", [True, False])
def test_a_chunk_that_fails_is_in_every_store_of_a_layer_or_in_none(monkeypatch, kind, rings_first):
    model = fresh("llama")
    ring, full = (("s", "s"), "s", "ring"), (("p", "p"), "full", "full")
    order = (ring, full) if rings_first else (full, ring)
    prefill, cache, decode = zip(*order, strict=True)
    words = sum(prefill, ()), cache, decode
    with hfsparse.patch(model, plan_of(model, lambda *at: words, s=STREAM, p=kind)):
        cache = forward(model, tokens(1, 100)).past_key_values
        layer = cache.layers[0]
        before = [store.k.clone() for store in layer.stores]

        def fail(*args):
            raise MemoryError

        pattern = layer_plans_of(model)[0].cases[False, False].listed.routes
        kinds = {type(route.pattern) for route in pattern if route.band is None}
        for each in kinds:
            monkeypatch.setattr(each, "lists", fail)
        with pytest.raises(MemoryError):
            forward(model, tokens(1, 30, seed=1), cache=cache)
        held = [
            store.k.shape == was.shape and torch.equal(store.k, was)
            for store, was in zip(layer.stores, before, strict=True)
        ]
        assert len(held) == 2
        assert len({*held}) == 1


def test_what_a_call_shares_is_not_the_next_calls():
    """The same rows again: another mask's starts, grid and lists are looked at anew."""
    model = tiny("llama")
    ids, mask = left_padded(120)
    with hfsparse.patch(model, mixed(model)):
        wanted = forward(model, ids, mask).logits
        forward(model, ids, torch.ones_like(mask))
        assert torch.equal(forward(model, ids, mask).logits, wanted)
        assert generate(model, ids, mask, new=2).sequences.shape == (3, 122)


def test_a_fused_step_has_one_operator_a_layer_and_layers_share_it(monkeypatch):
    """As graphs compile it; once they are through, attention is no such operator again."""
    model, served, compiled = fresh("llama"), [], []

    def serve(index, q, k, v, logits):
        served.append(index)
        return q.transpose(1, 2).clone()

    def backend(module, inputs):
        compiled.append([node.target for node in module.graph.nodes])
        return module

    def step(count=1):
        decoder = model.get_decoder()
        with parts.fused(decoder, count) as forward_of:
            forward_of(
                decoder,
                input_ids=tokens(1, count),
                attention_mask=None,
                position_ids=torch.arange(5, 5 + count)[None],
                use_cache=True,
                **{CACHE: Through()},
            )

    torch.compiler.reset()
    monkeypatch.setattr(parts, "compile_step", backend)
    with hfsparse.patch(model, mixed(model)), torch.no_grad():
        plan = layer_plans_of(model)[0]
        enter(plan.owner)
        try:
            running().recorded = serve
            plan.mode.fusing = True
            step()
            assert served == [0, 1, 2]
            assert sum(torch.ops.hfsparse.step in made for made in compiled) == 1
            for count in (4, 2, 7, 1):  # several tokens have one of their own
                step(count)
            assert sum(torch.ops.hfsparse.step in made for made in compiled) == 2
            plan.mode.fusing = False
            with pytest.raises(torch._dynamo.exc.Unsupported):
                step()
        finally:
            leave(plan.owner)
