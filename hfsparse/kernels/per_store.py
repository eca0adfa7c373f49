"""A decode step in PyTorch, a store of the layer's cache after another: the truth of those kernels
that serve all stores at once.

Lengths of rows come from the host, so that such a step can't be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hfsparse.kernels.positions import NewTokens
from hfsparse.kernels.rows import group_rows, put_rows, q_heads_of, take_rows
from hfsparse.lists import PageLists
from hfsparse.lists.places import Place, Places


def append(k: Tensor, v: Tensor, into: Places, new: NewTokens) -> None:
    """Each store takes the tokens of its own heads."""
    for part in into.parts:
        at = into.at(part.heads, k.device)
        part.append(k[:, at], v[:, at], new.lengths)


def by_store(one: Callable[..., Tensor], whole: Callable[..., Tensor] | None = None) -> Callable:
    """A kernel of all stores, made of `one` that reads a single one as `reference.decode` does.

    whole: reads in its place where every key is read, and logits are plain.
    """

    def decode(
        q: Tensor,
        places: Places,
        new: NewTokens,
        pages: Sequence[PageLists | None],
        *,
        scale: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ratio, plain, out = q.shape[1] // len(places.cells), softcap is None and s_aux is None, None
        weight = q.new_empty(q.shape[:3], dtype=torch.float32) if lse else None
        for part, lists in zip(places.parts, pages, strict=True):
            heads = q_heads_of(part.heads, ratio)
            own = places.at(heads, q.device)
            more = {"scale": scale}
            if lse:
                more["lse"] = True
            if not plain:
                more |= {"softcap": softcap, "s_aux": None if s_aux is None else s_aux[own]}
            for short, _, rows in group_rows([n < part.below for n in new.lengths.rows], q.device):
                listed = None if short else lists
                easy = plain and listed is None and (short or not part.size) and not lse
                run = whole if easy and whole is not None else one
                what = run, part, rows, q[:, own], new, more
                made = _read_ring(*what, short) if part.size else _read_full(*what, listed)
                if rows is None and len(heads) == q.shape[1]:
                    return made
                if lse:
                    made, own_weight = made
                    put_rows(weight, rows, own, own_weight)
                out = q.new_empty(*q.shape[:3], places.v.shape[3]) if out is None else out
                put_rows(out, rows, own, made)
        return (out, weight) if lse else out

    return decode


def _read_ring(run, part: Place, rows, q, new: NewTokens, more, short: bool) -> Tensor:
    """Attention over sink and window; short rows: over all that the ring holds."""
    held = new.ring(part.band.sink, part.size)
    q, k, v, *at = take_rows(rows, q, part.k, part.v, new.query_pos, held, new.length)
    if not short:
        (start,) = take_rows(rows, new.start(part.band))
        more = {**more, "start": start, "sink": part.band.sink}
    query_pos, held, length = at
    return run(q, k, v, query_pos, held, length=length, **more)


def _read_full(run, part: Place, rows, q, new: NewTokens, more, listed) -> Tensor:
    """Attention over all keys that are held, or over the pages that are listed."""
    k, v = part.k[:, :, : new.longest], part.v[:, :, : new.longest]
    query_pos, length = new.query_pos, new.length
    if part.dropped is not None:
        length = length - part.dropped
        query_pos = torch.where(query_pos < 0, -1, query_pos - part.dropped[:, None])
    q, k, v, query_pos, length = take_rows(rows, q, k, v, query_pos, length)
    if listed is None:
        return run(q, k, v, query_pos, None, length=length, **more)
    chosen, count = take_rows(rows, listed.pages, listed.count)
    listed = replace(listed, pages=chosen, count=count)
    return run(q, k, v, query_pos, None, listed, length=length, **more)
