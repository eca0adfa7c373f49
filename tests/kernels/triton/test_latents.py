"""The Triton kernels over latents, whose values are the first dims of their keys; interpreted."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hfsparse import kernels
from hfsparse.kernels.positions import ring_positions
from hfsparse.lists import Band
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.ring import Ring
from hfsparse.selectors.quest import Quest
from tests.helpers import close, truth
from tests.kernels.interpreter import interpreter
from tests.kernels.test_reference import paged, readable
from tests.kernels.triton.test_decode import some_pages

SINGLE, HALF = torch.float32, torch.float16
RANK, ROPE = 24, 8


@pytest.fixture(scope="module")
def run():
    with interpreter() as run:
        yield run


@pytest.fixture
def decode(run):
    return partial(run, "tests.kernels.stores.decode")


def step(heads: int, queries: int, lengths=(200, 9), rank=RANK, rope=ROPE, dtype=SINGLE):
    """q of new tokens at the ends of rows, one head of latents; dead slots hold NaN."""
    made, S = torch.Generator().manual_seed(0), max(lengths)
    q = torch.randn(len(lengths), heads, queries, rank + rope, generator=made).to(dtype)
    k = torch.randn(len(lengths), 1, S, rank + rope, generator=made).to(dtype)
    length, slot = torch.tensor(lengths), torch.arange(S)
    key = torch.where(slot < length[:, None], slot, -1)
    k = k.masked_fill((key < 0)[:, None, :, None], torch.nan)
    query = (length[:, None] - queries + torch.arange(queries)).clamp(min=-1)
    return q, k, query, key, length, (rank + rope) ** -0.5


@pytest.mark.parametrize(("heads", "queries"), [(4, 1), (16, 1), (5, 16), (40, 2)])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_every_latent_matches_plain_attention(decode, heads, queries, dtype):
    q, k, query, key, length, scale = step(heads, queries, dtype=dtype)
    v = k[..., :RANK]
    out = decode(q, k, v, query, length=length, scale=scale, rank=RANK)
    assert out.dtype == dtype
    assert close(out, truth(q, k, v, readable(query, key, heads), scale))


@pytest.mark.parametrize(("rank", "rope"), [(32, 32), (64, 16), (80, 8), (512, 64)])
def test_every_width_matches_plain_attention(decode, rank, rope):
    q, k, query, key, length, scale = step(4, 1, (130, 64), rank, rope, HALF)
    v = k[..., :rank]
    out = decode(q, k, v, query, length=length, scale=scale, rank=rank)
    assert close(out, truth(q, k, v, readable(query, key, 4), scale))


@pytest.mark.parametrize("queries", [1, 3])
def test_listed_pages_match_plain_attention(decode, queries):
    q, k, query, key, length, scale = step(4, queries, (517, 70))
    pages, v = some_pages(2, 1, 517), k[..., :RANK]
    mask = readable(query, key, 4) & paged(pages, 517, 4)
    out = decode(q, k, v, query, pages, length=length, scale=scale, rank=RANK)
    assert close(out, truth(q, k, v, mask, scale))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("below", [0, 100])
def test_a_ring_matches_plain_attention(decode, queries, below):
    q, k, query, _, length, scale = step(4, queries, (190, 90))
    band, size = Band(sink=5, recent=40, rate=6554), 77
    key = ring_positions(length, torch.full((2,), 5), 5, size)
    k = k.gather(2, key.clamp(min=0)[:, None, :, None].expand(-1, -1, -1, k.shape[3]))
    k = k.masked_fill((key < 0)[:, None, :, None], torch.nan)
    window = (key[:, None] < 5) | (key[:, None] >= band.start(query)[..., None])
    kept = (window | (length < below)[:, None, None])[:, None]
    ring, v = {"band": band, "size": size, "below": below}, k[..., :RANK]
    out = decode(q, k, v, query, length=length, **ring, scale=scale, rank=RANK)
    assert close(out, truth(q, k, v, readable(query, key, 4) & kept, scale))


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("kind", ["full", "pages", "ring"])
def test_a_store_is_filled_as_its_own_append_does(run, kind, dtype):
    made, past = torch.Generator().manual_seed(0), [61, 130, 5]
    group = Group((0,), selector=Quest() if kind == "pages" else None, rank=RANK)
    store = Full(group, 300)
    ring = {}
    if kind == "ring":
        store = Ring(Group((0,), Band(4, 9), rank=RANK), 0)
    k = torch.randn(3, 1, 130, RANK + ROPE, generator=made).to(dtype)
    store.create(k, k[..., :RANK])
    store.append(k, k[..., :RANK], Lengths([0] * 3, past, 130))
    if kind == "ring":
        ring = {"sink": 4, "size": store.size}
    for new in ([1, 1, 1], [3, 0, 2], [16, 5, 16]):
        k = torch.randn(3, 1, max(new), RANK + ROPE, generator=made).to(dtype)
        lengths = Lengths(past, new, max(new))
        kept = [t.clone() for t in store.tensors()]
        store.append(k, k[..., :RANK], lengths)
        names = ("into_k", "low", "high")[: len(kept)]
        into = dict(zip(names, kept, strict=True))
        position = torch.tensor(past)[:, None] + torch.arange(max(new))
        position = torch.where(position < torch.tensor(lengths.rows)[:, None], position, -1)
        run("tests.kernels.stores.append", k=k, v=k[..., :RANK], query_pos=position, **into, **ring)
        for name, ours, theirs in zip(names, kept, store.tensors(), strict=True):
            live = slice(None) if name == "into_k" else slice(0, 2)
            assert torch.equal(ours[:, :, live].nan_to_num(), theirs[:, :, live].nan_to_num())
        past = lengths.rows


def test_what_it_cannot_do_is_said():
    why_not = pytest.importorskip("hfsparse.kernels.triton.decode", exc_type=ImportError).why_not
    need = partial(kernels.Need, torch.device("cpu"), latents=True, lists=True)
    assert why_not(need(HALF, 576, 512)) is None
    assert why_not(need(SINGLE, 576, 512)) is None
    assert "head dim 1088" in why_not(need(HALF, 1088, 1024))
    assert "no gradients" in why_not(need(HALF, 576, 512, grad=True))


def test_the_widest_tile_that_fits_is_taken(monkeypatch):
    module = pytest.importorskip("hfsparse.kernels.triton.decode", exc_type=ImportError)
    found = {}
    monkeypatch.setattr(module, "has_tensor_memory", lambda device: False)
    for room in (227, 163, 99, 64):
        monkeypatch.setattr(module, "shared_memory", lambda device, room=room: room << 10)
        tile = module.tile_of.__wrapped__
        found[room] = [tile(heads, 576, 2, "cuda", True) for heads in (16, 32, 128)]
    assert [tile[0] for tile in found[227]] == [16, 32, 64]
    assert [tile[0] for tile in found[163]] == [16, 32, 32]
    assert [tile[0] for tile in found[99]] == [16, 16, 16]
    assert found[64] == [None] * 3
    monkeypatch.setattr(module, "shared_memory", lambda device: 227 << 10)
    monkeypatch.setattr(module, "has_tensor_memory", lambda device: True)
    assert tile(128, 576, 2, "cuda", True)[0] == 32, "a page turned round has no room"
