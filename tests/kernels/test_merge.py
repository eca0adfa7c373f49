"""Parts of a row, read by any kernel that gives LSE and merged by it, are the row read at once."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch

from hfsparse import kernels
from hfsparse.kernels import Need
from hfsparse.kernels.merge import Merged
from hfsparse.kernels.positions import NewTokens, ring_positions
from hfsparse.lists import PAGE, Band, BlockLists, Grid, PageLists
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import Place, Table
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.packed import PackedFull
from hfsparse.selectors.quest import Quest
from tests.helpers import batch, close
from tests.kernels.interpreter import interpreter
from tests.patterns.matrix import heads, mixed

BARE = torch.linspace(-2, 3, 6)


@pytest.fixture(scope="module")
def interpreted():
    with interpreter(triton__decode__UNITS=24) as run:
        yield run


@pytest.fixture(params=["reference", "Triton"])
def here(request):
    """`run(function, *args)`, of this module, with the kernels of the parameter's name."""
    if request.param == "reference":
        return lambda function, *args: globals()[function](-1, *args)
    run = request.getfixturevalue("interpreted")
    return lambda function, *args: run(f"{__name__}.{function}", 0, *args)


def merge(read, cuts: list[int], shape) -> tuple[torch.Tensor, torch.Tensor]:
    """What parts between the cuts come to; sink logits are the first part's."""
    merged, ends = None, [0, *cuts, 1 << 20]
    for low, high in pairwise(ends):
        lse = torch.full(shape, torch.nan)
        out = read((low, high), lse=lse, s_aux=BARE if low == 0 else None)
        if merged is None:
            merged = Merged(out, lse)
        else:
            merged.add(out, lse)
    return merged.out, merged.lse


def prefill(row: int, q, k, v, lists: BlockLists, kv, scale: float, cuts: list[int]):
    """A prompt's attention and LSE: by parts, and at once."""
    lacking = [each for each in kernels.TABLES.prefill if not each.why_not(lse_of(q, k, v))]
    run = partial(lacking[row].run, q, k, v, scale=scale)
    whole = torch.full(q.shape[:3], torch.nan)
    out = run(lists, kv, s_aux=BARE, lse=whole)
    parts = merge(lambda span, **more: run(lists.within(*span), kv, **more), cuts, q.shape[:3])
    return (out, whole), parts


def lse_of(q, k, v) -> Need:
    return Need.of(q, k, v, block=32, lists=True, lse=True)


@pytest.mark.parametrize("cuts", [[64], [32, 96]], ids=str)
def test_any_split_of_a_prompt_s_keys_is_the_whole(here, cuts):
    it = batch(40, past=70, rows="left_padded", group=3)
    lists = mixed(it)
    (out, lse), parts = here("prefill", it.q, it.k, it.v, lists, heads(it), it.scale, cuts)
    live = (it.grid.query_pos() >= 0)[:, None].expand_as(lse)
    logits = (it.q @ it.k.repeat_interleave(3, 1).mT * it.scale).masked_fill(
        ~lists.mask(), -torch.inf
    )
    bare = BARE[None, :, None, None].expand(*lse.shape, 1)
    assert close(lse[live], torch.cat([logits, bare], -1).logsumexp(-1)[live])
    assert (lse[~live] == -torch.inf).all()
    assert close(parts[0], out)
    assert close(parts[1][live], lse[live])
    assert (parts[1][~live] == -torch.inf).all()


def test_blocks_of_a_ring_are_split_by_the_positions_that_they_hold(here):
    first, live = (
        torch.tensor([[0, 40, 64], [0, 32, 64]]),
        torch.tensor([[10, 24, 26], [10, 32, 3]]),
    )
    grid = Grid(torch.tensor([20, 9]), torch.tensor([90, 67]), 20, 96, 32, None, first, live)
    it = batch(96, group=3, poison=0.0)
    k, v = (t.masked_fill((grid.key_pos < 0)[:, None, :, None], torch.nan) for t in (it.k, it.v))
    lists = BlockLists.of(grid, 6, band=Band(10, 25))
    given = it.q[:, :, :20], k, v, lists, heads(it), it.scale, [32, 64]
    (out, lse), parts = here("prefill", *given)
    assert close(parts[0], out)
    assert torch.equal(parts[1] == -torch.inf, lse == -torch.inf)


def decode(row: int, q, parts, pages, rows, scale: float, cuts: list[int]):
    """A step's attention and LSE over all stores: by parts, and at once."""
    run = partial(step(row, q, parts, rows, scale), pages)
    whole = torch.full(q.shape[:3], torch.nan)
    out = run(s_aux=BARE, lse=whole)
    return (out, whole), merge(lambda span, **more: run(span=span, **more), cuts, q.shape[:3])


def step(row: int, q, parts, rows, scale: float):
    """A step of two tokens: what is left to say is the pages, and what becomes of logits."""
    lengths, length = Lengths([n - 2 for n in rows], [2] * len(rows), 2), torch.tensor(rows)
    at = length[:, None] - 2 + torch.arange(2)
    new = NewTokens(lengths, length, at.masked_fill(at < 0, -1), max(rows))
    places = Table().places(parts)
    asked = {"lists": True, "lse": True, "bands": True, "block": PAGE, "packed": places.packed}
    need = Need.of(q, places.k, places.v, **asked)
    run = [each for each in kernels.TABLES.decode if not each.why_not(need)][row].run
    return partial(run, q, places, new, scale=scale)


@pytest.mark.parametrize(("unit", "cuts"), [(PAGE, [64, 128, 256]), (16, [192])], ids=str)
def test_any_split_of_a_step_s_keys_is_the_whole(here, unit, cuts):
    """A full store, a ring that came round and one whose pages are listed."""
    rows, band, size = [300, 90], Band(5, 40), 77
    it = batch(300, group=2, kv_heads=3, poison=0.0)
    ring = ring_positions(torch.tensor(rows), torch.full((2,), 5), 5, size)
    slots = ring.clamp(min=0)[:, None, :, None].expand(-1, 1, -1, 16)
    listed = PageLists(
        torch.tensor([0, 1, 3, 4]).expand(2, 1, -1).clone(), torch.tensor([[4], [2]]), unit
    )
    parts = [
        Place((0,), *(t[:, :1].contiguous() for t in (it.k, it.v))),
        Place((1,), *(t[:, 1:2].gather(2, slots) for t in (it.k, it.v)), band, size, 0),
        Place((2,), *(t[:, 2:].contiguous() for t in (it.k, it.v)), listed=True),
    ]
    given = it.q[:, :, :2].contiguous(), parts, [None, None, listed], rows, it.scale, cuts
    (out, lse), (merged, merged_lse) = here("decode", *given)
    assert lse.isfinite().all()
    assert close(merged, out)
    assert close(merged_lse, lse)


def packed(row: int, q, parts, lists, rows, scale: float):
    """A step's attention and LSE over packed stores: by all pages, the first, and the others."""
    run, found = step(row, q, parts, rows, scale), []
    for pages, sinks in zip(lists, (BARE, BARE, None), strict=True):
        lse = torch.full(q.shape[:3], torch.nan)
        found.append((run(pages, s_aux=sinks, lse=lse), lse))
    return found


@pytest.mark.parametrize("unit", [PAGE, 16])
def test_packed_pages_read_by_two_lists_are_those_read_by_one(here, unit):
    """Two stores; the newest page, which is not packed, is in the second list."""
    rows, it = [300, 90], batch(300, group=2, kv_heads=3, poison=0.0)
    parts, past = [], Lengths([0, 0], rows, 300)
    for own, bits in (((0, 2), 4), ((1,), 8)):
        k, v = (t[:, list(own)] for t in (it.k, it.v))
        parts.append(PackedFull(Group(own, bits=bits, selector=Quest(unit=unit)), 0))
        parts[-1].create(k, v)
        parts[-1].append(k, v, past)
    end = PAGE // unit

    def listed(*named: range):
        """Of the first row all that are named, of the second those of its two pages."""
        pages = torch.tensor([n for each in named for n in each])
        count = torch.tensor([len(pages), (pages < 2 * end).sum()])
        return [
            PageLists(pages.expand(2, n, -1).clone(), count[:, None].expand(-1, n).clone(), unit)
            for n in (2, 1)
        ]

    lists = [
        listed(range(end), range(end, 5 * end)),
        listed(range(end)),
        listed(range(end, 5 * end)),
    ]
    given = it.q[:, :, :2].contiguous(), [each.place() for each in parts], lists, rows, it.scale
    (out, lse), (first, lse_first), second = here("packed", *given)
    merged = Merged(first, lse_first)
    merged.add(*second)
    assert lse.isfinite().all()
    assert close(merged.out, out)
    assert close(merged.lse, lse)
    logits = it.q[:1, :1, :2] @ torch.cat([t.read(rows)[0] for t in parts], 1)[:1, :1, :300].mT
    kept = torch.arange(300) <= torch.tensor([[298], [299]])
    logits = (logits * it.scale).masked_fill(~kept, -torch.inf)
    bare = BARE[0].expand(1, 1, 2, 1)
    assert close(lse[:1, :1], torch.cat([logits, bare], -1).logsumexp(-1))


def test_nothing_beside_something_changes_no_bit_nor_gradient():
    """Of the first row nothing is read at all."""
    out, lse = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4)
    out[0], lse[0] = 0, -torch.inf
    given = [
        t.requires_grad_() for t in (out, lse, torch.zeros_like(out), lse.detach() - torch.inf)
    ]
    merged = Merged(*given[:2])
    merged.add(*given[2:])
    assert torch.equal(merged.out, out)
    assert torch.equal(merged.lse, lse)
    merged.out.sum().backward()
    assert (out.grad == torch.tensor([0.0, 1.0])[:, None, None, None]).all()
    assert not any(t.grad.any() for t in given[1:])
