"""The Triton decode kernel, interpreted, against plain float32 attention."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch.nn.functional import pad

from hfsparse import kernels
from hfsparse.kernels.positions import ring_positions
from hfsparse.lists import PAGE, Band, PageLists
from tests.helpers import batch, close, truth
from tests.kernels import stores
from tests.kernels.interpreter import interpreter
from tests.kernels.launches import launched, watch
from tests.kernels.test_reference import paged, readable, step, used

SINGLE, HALF = torch.float32, torch.float16


@pytest.fixture(scope="module")
def decode():
    with interpreter() as run:
        yield lambda *args, **more: run("tests.kernels.stores.decode", *args, **more)


def some_pages(rows: int, kv_heads: int, slots: int, unit: int = PAGE) -> PageLists:
    """Half of the units, other ones in each row and kv head; the first of all has none."""
    width = -(-slots // PAGE) * (PAGE // unit)
    made = torch.Generator().manual_seed(3)
    chosen = torch.rand(rows, kv_heads, width, generator=made).argsort(-1)
    count = 1 + (torch.arange(rows * kv_heads).view(rows, kv_heads) % ((width + 1) // 2))
    count[0, 0] = 0
    used = torch.arange(width) < count[..., None]
    return PageLists(torch.where(used, chosen, width - 1).sort(-1).values, count, unit)


def mask_of(query, key, pages: PageLists | None):
    """bool [B, 6, Q, S]: what 3 q heads to a kv head read."""
    mask = readable(query, key, 6)
    return mask if pages is None else mask & paged(pages, key.shape[1], 3)


@pytest.mark.parametrize("extras", ["plain", "softcap", "sink_logits", "wide_values"])
@pytest.mark.parametrize(("queries", "group"), [(1, 3), (3, 7), (16, 8)])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_every_key_matches_plain_attention(decode, queries, group, extras, dtype):
    q, k, v, query, key, logits = step(queries, [200, 9], extras, group, dtype)
    out = decode(q, k, v, query, length=used(key), **logits)
    assert out.dtype == dtype
    assert close(out, truth(q, k, v, readable(query, key, 2 * group), **logits))


@pytest.mark.parametrize(("queries", "group"), [(1, 1), (3, 4), (16, 3)])
@pytest.mark.parametrize("below", [0, 100])
@pytest.mark.parametrize("band", [Band(5, 40, 6554), Band(0, 40, chunked=True)], ids=repr)
def test_a_ring_matches_plain_attention(decode, queries, group, below, band):
    """The window counts from each query's own position; a short row reads all that is held."""
    q, k, v, query, key, logits = step(queries, [190, 90], "plain", group)
    sink, size, length = band.sink, 77, used(key)
    key, slots = ring_positions(length, torch.full((2,), sink), sink, size), sink + size
    at = key.clamp(min=0)[:, None, :, None]
    k, v = (t.gather(2, at.expand_as(t[:, :, :slots])) for t in (k, v))
    k, v = (t.masked_fill((key < 0)[:, None, :, None], torch.nan) for t in (k, v))
    window = (key[:, None] < sink) | (key[:, None] >= band.start(query)[..., None])
    kept = (window | (length < below)[:, None, None])[:, None]
    ring = {"band": band, "size": size, "below": below}
    out = decode(q, k, v, query, length=length, **ring, scale=logits["scale"])
    assert close(out, truth(q, k, v, readable(query, key, 2 * group) & kept, **logits))


@pytest.mark.parametrize("extras", ["plain", "softcap", "sink_logits"])
@pytest.mark.parametrize(("queries", "unit"), [(1, 64), (3, 64), (1, 1), (3, 8), (1, 32)])
def test_listed_pages_match_plain_attention(decode, queries, unit, extras):
    q, k, v, query, key, logits = step(queries, [517, 70], extras)
    pages = some_pages(2, 2, 517, unit)
    mask = readable(query, key, 6) & paged(pages, 517, 3)
    out = decode(q, k, v, query, pages, length=used(key), **logits)
    assert close(out, truth(q, k, v, mask, **logits))


@pytest.mark.parametrize("unit", [None, 64, 16])
@pytest.mark.parametrize("band", [None, Band(5, 40)], ids=["whole", "band"])
def test_rows_in_pages_of_a_pool_match_the_same_rows_by_themselves(decode, band, unit):
    """Both by the kernel and by the reference; no page lies where its number says."""
    q, k, v, query, key, logits = step(1, [300, 70], "plain")
    empty = torch.zeros_like(q[:1]), *(torch.full_like(t[:1], torch.nan) for t in (k, v))
    q, k, v = (torch.cat(pair) for pair in zip((q, k, v), empty, strict=True))
    query, key = (torch.cat([t, torch.full_like(t[:1], -1)]) for t in (query, key))
    pages = None if unit is None else some_pages(3, 2, 300, unit)
    mask = mask_of(query, key, pages)
    if band is not None:
        start = band.start(query)[..., None]
        mask = mask & ((key[:, None] < band.sink) | (key[:, None] >= start))[:, None]
    want = truth(q, k, v, mask, **logits)
    table = torch.randperm(20, generator=torch.Generator().manual_seed(1))[:15].view(3, 5)
    pool = [torch.full((1, 20 * PAGE, 2, t.shape[3]), torch.nan) for t in (k, v)]
    for held, t in zip(pool, (k, v), strict=True):
        for row in range(3):
            for page in range(5):
                part = t[row, :, page * PAGE : (page + 1) * PAGE].transpose(0, 1)
                held[0, table[row, page] * PAGE :][: len(part)] = part
    given = {"query_pos": query, "pages": pages, "length": used(key), **logits}
    given |= {"pool": table, "band": Band() if band is None else band}
    assert close(stores.decode_by_store(q, *(t.transpose(1, 2) for t in pool), **given), want)
    out = decode(q, *(t.transpose(1, 2) for t in pool), **given)
    assert close(out, want)
    assert close(stores.decode_by_store(q, *(t.transpose(1, 2) for t in pool), **given), want)


@pytest.mark.parametrize(("dim", "value_dim"), [(80, 80), (96, 64), (128, 128), (512, 512)])
def test_every_head_dim_matches_plain_attention(decode, dim, value_dim):
    it = batch(130, group=3, rows="equal")
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(*t.shape[:3], dim, generator=made) for t in (it.q[:, :, :2], it.k))
    v = torch.randn(*it.v.shape[:3], value_dim, generator=made)
    if dim == 512:  # of float32 too wide for any GPU
        q, k, v = q.half(), k.half(), v.half()
    key = torch.arange(130).expand(len(q), -1)
    query = key[:, -2:]
    length = torch.full((len(q),), 130)
    out = decode(q, k, v, query, length=length, scale=dim**-0.5)
    assert close(out, truth(q, k, v, readable(query, key, q.shape[1]), dim**-0.5))


@pytest.mark.parametrize("listed", [0, PAGE, 16], ids=["all", "pages", "units"])
@pytest.mark.parametrize("queries", [1, 3])
def test_room_for_more_changes_no_bit(decode, queries, listed):
    """A cache's capacity, and dead slots past the row's end, decide nothing."""
    q, k, v, query, key, logits = step(queries, [300, 200], "plain")
    pages = some_pages(2, 2, 300, listed) if listed else None
    out = decode(q, k, v, query, pages, length=used(key), **logits)
    assert close(out, truth(q, k, v, mask_of(query, key, pages), **logits))
    for more in (1, 20, 500):
        roomy = [pad(t, (0, 0, 0, more), value=torch.nan) for t in (k, v)]
        assert torch.equal(decode(q, *roomy, query, pages, length=used(key), **logits), out)


def test_a_row_without_keys_gives_zeros(decode):
    q, k, v, query, key, logits = step(2, [50, 1], "plain")
    query[1], key[1] = -1, -1
    out = decode(q, k, v, query, length=used(key), scale=logits["scale"])
    assert not out[1].any()
    assert out[0].all()


@pytest.mark.parametrize("units", [2, 10, 1000])
def test_any_number_of_shares_gives_the_same(units):
    """Of so many, too, that they are merged in several goes."""
    few = {"triton__decode__MERGED": (16, 128, 8192)}
    with interpreter(triton__decode__UNITS=units, **few) as run:
        assert run("triton.decode.splits_of", 4, "cpu") == min(units // 2, 64)
        for dtype, extras in itertools.product((SINGLE, HALF), ("plain", "sink_logits", "softcap")):
            q, k, v, query, key, logits = step(3, [517, 200], extras, dtype=dtype)
            more = {"length": used(key), **logits}
            out = run("tests.kernels.stores.decode", q, k, v, query, **more)
            assert out.dtype == dtype
            expected = truth(q, k, v, readable(query, key, 6), **logits)
            assert close(out, expected), (dtype, extras)


def test_queries_in_any_layout_give_the_same(decode):
    q, k, v, query, key, logits = step(2, [200, 90], "plain")
    args = {"length": used(key), **logits}
    out = decode(q, k, v, query, **args)
    for turned in (q.transpose(1, 2).contiguous().transpose(1, 2), q.mT.contiguous().mT):
        assert torch.equal(decode(turned, k, v, query, **args), out)


def test_a_new_length_compiles_nothing(monkeypatch):
    triton_decode = pytest.importorskip("hfsparse.kernels.triton.decode", exc_type=ImportError)
    seen = watch(monkeypatch, triton_decode)
    found = []
    for lengths in ([40, 9], [517, 1], [200, 190]):
        q, k, v, query, key, logits = step(1, lengths, "plain", group=4)
        args = {"length": used(key), **logits}
        stores.decode(q, k, v, query, **args)
        stores.decode(q, k, v, query, band=Band(4, 9), size=k.shape[2] - 4, **args)
        for unit in (PAGE, 8):
            stores.decode(q, k, v, query, some_pages(2, 2, k.shape[2], unit), **args)
        found.append(set(seen))
    assert len(found[0]) == 5  # over all, a ring, pages and units, and what merges each
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("units", [2, 10])
def test_a_new_length_launches_the_same(monkeypatch, units):
    """What a CUDA graph holds on to: grids, compiled forms and numbers; lengths it reads."""
    triton_decode = pytest.importorskip("hfsparse.kernels.triton.decode", exc_type=ImportError)
    monkeypatch.setattr(triton_decode, "splits_of", triton_decode.splits_of.__wrapped__)
    monkeypatch.setattr(triton_decode, "UNITS", units)
    calls = launched(monkeypatch, triton_decode)
    q, (k, v) = torch.zeros(2, 8, 1, 64), torch.zeros(2, 2, 2, 1000, 64)
    pages = some_pages(2, 2, 1000)
    found = []
    for lengths in ([1, 0], [1000, 77]):
        length = torch.tensor(lengths)
        for chosen in (None, pages):
            query = length[:, None] - 1
            stores.decode(q, k, v, query, chosen, length=length, scale=1.0)
        found.append(list(calls))
        calls.clear()
    assert len(found[0]) == (2 if units == 2 else 4)  # one share needs no merging
    assert found[0] == found[1]


def test_what_it_cannot_do_is_said():
    why_not = pytest.importorskip("hfsparse.kernels.triton.decode", exc_type=ImportError).why_not
    need = partial(kernels.Need, torch.device("cpu"))
    assert "float64" in why_not(need(torch.float64, 64, 64))
    assert "head dim 640" in why_not(need(HALF, 640, 64))
    assert "no gradients" in why_not(need(HALF, 64, 64, grad=True))
    assert why_not(need(HALF, 64, 64, lists=True, logits=True)) is None


@pytest.mark.parametrize("room", [64 << 10, 99 << 10, 163 << 10, 227 << 10])
def test_a_small_gpu_refuses_what_it_cannot_hold(monkeypatch, room):
    triton_decode = pytest.importorskip("hfsparse.kernels.triton.decode", exc_type=ImportError)
    monkeypatch.setattr(triton_decode, "shared_memory", lambda device: room)
    monkeypatch.setattr(triton_decode, "tile_of", triton_decode.tile_of.__wrapped__)
    for dtype, dim in itertools.product((HALF, SINGLE), (64, 128, 256)):
        why = triton_decode.why_not(kernels.Need(torch.device("cuda"), dtype, dim, dim))
        for queries in (1, 12, 128):
            tile = triton_decode.tile_of(queries, dim, dtype.itemsize, "cuda")
            assert (tile is None) == ("too wide" in (why or ""))
        if dtype == HALF:  # seen when compiled for sm_80 to sm_90: at most 43 KiB at one stage
            assert why is None


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_on_a_gpu_it_is_taken_before_every_other_kernel(monkeypatch, lists, logits):
    triton_decode = pytest.importorskip("hfsparse.kernels.triton.decode", exc_type=ImportError)
    monkeypatch.setattr(triton_decode, "tile_of", lambda *args: (16, 3, 4))
    need = kernels.Need(torch.device("cuda"), HALF, 128, 128, lists=lists, logits=logits)
    assert kernels.pick.__wrapped__(kernels.DECODE, need).name == "Triton"
