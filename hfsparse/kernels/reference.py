"""Plain PyTorch attention over BlockLists (prefill) and PageLists (decode): every kernel's truth.

Exact over the keys the lists keep, float32 inside under any autocast, online softmax (Milakov and
Gimelshein, arXiv 1805.02867) in tiles of bounded size: no tensor of queries x keys is ever built.
Float32 products are as precise as PyTorch is told (`set_float32_matmul_precision`). Runs on any
device and under autograd. Bound by FLOPs; query blocks with lists of like length share a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.kernels.positions import positions
from hfsparse.lists import PAGE, RATE_ONE, BlockLists, PageLists
from hfsparse.precision import without_autocast

TILE = 1 << 19  # float32 numbers in the largest temporary: 2 MiB stay in a core's cache


class _Softmax:
    """Running maximum, sum and weighted values of R query tiles `[R, n, D]`."""

    def __init__(self, q: Tensor, value_dim: int, softcap: float | None):
        self.q, self.softcap = q, softcap
        self.top = q.new_full((*q.shape[:2], 1), -torch.inf)
        self.sum = q.new_zeros(*q.shape[:2], 1)
        self.out = q.new_zeros(*q.shape[:2], value_dim)

    def add(self, k: Tensor, v: Tensor, kept: Tensor | None, skip: _Skip | None = None) -> None:
        """Attend to more keys: k, v `[R, m, D]`, kept bool `[R, n or 1, m]` or None for all."""
        logits = self.q @ k.float().transpose(1, 2)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if kept is not None:
            logits = logits.masked_fill(~kept, -torch.inf)
        if skip is not None:
            logits = logits.masked_fill(~skip.worth(logits, self.top), -torch.inf)
        top = torch.maximum(self.top, logits.amax(-1, keepdim=True))
        base = top.masked_fill(top == -torch.inf, 0)  # rows that have seen nothing yet
        weight = torch.exp(logits - base)
        fade = torch.exp(self.top - base)
        self.sum = self.sum * fade + weight.sum(-1, keepdim=True)
        self.out = self.out * fade + weight @ v.float()
        self.top = top

    def result(self, sink: Tensor | None = None) -> Tensor:
        """Attention `[R, n, D]`, 0 where nothing is kept; `sink` `[R, n or 1, 1]`: a bare logit."""
        total = self.sum
        if sink is not None:
            base = torch.maximum(self.top, sink)
            total = total * torch.exp(self.top - base) + torch.exp(sink - base)
            return self.out * torch.exp(self.top - base) / total
        return self.out / total.masked_fill(total == 0, 1)

    def lse(self, sink: Tensor | None = None) -> Tensor:
        """The logarithm of the sum of weights `[R, n]`, the bare logit's too; -inf of none."""
        found = self.top + self.sum.log()
        return (found if sink is None else torch.logaddexp(found, sink))[..., 0]


class _Skip:
    """Which tiles of R query blocks are worth reading, and how many of each block's were."""

    def __init__(self, by: float, queries: int, alive: Tensor):
        self.by, self.queries, self.alive = by, queries, alive  # alive [R, n]: holds a query
        self.read = torch.zeros_like(alive[:, 0], dtype=torch.int64)

    def worth(self, logits: Tensor, top: Tensor) -> Tensor:
        """bool [R, n, 1] of the logits `[R, n, m]` of a tile a row, and the maxima before it."""
        high = logits.amax(-1, keepdim=True)
        worth = self.alive[..., None] & (high >= top - self.by) & (high > -torch.inf)
        worth = worth.unflatten(1, (-1, self.queries)).any(2)  # a tile is read as a whole
        self.read += worth.sum((1, 2))
        return worth.repeat_interleave(self.queries, 1)


@without_autocast
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    kv_heads: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    skip: float | None = None,
    skipped: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention `[B, H, Sq, Dv]` of q `[B, H, Sq, D]` over the kept keys of k, v `[B, Hkv, Sk, D]`.

    kv_heads [H]: the kv head that each q head reads. s_aux [H]: sink logits (gpt-oss).
    Queries past a row's end give zeros.

    skip: a tile adds nothing if in each of its rows the largest logit is more than that below the
    largest so far (skip-softmax; BLASST, arXiv 2512.12087). Tiles are a block by a block, or `tile`
    queries and keys; a query block reads its partial blocks first, then its full ones, then its
    columns, which are never skipped. skipped [H, 2] int64: tiles skipped and looked at are added.

    lse: the logarithms of the sums of weights come, too: `[B, H, Sq]` float32, -inf of none.
    """
    grid, block = lists.grid, lists.grid.block
    B, H, Sq, D = q.shape
    nq = grid.nq
    q = pad(q.float() * scale, (0, 0, 0, nq * block - Sq)).reshape(B * H * nq, block, D)
    work = _flat(lists, lists.full_count) + _flat(lists, lists.part_count)
    order = torch.argsort(work, descending=True, stable=True)
    reader = _Reader(k, v, lists, kv_heads, tile or (block, block))
    sinks = None if s_aux is None else s_aux.float().to(q.device)
    out = q.new_zeros(B * H * nq, block, v.shape[-1])
    weight = q.new_empty(B * H * nq, block) if lse else None
    done, per_block = 0, block * max(block, D, v.shape[-1])
    while done < len(order):
        heaviest = max(1, int(work[order[done]]))
        rows = order[done : done + max(1, TILE // (per_block * heaviest))]
        done += len(rows)
        state = _Softmax(q[rows], v.shape[-1], softcap)
        skipping = None if skip is None else _Skip(skip, reader.queries, reader.at[rows] >= 0)
        # Tile by tile where some are skipped.
        step = 1 if skip is not None else max(1, TILE // (per_block * len(rows)))
        reader.add_blocks(state, rows, step, skipping)
        if lists.columns is not None:
            reader.add_columns(state, rows)
        bare = None if sinks is None else sinks[reader.h[rows], None, None]
        out[rows] = state.result(bare)
        if lse:
            weight[rows] = state.lse(bare)
        if skipped is not None:
            seen = work[rows].long() * reader.pieces * (block // reader.queries)
            lost = torch.zeros_like(seen) if skip is None else seen - skipping.read
            skipped.index_add_(0, reader.h[rows], torch.stack([lost, seen], 1))
    out, dead = out.view(B, H, nq * block, -1)[:, :, :Sq], grid.query_pos()[:, None] < 0
    out = out.masked_fill(dead[..., None], 0).to(v.dtype)
    if not lse:
        return out
    return out, weight.view(B, H, -1)[..., :Sq].masked_fill(dead, -torch.inf)


def _flat(lists: BlockLists, t: Tensor) -> Tensor:
    """t `[B or 1, H, nq, ...]` with a row for each query block: `[B * H * nq, ...]`."""
    return t.expand(len(lists.grid.q_len), *t.shape[1:]).flatten(0, 2)


class _Reader:
    """What query blocks read: keys and values in tiles, and where queries and keys stand."""

    def __init__(self, k, v, lists: BlockLists, kv_heads: Tensor, tile: tuple[int, int]):
        grid, device = lists.grid, k.device
        B, H, nq, nk, block = len(k), lists.heads, grid.nq, grid.nk, grid.block
        self.lists, (self.queries, self.keys) = lists, tile
        self.pieces = block // self.keys  # of a key block, each a tile wide
        wide = (0, 0, 0, nk * block - k.shape[2])
        self.k, v = (pad(t, wide).unflatten(2, (-1, self.keys)) for t in (k, v))
        row = torch.arange(B * H * nq, device=device)
        self.b, self.h, self.i = row // (H * nq), row // nq % H, row % nq  # of each query block
        self.kv = kv_heads.to(device)[self.h]
        at = grid.query_pos(torch.arange(nq * block, device=device))
        self.at = at.view(B, nq, block)[self.b, self.i]
        self.held = grid.key_pos.view(B, nk * self.pieces, self.keys)
        self.v = v.masked_fill((self.held < 0)[:, None, ..., None], 0)  # 0 · NaN would be NaN
        self.sink, recent, rate = torch.tensor(
            [(band.sink, band.recent, band.rate) for band in lists.bands], device=device
        ).T[:, self.h]
        recent = recent[:, None] + self.at * rate[:, None] // RATE_ONE
        self.start = self.at - recent + 1  # as Band.start

    def add_blocks(self, state: _Softmax, rows: Tensor, step: int, skip: _Skip | None) -> None:
        """Blocks of which pairs are tested, then whole ones, some tiles at a time."""
        lists, pieces = self.lists, self.pieces
        for count, index, tested in (
            (lists.part_count, lists.part_index, True),
            (lists.full_count, lists.full_index, False),
        ):
            count = _flat(lists, count)[rows] * pieces
            width = int(count.max())
            index = _flat(lists, index)[rows, : -(-width // pieces), None].long() * pieces
            index = (index + torch.arange(pieces, device=index.device)).flatten(1)
            for j in range(0, width, step):
                tiles = index[:, j : j + step]
                used = torch.arange(j, j + tiles.shape[1], device=index.device) < count[:, None]
                kept = None
                if tested or not bool(used.all()):
                    kept = used.repeat_interleave(self.keys, 1)[:, None]
                if tested:
                    kept = kept & self.kept(rows, tiles)
                pick = (self.b[rows, None], self.kv[rows, None], tiles)
                state.add(self.k[pick].flatten(1, 2), self.v[pick].flatten(1, 2), kept, skip)

    def kept(self, rows: Tensor, tiles: Tensor) -> Tensor:
        """bool [R, block, m] of each pair of a query and a key in the tiles `[R, n]`."""
        key = self.held[self.b[rows, None], tiles].flatten(1)[:, None]
        query, first = self.at[rows, :, None], self.start[rows, :, None]
        kept = (key >= 0) & (key <= query)
        kept &= (key < self.sink[rows, None, None]) | (key >= first)
        if self.lists.grid.window is not None:
            kept &= query - key < self.lists.grid.window
        return kept

    def add_columns(self, state: _Softmax, rows: Tensor) -> None:
        """Gathered single keys, tiled over both columns and rows."""
        lists, b, h, i = self.lists, self.b[rows], self.h[rows], self.i[rows]
        columns, covered = (
            t.expand(len(lists.grid.q_len), *t.shape[1:]) for t in (lists.columns, lists.covered)
        )
        k, v, at = self.k, self.v, self.at[rows]
        total = int((columns[b, h] <= at.max()).sum(-1).max())
        step = max(1, TILE // (len(rows) * max(lists.grid.block, k.shape[-1], v.shape[-1])))
        for n in range(0, total, step):
            column = columns[b, h, n : min(n + step, total)]  # [R, m]
            key, query = column[:, None], at[..., None]
            kept = (key <= query) & ~covered[b, h, i, n : min(n + step, total)][:, None]
            if lists.grid.window is not None:
                kept &= query - key < lists.grid.window
            column = column.clamp(max=k.shape[2] * self.keys - 1)
            pick = (b[:, None], self.kv[rows, None], column // self.keys, column % self.keys)
            state.add(k[pick], v[pick], kept)


@without_autocast
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_pos: Tensor,
    key_pos: Tensor | None = None,
    pages: PageLists | None = None,
    *,
    length: Tensor,
    scale: float,
    start: Tensor | None = None,
    sink: int = 0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A few new queries q `[B, Hq, Q, D]` over a cache k, v `[B, Hkv, S, D]`: `[B, Hq, Q, Dv]`.

    query_pos [B, Q] and key_pos [B, S]: positions in the row, -1 in dead slots. length [B]: slots
    at or beyond it hold nothing either; key_pos=None: the others are their own positions. A key is
    read if it is not after the query, lies in a listed page (pages=None: all), and is among the
    first `sink` tokens or not before `start` [B, Q]. lse: as in `prefill`, `[B, Hq, Q]`.
    """
    B, Hq, Q, D = q.shape
    Hkv, S = k.shape[1:3]
    unit = PAGE if pages is None else pages.unit
    short = -S % PAGE
    k, v = (pad(t, (0, 0, 0, short)).unflatten(2, (-1, unit)).flatten(0, 1) for t in (k, v))
    held = pad(positions(key_pos, length, S), (0, short), value=-1).view(B, -1, unit)
    n, device = k.shape[1], q.device
    if pages is None:
        everything = torch.arange(n, device=device).expand(B, Hkv, -1)
        pages = PageLists(everything, torch.full((B, Hkv), n, device=device))
    group = Hq // Hkv
    tile = (q.float() * scale).reshape(B * Hkv, group * Q, D)
    state = _Softmax(tile, v.shape[-1], softcap)
    row = torch.arange(B * Hkv, device=device)[:, None]
    query = query_pos[:, None, None].expand(B, Hkv, group, Q).reshape(B * Hkv, -1, 1)
    if start is not None:
        start = start[:, None, None].expand(B, Hkv, group, Q).reshape(B * Hkv, -1, 1)
    listed, count = pages.pages.reshape(B * Hkv, -1), pages.count.reshape(B * Hkv, 1)
    step = max(1, TILE // (B * Hkv * unit * max(D, v.shape[-1], group * Q)))
    for j in range(0, listed.shape[1], step):
        page = listed[:, j : j + step]
        key = held[row // Hkv, page].flatten(1)[:, None]
        used = torch.arange(j, j + page.shape[1], device=device) < count
        kept = (key >= 0) & (key <= query) & used.repeat_interleave(unit, 1)[:, None]
        if start is not None:
            kept &= (key < sink) | (key >= start)
        values = v[row, page].flatten(1, 2).masked_fill_((key < 0).mT, 0)  # as in prefill
        state.add(k[row, page].flatten(1, 2), values, kept)
    bare = None
    if s_aux is not None:
        bare = s_aux.float().to(device).view(1, Hkv, group, 1).expand(B, -1, -1, Q)
        bare = bare.reshape(B * Hkv, -1, 1)
    out = state.result(bare).view(B, Hq, Q, -1).to(v.dtype)
    return (out, state.lse(bare).view(B, Hq, Q)) if lse else out
