"""Attention over BlockLists on a CPU, by PyTorch's own flash kernel: fast `reference.prefill`.

A head that reads a band sees its window as overlapping views of the keys, a few queries to a view;
one that reads blocks or columns gathers them, of many query blocks at a time. What a head reads in
parts is joined by LSE. Bound by FLOPs; benchmarks/results/cpu_reference.md has its times.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.kernels import cpu_flash
from hfsparse.kernels.cpu_flash import NEVER, additive, flash
from hfsparse.kernels.need import Need
from hfsparse.lists import FULL, RATE_ONE, Band, BlockLists, HeadIndex, at_heads
from hfsparse.precision import without_autocast

ROWS = 64  # queries to a view of a band's window; more read more keys in vain
TILE = 1 << 20  # numbers in the largest temporary
# Tokens from which a head that gathers may take less than one that reads every key
# (benchmarks/results/cpu_reference.md); one that reads a band does at any length.
GATHERING_PAYS = 4096

Part = tuple[Tensor, Tensor]  # attention over some keys `[..., Q, D]`, and its LSE `[..., Q]`


def why_not(need: Need) -> str | None:
    """Why it can't serve, if it can't."""
    return cpu_flash.why_not(need) or ("no skip threshold" if need.skip else None)


@without_autocast
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    kv_heads: Tensor,
    *,
    scale: float,
    softcap: None = None,
    s_aux: None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention `[B, H, Sq, Dv]`, arguments as `reference.prefill` has them.

    Token by token in memory, heads side by side.
    """
    (B, H, Sq, _), asked, value_dim = q.shape, v.dtype, v.shape[-1]
    grid, wide, device = lists.grid, max(q.shape[-1], value_dim), q.device
    dtype = asked if q.dtype == k.dtype == asked else torch.float32
    # The kernel takes keys and values of one width.
    q, k, v = (_padded(t.to(dtype), (0, wide - t.shape[-1])) for t in (q, k, v))
    out = q.new_empty(B, Sq, H, wide).transpose(1, 2)
    if grid.padded:
        out.zero_()
    if lse is not None:
        lse.fill_(-torch.inf)
    kv, rest = kv_heads.tolist(), set(range(H))
    tokens = grid.offset.tolist(), grid.q_len.tolist()  # of each row: before its queries, and new
    for band, heads in _bands(lists):
        rest -= set(heads)
        for group in dict.fromkeys(kv[h] for h in heads):
            own = at_heads([h for h in heads if kv[h] == group], device)
            for b, (past, n) in enumerate(zip(*tokens, strict=True)):
                keys = (t[b : b + 1, group : group + 1, : past + n] for t in (k, v))
                queries = q[b : b + 1, own, :n]
                for at, (found, total) in _read_band(queries, *keys, band, past, scale):
                    out[b, own, at] = found[0].to(dtype)
                    if lse is not None:
                        lse[b, own, at] = total[0]
    if rest:
        order = sorted(rest)
        own = at_heads(order, device)
        given = q[:, own], k, v, lists.in_order(order, HeadIndex()), kv_heads[own]
        out[:, own], total = _read_lists(*given, scale)
        if lse is not None:
            lse[:, own] = total
    return out[..., :value_dim].to(asked)


def _join(part: Part, other: Part) -> Part:
    """Attention over the keys of both, in place of the first's."""
    weight = torch.sigmoid(other[1] - part[1])[..., None]
    return part[0].float().lerp_(other[0].float(), weight), torch.logaddexp(part[1], other[1])


def _padded(t: Tensor, by: tuple[int, ...]) -> Tensor:
    return pad(t, by) if any(by) else t  # else it would be copied


# -- bands ---------------------------------------------------------------------------------------


def _bands(lists: BlockLists) -> Iterator[tuple[Band, list[int]]]:
    """Bands that some heads read whole, and where these keys lie as they came."""
    window = lists.grid.window
    for band in dict.fromkeys(lists.bands):
        each = zip(lists.bands, lists.whole, strict=False)
        heads = [h for h, (own, whole) in enumerate(each) if own == band and whole]
        if not heads or lists.grid.key_first is not None:
            continue
        if window is None:
            yield band, heads
        elif not (band.sink or band.rate):
            yield Band(0, min(band.recent, window)), heads


def _read_band(
    q: Tensor, k: Tensor, v: Tensor, band: Band, past: int, scale: float
) -> Iterator[tuple[slice, Part]]:
    """Attention of q `[1, H, n, D]`, at positions from `past` on, over one kv head's k, v
    `[1, 1, S, D]`.

    Some queries at a time: which ones, and theirs.
    """
    n = q.shape[2]
    k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    done = bisect_right(range(past, past + n), band.sink, key=band.start)  # these see every key
    if done:
        yield slice(done), _read_all(q[:, :, :done], k, v, past, scale)
    while done < n:
        # The windows of ROWS queries after others are alike, unless they grow.
        few = min(ROWS, n - done) if band.rate else (n - done) % ROWS
        at, read = slice(done, done + few if few else n), _read_few if few else _read_windows
        yield at, read(q[:, :, at], k, v, band, past + done, scale)
        done = at.stop


def _read_all(q: Tensor, k: Tensor, v: Tensor, past: int, scale: float) -> Part:
    """Attention of q `[1, H, n, D]` over every key up to each."""
    end = past + q.shape[2]
    own = flash(q, k[:, :, past:end], v[:, :, past:end], scale, causal=True)
    return _join(own, flash(q, k[:, :, :past], v[:, :, :past], scale)) if past else own


def _read_few(q: Tensor, k: Tensor, v: Tensor, band: Band, first: int, scale: float) -> Part:
    """Attention of q `[1, H, n, D]`, at positions from `first` on, over sink and recent keys."""
    low, end = band.start(first), first + q.shape[2]
    near = (t[:, :, low:end] for t in (k, v))
    mask = pad(_window_mask(band, first, end), (band.sink, 0))
    if band.sink:
        near = (torch.cat([t[:, :, : band.sink], t[:, :, low:end]], 2) for t in (k, v))
    return flash(q, *near, scale, mask)


def _read_windows(q: Tensor, k: Tensor, v: Tensor, band: Band, first: int, scale: float) -> Part:
    """As `_read_few`, of a multiple of ROWS queries, and no key is copied."""
    end, low = first + ROWS, band.start(first)
    views = (t[0, :, low:].unfold(1, end - low, ROWS).mT.transpose(0, 1) for t in (k, v))
    rows = q[0].unflatten(1, (-1, ROWS)).transpose(0, 1)
    near = flash(rows, *(t[: len(rows)] for t in views), scale, _window_mask(band, first, end))
    near = tuple(t.transpose(0, 1).flatten(1, 2)[None] for t in near)
    if not band.sink:
        return near
    return _join(near, flash(q, k[:, :, : band.sink], v[:, :, : band.sink], scale))


def _window_mask(band: Band, first: int, end: int) -> Tensor:
    """[queries, keys] of queries from `first` on over the keys from the first one's window on."""
    query = torch.arange(first, end, device="cpu")[:, None]
    key = torch.arange(band.start(first), end, device="cpu")
    return additive((key <= query) & (key >= band.start(query)))


# -- blocks and columns --------------------------------------------------------------------------


def _read_lists(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, kv_heads: Tensor, scale: float
) -> Part:
    """Attention of q `[B, H, Sq, D]` over what any lists keep of k, v `[B, Hkv, S, D]`."""
    B, H, Sq, D = q.shape
    grid, block = lists.grid, lists.grid.block
    q = _padded(q, (0, 0, 0, grid.nq * block - Sq)).reshape(-1, 1, block, D)
    reader = _Reader(k, v, lists, kv_heads)
    out = torch.zeros_like(q)
    sums = q.new_full(q.shape[:3], NEVER, dtype=torch.float32)
    order, done = torch.argsort(reader.whole, descending=True), 0
    while done < len(order):  # query blocks that read much alike
        most = max(block, int(reader.whole[order[done]]))
        rows = order[done : done + max(1, TILE // (most * max(block, D)))]
        done += len(rows)
        parts = [flash(q[rows], *keys, scale, mask) for *keys, mask in reader.read(rows)]
        if parts:
            found = parts[0] if len(parts) == 1 else _join(*parts)
            out[rows], sums[rows] = found[0].to(out.dtype), found[1].float()
    out, sums = (t.view(B, H, -1, *t.shape[3:])[:, :, :Sq] for t in (out, sums))
    nothing = (sums < NEVER / 2) | (grid.query_pos() < 0)[:, None]
    if bool(nothing.any()):
        out, sums = out.masked_fill(nothing[..., None], 0), sums.masked_fill(nothing, -torch.inf)
    return out, sums


class _Reader:
    """Keys and values that query blocks read, and masks of them."""

    def __init__(self, k: Tensor, v: Tensor, lists: BlockLists, kv_heads: Tensor):
        grid = lists.grid
        B, H, nq, block = len(k), lists.heads, grid.nq, grid.block
        self.lists, self.slots, self.held = lists, grid.nk * block, grid.key_pos
        bands = [(band.sink, band.recent, band.rate) for band in lists.bands]
        self.bands = torch.tensor(bands, device="cpu")
        dead = (self.held < 0)[:, None, : k.shape[2], None]
        if bool(dead.any()):  # a mask would not hold their NaN back
            k, v = k.masked_fill(dead, 0), v.masked_fill(dead, 0)
        k, v = (_padded(t, (0, 0, 0, self.slots - t.shape[2])) for t in (k, v))
        self.k, self.v = (t.reshape(-1, t.shape[-1]) for t in (k, v))  # token by token
        row = torch.arange(B * H * nq, device="cpu")
        self.b, self.h, self.i = row // (H * nq), row // nq % H, row % nq  # of each query block
        self.row = (self.b * k.shape[1] + kv_heads[self.h]) * self.slots  # where its keys begin
        query = torch.arange(nq * block, device="cpu")
        self.at = grid.query_pos(query).view(B, nq, block)[self.b, self.i]
        self.whole = self._flat("full_count").long() * block  # keys that need no test of pairs
        if lists.columns is not None:
            self.columns, self.last = lists.columns.expand(B, -1, -1), grid.q_last[self.b, self.i]
            seen = lists.columns[:, :, None] <= grid.q_last[:, None, :, None]
            self.leading = seen.sum(-1).flatten()  # columns up to each block's end
            self.whole = self.whole + self.leading

    def _flat(self, name: str) -> Tensor:
        """A member of the lists `[B or 1, H, nq, ...]`, by query block."""
        held = getattr(self.lists, name)
        return held.expand(len(self.held), *held.shape[1:]).flatten(0, 2)

    def read(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Keys and values `[R, 1, n, D]`, and a mask, of what R query blocks read: first what they
        read whole, then what of each pair is asked."""
        grid = self.lists.grid
        whole, used = self._blocks("full", rows)
        tested, some = self._blocks("part", rows)
        pairs = self._pairs(rows, self.held[self.b[rows, None], tested], some, banded=True)
        if self.lists.columns is not None:
            some = int(self.leading[rows].max())
            column = self.columns[self.b[rows], self.h[rows], :some]
            free = ~self._flat("covered")[rows, :some] & (column <= self.last[rows, None])
            slot = column.clamp(max=self.slots - 1)
            near = free & (column > self.at[rows, :1])  # not every query of the block sees it
            near = free if grid.window is not None else near
            at = near.any(0)
            more = self._pairs(rows, column[:, at], near[:, at], banded=False)
            tested, pairs = torch.cat([tested, slot[:, at]], 1), torch.cat([pairs, more], 2)
            whole, used = torch.cat([whole, slot], 1), torch.cat([used, free & ~near], 1)
        if whole.shape[1]:
            mask = None if bool(used.all()) else additive(used)[:, None, None]
            yield *self._gather(rows, whole), mask
        if tested.shape[1]:
            yield *self._gather(rows, tested), additive(pairs)[:, None]

    def _blocks(self, kind: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Slots `[R, n]` of keys in the blocks of the full or the part lists, and which count."""
        block = self.lists.grid.block
        count = self._flat(f"{kind}_count")[rows]
        index = self._flat(f"{kind}_index")[rows, : int(count.max())].long()
        slots = (index[..., None] * block + torch.arange(block, device="cpu")).flatten(1)
        return slots, torch.arange(slots.shape[1], device="cpu") < block * count[:, None]

    def _pairs(self, rows: Tensor, key: Tensor, some: Tensor, banded: bool) -> Tensor:
        """bool [R, block, n]: some keys, by position `[R, n]`, that each query may read."""
        key, query = key[:, None], self.at[rows, :, None]
        kept = (key <= query) & (some & (key[:, 0] >= 0))[:, None]
        if self.lists.grid.window is not None:
            kept &= query - key < self.lists.grid.window
        if banded and any(band != FULL for band in self.lists.bands):
            sink, recent, rate = self.bands[self.h[rows]].T[..., None, None]
            kept &= (key < sink) | (key > query - recent - query * rate // RATE_ONE)
        return kept

    def _gather(self, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        at = (self.row[rows, None] + slots).flatten()
        return tuple(
            t.index_select(0, at).view(len(rows), 1, -1, t.shape[1]) for t in (self.k, self.v)
        )
