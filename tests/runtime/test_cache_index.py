"""A store's index is its selector's: it follows what kernels store as `append` keeps it."""

from __future__ import annotations

import pytest
import torch

from hfsparse.lists import FULL, PAGE
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import Table
from hfsparse.runtime.cache import buffers, full
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.selectors.centroids import Centroids
from hfsparse.selectors.channels import Channels
from hfsparse.selectors.quest import Quest
from tests.helpers import poison_of
from tests.patterns.matrix import weights

DIM, ROOM = 8, 7 * PAGE
LABELS = Channels(0.3, 2, bits=8, channels=3).bind(0, (0, 1), weights(1, 2, 8))
SELECTORS = {"labels": LABELS, "quest": Quest(), "refreshed": Quest(refresh=4)}
SELECTORS["means"] = Quest(unit=16, means=True)


def store_of(selector, rows: int = 3) -> Full:
    store = Full(Group((0, 1), FULL, selector), ROOM)
    empty = torch.zeros(rows, 2, 0, DIM)
    store.create(empty, empty)
    return store


def begun(selector, lengths: list[int], made, poison: float = torch.nan) -> Full:
    """A store of prompts of these lengths; `poison` wherever it holds nothing."""
    store = store_of(selector, len(lengths))
    k = torch.randn(len(lengths), 2, max(lengths), DIM, generator=made)
    store.append(k, k, Lengths([0] * len(lengths), lengths, max(lengths)))
    for b, n in enumerate(lengths):
        store.k[b, :, n:] = poison
        for t in store.index.values():
            t[b, :, -(-n // PAGE) :] = poison_of(t.dtype, poison)
    return store


def kept(store: Full) -> list[torch.Tensor]:
    return [t.clone() for t in store.index.values()]


def equal(ours, theirs) -> bool:
    """Bit by bit, NaN included."""
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("poison", [torch.nan, 1e9])
@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("Q", [1, 2, 3, 16])
def test_an_index_follows_a_step_as_append_keeps_it(name, Q, poison):
    """Rows on either side of a page's end, some without a new token, some with fewer."""
    made = torch.Generator().manual_seed(Q)
    lengths = [PAGE * 3 - 1, PAGE * 2, 5]
    store = begun(SELECTORS[name], lengths, made, poison)
    for step in range(12):
        new = [(Q, Q, Q), (Q, 0, 1), (0, 0, 0), (1, Q, Q - 1)][step % 4]
        k = torch.randn(3, 2, Q, DIM, generator=made)
        before = kept(store)
        store.append(k, k, Lengths(lengths, list(new), Q))
        expected, stored = kept(store), store.k.clone()
        for t, old in zip(store.index.values(), before, strict=True):
            t.copy_(old)
        at = torch.tensor(lengths)[:, None] + torch.arange(Q)
        lengths = [p + n for p, n in zip(lengths, new, strict=True)]
        store.follow(torch.where(at < torch.tensor(lengths)[:, None], at, -1))
        assert equal(kept(store), expected)
        assert torch.equal(store.k.nan_to_num(), stored.nan_to_num())
        assert any(new) or equal(kept(store), before)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_long_prompt_is_summarised_a_few_pages_at_a_time(name, monkeypatch):
    lengths = [300, 64, 7]
    at_once, few = (begun(SELECTORS[name], lengths, torch.Generator().manual_seed(2)) for _ in "ab")
    monkeypatch.setattr(buffers, "AT_ONCE", 2)
    for t in few.index.values():
        t.fill_(poison_of(t.dtype, torch.nan))
    k = few.k[:, :, : max(lengths)].clone()
    few.append(k, k, Lengths([0] * 3, lengths, max(lengths)))
    assert equal(kept(few), kept(at_once))


@pytest.mark.parametrize("name", SELECTORS)
def test_an_index_that_follows_forgets_what_was_taken_back(name):
    made = torch.Generator().manual_seed(0)
    store, clean = (
        begun(SELECTORS[name], [100, 129], torch.Generator().manual_seed(3)) for _ in "ab"
    )
    store.k[0, :, 90:100], store.k[1, :, 120:129] = 1e9, torch.nan
    k = torch.randn(2, 2, 1, DIM, generator=made)
    for it in (store, clean):
        it.k[0, :, 90], it.k[1, :, 120] = k[0, :, 0], k[1, :, 0]
        it.follow(torch.tensor([[90], [120]]))
    for ours, theirs in zip(store.index.values(), clean.index.values(), strict=True):
        assert equal([ours[:, :, 1].contiguous()], [theirs[:, :, 1].contiguous()])


def test_the_last_page_there_is_room_for_is_renewed_once():
    """A step whose second page would lie beyond the buffers."""
    made = torch.Generator().manual_seed(0)
    store = begun(LABELS, [ROOM - 3, 2], made)
    k = torch.randn(2, 2, 3, DIM, generator=made)
    before = kept(store)
    store.append(k, k, Lengths([ROOM - 3, 2], [3, 0], 3))
    expected = kept(store)
    for t, old in zip(store.index.values(), before, strict=True):
        t.copy_(old)
    store.follow(torch.tensor([[ROOM - 3, ROOM - 2, ROOM - 1], [-1, -1, -1]]))
    assert equal(kept(store), expected)


@pytest.mark.parametrize("name", SELECTORS)
def test_kernels_are_told_of_an_index_that_they_write_and_of_no_other(name):
    place = begun(SELECTORS[name], [70], torch.Generator().manual_seed(0)).place()
    places, own = Table().places([place]), name in ("quest", "refreshed")
    assert places.summaries == own
    assert (place.follow is None) == own
    assert len(place.buffers) == (4 if own else 2)


@pytest.mark.parametrize("name", SELECTORS)
def test_an_index_grows_and_is_reordered_with_its_keys(name):
    made = torch.Generator().manual_seed(0)
    store = begun(SELECTORS[name], [200, 70], made)
    before = kept(store)
    capacity = store.capacity
    store.room([200, 70], [capacity + 1, 71])
    assert store.capacity > capacity
    for t, old in zip(store.index.values(), before, strict=True):
        assert t.shape[2] == store.capacity // PAGE
        assert torch.equal(t[:, :, : old.shape[2]].nan_to_num(), old.nan_to_num())
    store.select([1, 0, 1])
    for t, old in zip(store.index.values(), before, strict=True):
        assert torch.equal(t[:, :, : old.shape[2]].nan_to_num(), old[[1, 0, 1]].nan_to_num())
    held = [store.k, store.v, *store.index.values()]
    assert {t.data_ptr() for t in held} <= {t.data_ptr() for t in store.tensors()}


def test_segments_are_made_where_the_host_looks_and_left_with_a_crop(monkeypatch):
    """A graph runs until a row ends a part of its segment; then, and behind a crop, `room` finds
    the index that a store has which was never longer."""
    clusters = Centroids(clusters=2, segment=512)  # parts of 64 tokens
    store = begun(clusters, [700, 70], torch.Generator().manual_seed(0))
    store.room([700, 70], [701, 71])
    assert (store.built, store.until([701, 71])) == ([640, 64], 704)
    kept_at_first = kept(store)
    store.room([704, 73], [705, 74])
    assert (store.built, store.until([705, 74])) == ([704, 64], 759)
    assert not equal(kept(store), kept_at_first)
    store.forget([600, 40])
    assert store.built == [512, 0]
    store.room([600, 40], [601, 41])
    assert store.built == [576, 0]
    shorter = store_of(clusters, 2)
    monkeypatch.setattr(full, "PAIRS", 1)  # a segment at a time
    k = store.k[:, :, :600]
    shorter.append(k, k, Lengths([0, 0], [600, 40], 600))
    shorter.room([600, 40], [601, 41])
    for ours, theirs in zip(store.index.values(), shorter.index.values(), strict=True):
        assert equal([ours[0, :, :10]], [theirs[0, :, :10]])
        assert equal([ours[1, :, :1]], [theirs[1, :, :1]])
