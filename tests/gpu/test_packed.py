"""Caches in fewer bits on the GPU: what Triton packs and reads, replayed steps, chunks."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import DynamicCache

import hfsparse
from hfsparse import kernels
from hfsparse.kernels.positions import NewTokens
from hfsparse.lists import FULL, PAGE, Band, Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import Table
from hfsparse.runtime.cache import packed as stores
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.packed import PackedFull, PackedRing
from hfsparse.runtime.cache.store import TOGETHER
from hfsparse.runtime.call import use_tables
from hfsparse.selectors.quest import Quest
from tests.gpu.common import BF16, DEVICE, HALF, SINGLE, near
from tests.gpu.test_graphs import graphs, inputs, said
from tests.kernels.stores import append_store
from tests.kernels.triton.test_append import of_tokens
from tests.patcher.families import fresh, packing, tokens
from tests.patcher.runs import CACHE, forward

BITS = (8, 4, "fp8")
LENGTHS = [700, 130, 62]
STEPS = [[1, 1, 1], [1, 0, 1], [16, 1, 3], [3, 16, 0], *[[16, 16, 16]] * 12, [1, 1, 1]]
PLAIN = kernels.Tables(*(tuple(x for x in t if "Triton" not in x.name) for t in kernels.TABLES))


def random(made, rows: int, heads: int, columns: int, dim: int, dtype) -> torch.Tensor:
    """Heads inside tokens in memory, as models have them; channels and tokens of many sizes."""
    drawn = torch.randn(rows, columns, heads, dim, generator=made, device=DEVICE)
    size = torch.randn(rows, columns, 1, 1, generator=made, device=DEVICE)
    size = size + torch.randn(dim, generator=made, device=DEVICE)
    return (drawn * size.exp()).to(dtype).transpose(1, 2)


def begin(group: Group, dims, dtype, made, reserve: int = 0):
    """A store of rows of LENGTHS."""
    store = PackedFull(group, reserve) if group.band == FULL else PackedRing(group, 0)
    k, v = (random(made, 3, len(group.heads), max(LENGTHS), dim, dtype) for dim in dims)
    store.create(k, v)
    store.append(k, v, Lengths([0] * 3, LENGTHS, max(LENGTHS)))
    return store


def in_float32(place):
    """Of what whole pages are read: their numbers aren't rounded once they are unpacked."""
    packed = place.packed
    packed = packed._make([*packed[:3], *(t.float() for t in packed[3:])])
    return place._replace(k=place.k.float(), v=place.v.float(), packed=packed)


def positions(past: list[int], new: list[int]) -> torch.Tensor:
    lane = torch.arange(max(new))
    at = torch.where(lane < torch.tensor(new)[:, None], torch.tensor(past)[:, None] + lane, -1)
    return at.to(DEVICE)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["full", "pages", "spans", "ring", "sink"])
@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((128, 128), BF16), ((64, 64), HALF), ((80, 20), SINGLE), ((256, 256), BF16)],
    ids=str,
)
def test_a_store_is_filled_bit_for_bit_as_its_own_append_does(kind, dims, dtype, bits):
    chosen = {"pages": Quest(), "spans": Quest(unit=16, bound=8)}
    bands = {"ring": Band(4, 40), "sink": Band(100, 200)}
    group = Group((0, 1), bands.get(kind, FULL), chosen.get(kind), bits=bits)
    made, past = torch.Generator(DEVICE).manual_seed(0), LENGTHS
    store = begin(group, dims, dtype, made)
    for new in STEPS:
        k, v = (random(made, 3, 2, max(new), dim, dtype) for dim in dims)
        lengths = Lengths(past, new, max(new))
        store.room(past, lengths.rows)
        ours = copy.deepcopy(store)
        append_store(store=ours, k=k, v=v, query_pos=positions(past, new))
        store.append(k, v, lengths)
        past = lengths.rows
        for found, wanted in zip(ours.tensors(), store.tensors(), strict=True):
            if found.ndim == 5 and found.dtype == dtype:  # spans of no token hold anything
                found, wanted = (of_tokens(t.cpu(), past) for t in (found, wanted))
            found, wanted = (t.contiguous().view(torch.uint8) for t in (found, wanted))
            assert torch.equal(found, wanted), f"differs once {new} made it {past}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "queries"), [(1, 1), (3, 5), (4, 1), (8, 16)])
@pytest.mark.parametrize("kind", ["full", "pages", "units", "ring"])
@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((128, 128), BF16), ((64, 80), HALF), ((64, 64), SINGLE), ((256, 256), BF16)],
    ids=str,
)
def test_a_step_over_a_store_is_the_reference(kind, dims, dtype, group, queries, bits):
    chosen = {"pages": Quest(0.3, 2), "units": Quest(0.3, 2, unit=16, bound=16)}.get(kind)
    band = Band(70, 300) if kind == "ring" else FULL
    made = torch.Generator(DEVICE).manual_seed(0)
    store = begin(Group((0, 1), band, chosen, bits=bits), dims, dtype, made)
    lengths = Lengths([n - queries for n in LENGTHS], LENGTHS, queries)
    at = positions(lengths.past, [queries] * 3)
    new = NewTokens(lengths, torch.tensor(LENGTHS, device=DEVICE), at, max(LENGTHS))
    q = torch.randn(3, 2 * group, queries, dims[0], generator=made, device=DEVICE).to(dtype)
    lists = chosen and chosen.pages(q, store.indexed(None), new.length, 0.05)
    places = Table().places([store.place()])
    need = kernels.Need.of(q, places.k, places.v, lists=True, block=PAGE, packed=True)
    run = kernels.pick(kernels.DECODE, need)
    assert run.name == "Triton, store by store"
    found = run.run(q, places, new, [lists], scale=0.05)
    part = store.place() if kind == "units" else in_float32(store.place())
    places = Table().places([part])
    want = kernels.DECODE[-1].run(q.to(part.k.dtype), places, new, [lists], scale=0.05)
    assert near(found, want)


@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_replayed_steps_are_eager_steps_bit_for_bit(bits, fuse, pads):
    plan = partial(packing, bits=bits, every=True)
    model, (ids, mask) = fresh("qwen3").to(DEVICE), inputs(250, pads)
    got = said(model, plan, ids, mask, fuse=fuse, new=90)
    want = said(model, plan, ids, mask, replay=False, new=90)
    if not fuse:
        assert torch.equal(got[1], want[1])
        assert got[0] == want[0]


@torch.no_grad()
@pytest.mark.parametrize("bits", BITS)
def test_replayed_steps_can_be_taken_back(bits):
    """A few, and more than lie as they came, where no head is a ring."""
    model, (ids, _) = fresh("qwen3").to(DEVICE), inputs(150)
    for kinds, drops in ((("quest", "ring", "full"), (30, 5, 32)), (("full", "quest"), (100, 75))):
        found = []
        for never in (None, "this test wants it eager"):
            with hfsparse.patch(model, packing(model, bits, every=True, kinds=kinds)):
                graphs(model).never = never
                cache, seen = DynamicCache(), []
                model(ids, **{CACHE: cache})
                for drop in drops:
                    for step in range(140):
                        seen.append(model(ids[:, step : step + 1], **{CACHE: cache}).logits)
                    assert graphs(model).why == never
                    cache.crop(-drop)
                seen.append(model(ids[:, :1], **{CACHE: cache}).logits)
                found.append(torch.cat(seen, 1))
        assert torch.equal(*found)


@pytest.mark.parametrize("bits", BITS)
def test_chunks_and_steps_are_those_without_triton(bits):
    model, ids, found = fresh("qwen3").to(DEVICE), tokens(2, 700).to(DEVICE), []
    for tables in (kernels.TABLES, PLAIN):
        with use_tables(tables), hfsparse.patch(model, packing(model, bits)):
            out, seen = forward(model, ids[:, :300]), []
            for new in (ids[:, 300:600], ids[:, 600:601], ids[:, 601:700]):
                out = forward(model, new, cache=out.past_key_values)
                seen.append(out.logits)
            found.append(torch.cat(seen, 1))
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


def test_what_a_chunk_finds_unpacked_is_bounded():
    """By what docs/plans.md says, however many heads there are."""
    past, new, heads = 262_144, 128, 16
    store = PackedFull(Group(tuple(range(heads)), bits=8), past + new)
    k = torch.randn(1, heads, past, 128, device=DEVICE, dtype=BF16)
    store.create(k, k)
    store.append(k, k, Lengths([0], [past], past))
    lengths, chunk = Lengths([past], [new], new), k[:, :, :new].clone()
    del k
    grid = Grid(*(torch.tensor([n], device=DEVICE) for n in (new, past + new)), new, past + new)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, parts = torch.cuda.memory_allocated(), 0
    for some, part in store.parts(lengths):
        read = part.with_chunk(chunk[:, some], chunk[:, some], lengths, grid)
        parts += 1
        del read
    assert parts > 1
    most = 2 * TOGETHER + 32 * stores.UNPACKED
    assert torch.cuda.max_memory_allocated() - before < most
