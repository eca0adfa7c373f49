"""Decode tokens stored by the Triton kernel, interpreted, against the cache's own stores."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hfsparse import kernels
from hfsparse.kernels import table
from hfsparse.kernels.positions import NewTokens
from hfsparse.lists import PAGE, Band
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.ring import Ring
from hfsparse.selectors.quest import Quest
from tests.kernels import stores
from tests.kernels.interpreter import interpreter
from tests.kernels.launches import launched, watch

SINGLE, HALF = torch.float32, torch.float16
ROOM = 5 * PAGE
INTS = {2: torch.int16, 4: torch.int32}
STEPS = [  # new tokens of each of three rows
    *([1, 1, 1],) * 4,
    *([3, 3, 3],) * 3,
    *([3, 0, 1], [0, 2, 0], [16, 1, 7], [0, 0, 0], [2, 16, 0], [1, 1, 16]),
]


@pytest.fixture(scope="module")
def append():
    """By keyword alone: what the call changes comes back in these."""
    with interpreter() as run:
        yield lambda **more: run("tests.kernels.stores.append", **more)


@pytest.fixture
def module():
    return pytest.importorskip("hfsparse.kernels.triton.append", exc_type=ImportError)


def tokens(rows: int, queries: int, dims: tuple[int, int], dtype, made, heads: int = 2):
    """k and v of new tokens, heads inside tokens in memory, as models have them."""
    shapes = ((rows, queries, heads, dim) for dim in dims)
    return [torch.randn(*s, generator=made).to(dtype).transpose(1, 2) for s in shapes]


def positions(past: list[int], new: list[int], queries: int) -> torch.Tensor:
    past, new = (torch.tensor(t)[:, None] for t in (past, new))
    lane = torch.arange(queries)
    return torch.where(lane < new, past + lane, -1)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit, NaN included."""
    ints = INTS[a.element_size()]
    return torch.equal(a.view(ints), b.view(ints))


def begin(store, lengths: list[int], dims, dtype, made, poison: float = torch.nan):
    """A store of prompts of these lengths; `poison` wherever it holds nothing."""
    k, v = tokens(len(lengths), max(lengths), dims, dtype, made)
    store.create(k, v)
    store.append(k, v, Lengths([0] * len(lengths), lengths, max(lengths)))
    for b, n in enumerate(lengths):
        store.k[b, :, n:], store.v[b, :, n:] = poison, poison
        for t in getattr(store, "index", {}).values():
            t[b, :, -(-n // PAGE) :] = poison


def follow(append, store, lengths, steps, dims, dtype, made, **ring) -> None:
    """Append steps to the store, and by the kernel to what the store was before each."""
    past = list(lengths)
    for new in steps:
        queries = max(1, *new)
        k, v = tokens(len(past), queries, dims, dtype, made)
        kept = [t.clone() for t in store.tensors()]
        lengths = Lengths(past, new, queries)
        store.append(k, v, lengths)
        names = ("into_k", "into_v", "low", "high")[: len(kept)]
        append(
            k=k,
            v=v,
            query_pos=positions(past, new, queries),
            **dict(zip(names, kept, strict=True)),
            **ring,
        )
        past = lengths.rows
        for name, ours, theirs in zip(names, kept, store.tensors(), strict=True):
            if ours.ndim == 5:  # spans of no token in a row's last page hold anything
                ours, theirs = (of_tokens(t, past) for t in (ours, theirs))
            assert same(ours, theirs), f"{name} differs once {new} made it {past}"


def of_tokens(spans: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Spans `[B, H, P, n, D]`, 0 where they begin beyond rows of these lengths."""
    spans, width = spans.flatten(2, 3), PAGE // spans.shape[3]
    beyond = torch.arange(spans.shape[2]) * width >= torch.tensor(rows)[:, None]
    return spans.masked_fill(beyond[:, None, :, None], 0)


SPANS = {"all": None, "pages": Quest(), "spans": Quest(unit=16, bound=8)}


@pytest.mark.parametrize("selector", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (96, 64), (16, 200)])
def test_a_full_store_is_filled_as_its_own_append_does(append, dims, dtype, selector):
    made = torch.Generator().manual_seed(0)
    store, lengths = Full(Group((0, 1), selector=selector), ROOM), [61, 130, 5]
    begin(store, lengths, dims, dtype, made)
    follow(append, store, lengths, STEPS, dims, dtype, made)


@pytest.mark.parametrize("past", [0, 1, 47, 48, 49, 63, 64, 65, 127])
@pytest.mark.parametrize("new", [1, 2, 15, 16])
@pytest.mark.parametrize(("poison", "bound"), [(torch.nan, 64), (1e9, 64), (torch.nan, 16)])
def test_summaries_are_those_of_the_pages_with_new_tokens(append, past, new, poison, bound):
    """Where a page, or a span, ends inside the new tokens, just before and just after them."""
    made = torch.Generator().manual_seed(past)
    store = Full(Group((0, 1), selector=Quest(bound=bound)), ROOM)
    begin(store, [past, 70], (16, 16), SINGLE, made, poison)
    follow(append, store, [past, 70], [[new, 0], [0, new], [new, new]], (16, 16), SINGLE, made)


def test_summaries_forget_what_was_taken_back(append):
    """After a crop a page's minima and maxima are of keys that no longer count."""
    made = torch.Generator().manual_seed(0)
    store = Full(Group((0, 1), selector=Quest()), ROOM)
    begin(store, [100, 129], (16, 16), SINGLE, made)
    store.k[0, :, 90:100] = 1e9
    store.k[1, :, 120:129] = torch.nan
    follow(append, store, [90, 120], [[1, 1], [3, 16]], (16, 16), SINGLE, made)


@pytest.mark.parametrize(("dims", "dtype"), [((64, 64), HALF), ((80, 128), SINGLE)])
@pytest.mark.parametrize("sink", [0, 4])
def test_a_ring_is_filled_as_its_own_append_does(append, sink, dims, dtype):
    """Rows that begin inside the sink, that fill the ring, and that came round it before."""
    made = torch.Generator().manual_seed(0)
    store, lengths = Ring(Group((0, 1), Band(sink, 9)), 0), [2, 40, 300]
    begin(store, lengths, dims, dtype, made)
    size = store.size
    assert size < 50
    follow(append, store, lengths, STEPS * 3, dims, dtype, made, sink=sink, size=size)
    assert store.size == size


def test_a_ring_shorter_than_a_call_keeps_the_newest(append):
    made = torch.Generator().manual_seed(0)
    k, v = tokens(2, 16, (16, 16), SINGLE, made)
    into = {name: torch.zeros(2, 2, 8, 16) for name in ("into_k", "into_v")}
    past, new = [1, 77], [16, 15]
    append(k=k, v=v, query_pos=positions(past, new, 16), sink=3, size=5, **into)
    for name, chunk in (("into_k", k), ("into_v", v)):
        expected = torch.zeros(2, 2, 8, 16)
        for b in range(2):
            for i in range(new[b]):
                p = past[b] + i
                expected[b, :, p if p < 3 else 3 + (p - 3) % 5] = chunk[b, :, i]
        assert torch.equal(into[name], expected)


@pytest.mark.parametrize("store", ["all", "pages", "spans", "ring"])
@pytest.mark.parametrize("rows", [[150, 64, 0], [130, 130, 130], [17, 5, 1]], ids=str)
def test_a_prompt_is_stored_as_each_store_does(append, rows, store):
    made, ring = torch.Generator().manual_seed(0), {}
    held = Full(Group((0, 1), selector=SPANS.get(store)), ROOM)
    if store == "ring":
        held = Ring(Group((0, 1), Band(4, 9)), below=1000)
    k, v = tokens(3, max(rows), (16, 24), SINGLE, made)
    held.create(k, v)
    held.room([0] * 3, rows)
    before = [t.fill_(0).clone() for t in held.tensors()]
    held.append(k, v, Lengths([0] * 3, rows, max(rows)))
    if store == "ring":
        ring = {"sink": 4, "size": held.size}
    names = ("into_k", "into_v", "low", "high")[: len(before)]
    given = dict(zip(names, before, strict=True))
    append(k=k, v=v, query_pos=positions([0] * 3, rows, max(rows)), prompt=True, **given, **ring)
    for name, ours, theirs in zip(names, before, held.tensors(), strict=True):
        if ours.ndim == 5:
            ours, theirs = (of_tokens(t, rows) for t in (ours, theirs))
        assert same(ours, theirs), name


def test_tokens_in_any_layout_give_the_same(append):
    made = torch.Generator().manual_seed(0)
    k, v = tokens(2, 3, (64, 64), SINGLE, made)
    found = []
    for form in (lambda t: t, lambda t: t.contiguous(), lambda t: t.mT.contiguous().mT):
        into = {name: torch.zeros(2, 2, PAGE, 64) for name in ("into_k", "into_v")}
        append(k=form(k), v=form(v), query_pos=positions([9, 3], [3, 2], 3), **into)
        found.append(into)
    for other in found[1:]:
        assert all(torch.equal(other[name], t) for name, t in found[0].items())


def test_nothing_is_written_beyond_the_buffers(append):
    """Not into the next head's keys either."""
    made = torch.Generator().manual_seed(0)
    k, v = tokens(1, 3, (16, 16), SINGLE, made)
    into = {name: torch.zeros(1, 2, PAGE, 16) for name in ("into_k", "into_v")}
    into |= {name: torch.zeros(1, 2, 1, 16) for name in ("low", "high")}
    append(k=k, v=v, query_pos=positions([PAGE - 1], [3], 3), **into)
    first = {"into_k": k[:, :, 0], "into_v": v[:, :, 0]}  # the others would lie beyond
    first |= {"low": first["into_k"].clamp(max=0), "high": first["into_k"].clamp(min=0)}
    for name, expected in first.items():
        assert torch.equal(into[name][:, :, -1], expected)
        assert not into[name][:, :, :-1].any()


def test_a_new_length_launches_and_compiles_the_same(module, monkeypatch):
    """What a CUDA graph holds on to: grids, compiled forms and numbers; positions it reads."""
    for note in (launched, watch):
        with monkeypatch.context() as patch:
            seen, found = note(patch, module), []
            for past, new in (([0, 1], [1, 1]), ([640, 77], [1, 0])):
                k, v = (torch.zeros(2, 2, 1, 64) for _ in "kv")
                into = torch.zeros(2, 2, 1000, 64)
                low = torch.zeros(2, 2, 16, 64)
                held = dict(k=k, v=v, into_k=into, into_v=into, query_pos=positions(past, new, 1))
                stores.append(**held, low=low, high=low)
                stores.append(**held, sink=4, size=996)
                found.append(list(seen))
                seen.clear()
            assert len(found[0]) == 2
            assert found[0] == found[1]


def test_a_store_that_grows_compiles_nothing(module, monkeypatch):
    seen = watch(monkeypatch, module)
    found = []
    for pages in (1, 2, 16, 1001):
        k, into = torch.zeros(1, 8, 1, 128), torch.zeros(1, 8, pages * PAGE, 1)
        into = into.expand(-1, -1, -1, 128).contiguous()
        low = torch.zeros(1, 8, pages, 128)
        held = dict(k=k, v=k, into_k=into, into_v=into, query_pos=positions([5], [1], 1))
        stores.append(**held, low=low, high=low)
        stores.append(**held, size=pages * PAGE)
        found.append(set(seen))
    assert len(found[0]) == 2
    assert found[0] == found[1] == found[2] == found[3]


def test_what_it_cannot_do_is_said(module):
    need = partial(kernels.Need, torch.device("cpu"), head_dim=64, value_dim=64)
    assert "float64" in module.why_not(need(dtype=torch.float64))
    assert "no gradients" in module.why_not(need(dtype=HALF, grad=True))
    assert module.why_not(need(dtype=HALF)) is None
    k, into = torch.zeros(1, 1, 17, 64), torch.zeros(1, 1, 64, 64)
    with pytest.raises(ValueError, match="17 new tokens"):
        module.append(k, k, stores.one(into, into), torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="contiguous"):
        stores.one(into.mT, into)
    with pytest.raises(ValueError, match="contiguous"):
        stores.one(into, into, low=into.mT, high=into)


def test_it_is_taken_where_it_can_serve(module, monkeypatch):
    k, into = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 64, 64)
    at, calls = torch.zeros(1, 1, dtype=torch.int64), launched(monkeypatch, module)
    new = NewTokens(Lengths([0], [1], 1), torch.ones(1, dtype=torch.int64), at)
    into = stores.one(into, into)

    def picked(k, v) -> str:
        need = kernels.Need.of(k, into.k, into.v, v)
        return kernels.pick.__wrapped__(kernels.APPEND, need).name

    assert picked(k, k) == "PyTorch"  # a CPU
    monkeypatch.setattr(table, "no_triton", lambda need: None)
    assert picked(k.double(), k.double()) == "PyTorch"
    assert picked(k, k.clone().requires_grad_()) == "PyTorch"
    assert picked(k, k) == "Triton"
    kernels.APPEND[0].run(k, k, into, new)
    assert len(calls) == 1
