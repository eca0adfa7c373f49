"""A selector with an index and a table of its own on the GPU: chosen, followed, recorded."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from hfsparse.lists import FULL, PAGE
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from tests.gpu.common import BF16, DEVICE, HALF, SINGLE, rounding
from tests.gpu.test_graphs import test_a_replay_is_the_eager_step_bit_for_bit as replays
from tests.gpu.test_quest import same
from tests.selectors.plans import labelled, refreshed
from tests.selectors.test_selectors import LENGTHS, SCALE, SETTINGS, bound, drawn, index_of


@contextmanager
def no_wait():
    """The host waits for nothing."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 3), (3, 4), (16, 8)])
@pytest.mark.parametrize("name", SETTINGS)
def test_pages_are_those_chosen_on_the_cpu(name, queries, group):
    selector, (q, k, length) = bound(name), drawn(LENGTHS, queries, group)
    index = index_of(selector, k, length, room=3, queries=queries)
    expected = selector.pages(q, index, length, SCALE)
    there = {key: t.to(DEVICE) for key, t in index.items()}
    q, length = q.to(DEVICE), length.to(DEVICE)
    selector.pages(q, there, length, SCALE)  # copies its table
    with no_wait():
        found = selector.pages(q, there, length, SCALE)
    with rounding():
        rounded = selector.pages(q, there, length, SCALE)
    for lists in (found, rounded):
        same(type(lists)(lists.pages.cpu(), lists.count.cpu()), expected)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16])
@pytest.mark.parametrize("name", ["channels", "channels_all", "lowrank", "quest"])
@pytest.mark.parametrize("Q", [1, 16])
def test_an_index_follows_a_step_as_append_keeps_it(name, Q, dtype):
    made, lengths = torch.Generator(DEVICE).manual_seed(Q), [PAGE * 3 - 1, PAGE * 2, 5]
    store = Full(Group((0, 1), FULL, bound(name)), 7 * PAGE)

    def keys(n: int) -> torch.Tensor:
        return torch.randn(3, 2, n, 8, generator=made, device=DEVICE).to(dtype)

    k = keys(max(lengths))
    store.create(k, k)
    store.append(k, k, Lengths([0, 0, 0], lengths, max(lengths)))
    for new in [(Q, Q, Q), (Q, 0, 1), (0, 0, 0)] * 3:
        k, before = keys(Q), [t.clone() for t in store.index.values()]
        store.append(k, k, Lengths(lengths, list(new), Q))
        expected = [t.clone() for t in store.index.values()]
        for t, old in zip(store.index.values(), before, strict=True):
            t.copy_(old)
        at = torch.tensor(lengths)[:, None] + torch.arange(Q)
        lengths = [p + n for p, n in zip(lengths, new, strict=True)]
        at = torch.where(at < torch.tensor(lengths)[:, None], at, -1).to(DEVICE)
        with no_wait():
            store.follow(at)
        for t, wanted in zip(store.index.values(), expected, strict=True):
            for b, n in enumerate(lengths):
                held = slice(0, -(-n // PAGE))
                assert torch.equal(t[b, :, held], wanted[b, :, held])


@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)])
@pytest.mark.parametrize("plan", [labelled, refreshed])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_replay_is_the_eager_step_bit_for_bit(family, plan, pads):
    replays(family, plan, pads)
