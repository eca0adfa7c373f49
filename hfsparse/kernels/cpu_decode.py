"""A decode step on a CPU, by PyTorch's own flash kernel: fast `reference.decode` of each store.

A step's time is that of its operations, not of its numbers. So keys are read where they lie, or
gathered where pages are listed; q heads that share a kv head are one head's queries; masks are made
once for all layers, and where every key is read by one query there is none. Rows of one length are
read together, others one after another, none further than it is long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfsparse.kernels import cpu_flash
from hfsparse.kernels.cpu_flash import additive, flash
from hfsparse.kernels.need import Need
from hfsparse.kernels.positions import NewTokens
from hfsparse.kernels.rows import q_heads_of
from hfsparse.lists import Band, PageLists
from hfsparse.lists.places import Place, Places


def why_not(need: Need) -> str | None:
    """Why it can't serve, if it can't."""
    if why := cpu_flash.why_not(need):
        return why
    if need.head_dim != need.value_dim:
        return f"head dim {need.head_dim}, value dim {need.value_dim}: both must be the same"
    if need.packed or need.hosted or need.pooled:
        return "keys in fewer bits, in host memory and in a pool are read by the reference"
    return "no LSE, by which parts of a row are merged" if need.lse else None


def decode(
    q: Tensor,
    places: Places,
    new: NewTokens,
    pages: Sequence[PageLists | None],
    *,
    scale: float,
    softcap: None = None,
    s_aux: None = None,
    span: None = None,
    lse: None = None,
) -> Tensor:
    """Attention `[B, Hq, Q, D]`, arguments as `hfsparse.kernels.table` has them of DECODE."""
    ratio, runs = q.shape[1] // len(places.cells), new.once(_runs)
    out = None
    for part, lists in zip(places.parts, pages, strict=True):
        own = places.at(q_heads_of(part.heads, ratio), q.device)
        apart = runs if part.dropped is None else _shorter(new, part.dropped)
        for rows, past, n in apart:
            if not n:
                continue
            found = _read(q[rows, own, :n], part, lists, new, rows, past + n, scale)
            if len(found) == len(q) and found.shape[1:3] == q.shape[1:3]:
                return found
            if out is None:
                out = torch.zeros_like(q)
            out[rows, own, :n] = found
    return torch.zeros_like(q) if out is None else out


def _runs(new: NewTokens) -> list[tuple[slice, int, int]]:
    """As `Lengths.runs`, of rows that side by side are as long and have queries."""
    lengths, alive = new.lengths, (new.length > 0).tolist()
    if all(alive):
        return lengths.runs
    found: list[tuple[slice, int, int]] = []
    for b, of in enumerate(zip(lengths.past, lengths.new, strict=True)):
        if not alive[b]:
            continue
        begin = b
        if found and found[-1][0].stop == b and found[-1][1:] == of:
            begin = found.pop()[0].start
        found.append((slice(begin, b + 1), *of))
    return found


def _shorter(new: NewTokens, dropped: Tensor) -> list[tuple[slice, int, int]]:
    """As `_runs`, of rows without the keys that each has lost."""
    lost, apart = dropped.tolist(), []
    for rows, past, n in new.once(_runs):
        apart += [(slice(b, b + 1), past - lost[b], n) for b in range(*rows.indices(len(lost)))]
    return apart


def _read(
    q: Tensor,
    part: Place,
    lists: PageLists | None,
    new: NewTokens,
    rows: slice,
    length: int,
    scale: float,
) -> Tensor:
    """Attention of q `[b, heads, n, D]`, the last queries of rows of one length."""
    b, heads, n, D = q.shape
    H = len(part.heads)
    first, ratio = rows.start or 0, heads // H
    short = new.lengths.rows[first] < part.below
    nothing = None
    if lists is not None and not short:
        k, v, mask, nothing = _gather(part, lists, new, rows, length, n, ratio)
    else:
        k, v = _first(part, rows, length)
        if part.size:
            band = None if short else part.band
            mask = new.once(_ring_mask, part.band.sink, part.size, band, first, n, ratio)
        else:
            mask = new.once(_causal_mask, length, n, ratio)
    out, _ = flash(q.reshape(b, H, ratio * n, D), k, v, scale, mask)
    if nothing is not None:
        out = out.masked_fill(nothing, 0)
    return out.reshape(b, heads, n, D)


def _first(part: Place, rows: slice, slots: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first slots, or as many as there are, of some rows."""
    slots = min(slots, part.k.shape[2])
    return part.k[rows, :, :slots], part.v[rows, :, :slots]


def _causal_mask(new: NewTokens, length: int, n: int, ratio: int) -> Tensor | None:
    """[ratio * n, length] of the last n queries of a row, of each q head in turn; None: they read
    every key."""
    if n == 1:
        return None
    kept = torch.ones(n, length, dtype=torch.bool, device="cpu").tril_(length - n)
    return additive(kept).repeat(ratio, 1)


def _ring_mask(
    new: NewTokens, sink: int, size: int, band: Band | None, row: int, n: int, ratio: int
) -> Tensor:
    """[ratio * n, slots] of the n queries of a row over a ring, as `_causal_mask`; band None: they
    read all that it holds."""
    held = new.ring(sink, size)[row, : new.lengths.rows[row]]
    query = new.query_pos[row, :n, None]
    kept = (held >= 0) & (held <= query)
    if band is not None:
        kept &= (held < sink) | (held >= new.start(band)[row, :n, None])
    return additive(kept).repeat(ratio, 1)


# -- listed pages --------------------------------------------------------------------------------


def _gather(
    part: Place,
    lists: PageLists,
    new: NewTokens,
    rows: slice,
    length: int,
    n: int,
    ratio: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys and values `[b, H, T, D]` of what some rows list, a mask over them, and which
    queries `[b, H, ratio * n, 1]` read none; None: all read all, all read some."""
    unit, counts = lists.unit, lists.count[rows]
    counted, total = counts.flatten().tolist(), -(-length // unit)
    most = max(*counted, 1)
    if min(counted) == total:
        return *_first(part, rows, length), new.once(_causal_mask, length, n, ratio), None
    listed = lists.pages[rows, :, :most]
    (b, H), slots = listed.shape[:2], part.k.shape[2]
    last = {*listed[..., -1].flatten().tolist()}
    if n == 1 and min(counted) == most and last == {total - 1}:
        # Whole units, the row's last one behind the others.
        at = (listed + new.once(_begins, rows.start or 0, b, H, slots // unit)).flatten()
        taken = (t.view(-1, unit * t.shape[3]).index_select(0, at) for t in (part.k, part.v))
        width = most * unit - -length % unit
        return *(t.view(b, H, most * unit, -1)[:, :, :width] for t in taken), None, None
    at = (listed[..., None] * unit + torch.arange(unit, device="cpu")).flatten(2)  # [b, H, T]
    used = torch.arange(most, device="cpu") < counts[..., None]
    query = torch.arange(length - n, length, device="cpu")[:, None]
    kept = used.repeat_interleave(unit, 2)[:, :, None] & (at[:, :, None] <= query)
    kept = kept.repeat(1, 1, ratio, 1)
    at = at.masked_fill(at >= length, 0)  # beyond the row there may be NaN
    at = (at + new.once(_begins, rows.start or 0, b, H, slots)).flatten()
    taken = (t.view(-1, t.shape[3]).index_select(0, at) for t in (part.k, part.v))
    return *(t.view(b, H, most * unit, -1) for t in taken), additive(kept), ~kept.any(3, True)


def _begins(new: NewTokens, first: int, rows: int, H: int, size: int) -> Tensor:
    """[rows, H, 1] where the slots of each head begin, from row `first` on, in buffers that have
    `size` of them a head."""
    head = torch.arange(first * H, (first + rows) * H, device="cpu")
    return (head * size).view(rows, H, 1)
