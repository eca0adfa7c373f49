"""The decode kernels, asked for heads of one store: where these lie is written for each call."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from hfsparse import kernels
from hfsparse.kernels.positions import NewTokens
from hfsparse.lists import FULL, Band, PageLists, places
from hfsparse.lists.lengths import Lengths


def one(k: Tensor, v: Tensor, *args, **more):
    """Places of heads that all lie in k and v, in order; args and more: as `Place` has them."""
    return places.Table().places([places.Place(tuple(range(k.shape[1])), k, v, *args, **more)])


def decode(
    q: Tensor, k: Tensor, v: Tensor, query_pos: Tensor, pages: PageLists | None = None, **more
) -> Tensor:
    """`triton.decode.decode`; more: band, size and below of a ring, and the kernel's own.

    rank: of latents, whose values are the first dims of k. pool: where rows lie in k and v.
    """
    from hfsparse.kernels.triton import decode as triton_decode

    names = "band", "size", "below", "pool"
    ring = {name: more.pop(name) for name in names if name in more}
    rank = more.pop("rank", 0)
    k = k if "pool" in ring else k.contiguous()
    v = k[..., :rank] if rank else v if "pool" in ring else v.contiguous()
    ring["listed"] = pages is not None
    return triton_decode.decode(q, one(k, v, **ring), query_pos, pages, **more)


def decode_by_store(q, k, v, query_pos, pages, length, band, pool, **more) -> Tensor:
    """The reference of DECODE over rows that lie in a pool."""
    held = one(k, v, band=band, pool=pool, listed=pages is not None)
    rows = length.tolist()
    new = NewTokens(Lengths([max(n - 1, 0) for n in rows], [1] * len(rows), 1), length, query_pos)
    return kernels.DECODE[-1].run(q, held, new, [pages], **more)


def append(
    *, k, v, into_k, query_pos, into_v=None, sink=0, size=0, low=None, high=None, prompt=False
) -> None:
    """`triton.append.append`; without `into_v` values are the first dims of keys."""
    from hfsparse.kernels.triton import append as triton_append

    into_v = into_k[..., : v.shape[3]] if into_v is None else into_v
    into = one(into_k, into_v, Band(sink) if size else FULL, size, low=low, high=high)
    triton_append.append(k, v, into, query_pos, prompt)


def append_store(*, store, k: Tensor, v: Tensor, query_pos: Tensor) -> None:
    """A step's tokens into a store of a cache's layer, as the tables have Triton do it."""
    into = places.Table().places([store.place()])
    kernels.APPEND[0].run(k, v, into, SimpleNamespace(query_pos=query_pos, prompt=False))
