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
from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.packed import Packed
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
        span: tuple[int, int] | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        ratio, plain, out = q.shape[1] // len(places.cells), softcap is None and s_aux is None, None
        for part, lists in zip(places.parts, pages, strict=True):
            heads = q_heads_of(part.heads, ratio)
            own = places.at(heads, q.device)
            more = {"scale": scale}
            if not plain:
                more |= {"softcap": softcap, "s_aux": None if s_aux is None else s_aux[own]}
            for short, _, rows in group_rows([n < part.below for n in new.lengths.rows], q.device):
                listed = None if short else lists
                easy = plain and lse is None and listed is None and (short or not part.narrow)
                run = whole if easy and whole is not None else one
                if lse is not None:
                    batch = len(q) if rows is None else len(rows)
                    more["lse"] = sums = lse.new_empty(batch, len(heads), q.shape[2])
                what = run, part, rows, q[:, own], new, more, span
                if part.pool is not None:
                    kv = places.at(part.heads, q.device)
                    made = _read_pool(*what[:-1], kv, listed, short)
                else:
                    made = _read_ring(*what, short) if part.size else _read_full(*what, listed)
                if lse is not None:
                    put_rows(lse, rows, own, sums)
                if rows is None and len(heads) == q.shape[1]:
                    return made
                out = q.new_empty(*q.shape[:3], places.v.shape[3]) if out is None else out
                put_rows(out, rows, own, made)
        return out

    return decode


def _read_ring(run, part: Place, rows, q, new: NewTokens, more, span, short: bool) -> Tensor:
    """Attention over sink and window; short rows: over all that the ring holds."""
    slots = part.k.shape[2] if part.packed is None else part.packed.slots
    held, k, v = new.ring(slots - part.size, part.size), part.k, part.v
    if part.packed is not None:
        k, v = part.packed.read(new.length, held)
    if span is not None:
        held = torch.where((held >= span[0]) & (held < span[1]), held, -1)
    q, k, v, *at = take_rows(rows, q, k, v, new.query_pos, held, new.length)
    if not short:
        (start,) = take_rows(rows, new.start(part.band))
        more = {**more, "start": start, "sink": part.band.sink}
    query_pos, held, length = at
    return run(q, k, v, query_pos, held, length=length, **more)


def _read_full(run, part: Place, rows, q, new: NewTokens, more, span, listed) -> Tensor:
    """Attention over all keys that are held, or over the pages that are listed."""
    if part.hot is not None:
        return _read_hot(run, part, q, new, more, listed)
    if part.packed is not None:
        return _read_packed(run, part.packed.of(rows), rows, q, new, more, listed)
    k, v = part.k[:, :, : new.longest], part.v[:, :, : new.longest]
    query_pos, length, dropped = new.query_pos, new.length, part.dropped
    if span is not None:  # it reads as a row that lacks what comes before
        low, high = span
        k, v, dropped = k[:, :, low:high], v[:, :, low:high], torch.full_like(length, low)
        listed = None if listed is None else listed.within(low, high)
    if dropped is not None:
        length = length - dropped
        query_pos = torch.where(query_pos < 0, -1, query_pos - dropped[:, None])
    q, k, v, query_pos, length = take_rows(rows, q, k, v, query_pos, length)
    if listed is None:
        return run(q, k, v, query_pos, None, length=length, **more)
    chosen, count = take_rows(rows, listed.pages, listed.count)
    listed = replace(listed, pages=chosen, count=count)
    return run(q, k, v, query_pos, None, listed, length=length, **more)


def _read_pool(run, part: Place, rows, q, new: NewTokens, more, kv, listed, short) -> Tensor:
    """Attention over rows that lie in the pages of a pool, all or some of which are listed, by the
    kv heads of an index; of a band over what it holds, but in short rows."""
    if part.narrow and not short:
        (start,) = take_rows(rows, new.start(part.band))
        more = {**more, "start": start, "sink": part.band.sink}
    k, v = (whole_rows(t, part.pool, new.longest)[:, kv] for t in (part.k, part.v))
    held = part._replace(k=k, v=v, pool=None)
    return _read_full(run, held, rows, q, new, more, None, listed)


def whole_rows(t: Tensor, pool: Tensor, tokens: int | None) -> Tensor:
    """Keys or values `[B, H, S, D]` of the first so many tokens (None: of every page) of rows whose
    pages `pool` [B, P] names in t `[1, H, N, D]`."""
    token = torch.arange(PAGE, device=t.device)
    at = (pool.long()[..., None] * PAGE + token).flatten(1)[:, :tokens]  # [B, S]
    return t[0, :, at].transpose(0, 1)


def _read_packed(run, packed: Packed, rows, q, new: NewTokens, more, listed) -> Tensor:
    """The same of packed pages: of lists only what they name is unpacked, head by head."""
    q, query_pos, length = take_rows(rows, q, new.query_pos, new.length)
    if listed is None:
        packed = packed.first(new.longest)
        k, v = packed.read(length, torch.arange(packed.slots, device=q.device)[None])
        return run(q, k, v, query_pos, None, length=length, **more)
    chosen, count = take_rows(rows, listed.pages, listed.count)
    listed = replace(listed, pages=chosen, count=count)
    return _read_named(run, packed.choose, q, query_pos, length, more, listed)


def _read_hot(run, part: Place, q, new: NewTokens, more, listed: PageLists) -> Tensor:
    """Attention over units that lie in the hot set, or among the newest pages, where listed."""
    row, unit = torch.arange(len(q), device=q.device)[:, None], listed.unit
    if part.packed is not None:  # units are pages
        lies = listed.lies.repeat_interleave(unit, 2)

        def unpacked(head: int, *at: Tensor) -> tuple[Tensor, ...]:
            return part.packed.choose(head, *at, lies[:, head])

        return _read_named(run, unpacked, q, new.query_pos, new.length, more, listed)
    lies = (listed.lies[..., None] * unit + torch.arange(unit, device=q.device)).flatten(2)

    def choose(head: int, *at: Tensor) -> tuple[Tensor, ...]:
        return tuple(t[row, head, lies[:, head]][:, None] for t in (part.k, part.v))

    return _read_named(run, choose, q, new.query_pos, new.length, more, listed)


def _read_named(run, choose, q, query_pos, length, more, listed: PageLists) -> Tensor:
    """Attention over listed units, head by head: `choose(head, at, length)` gives the keys and
    values at positions `at` [B, n]."""
    token = torch.arange(listed.unit, device=q.device)
    group, made = q.shape[1] // listed.pages.shape[1], []
    for head in range(listed.pages.shape[1]):
        at = (listed.pages[:, head, :, None] * listed.unit + token).flatten(1)
        k, v = choose(head, at, length)
        named = torch.arange(listed.pages.shape[2], device=q.device) < listed.count[:, head, None]
        held = named.repeat_interleave(listed.unit, 1) & (at < length[:, None])
        own = slice(head * group, (head + 1) * group)
        parts = (("s_aux", own), ("lse", (slice(None), own)))
        given = more | {x: more[x][part] for x, part in parts if more.get(x) is not None}
        slots = torch.full_like(length, at.shape[1])
        at = torch.where(held, at, -1)
        made.append(run(q[:, own], k, v, query_pos, at, length=slots, **given))
    return torch.cat(made, 1)
