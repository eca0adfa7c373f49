"""Which key blocks each query block reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.lists.grid import FAR, FULL, Band, Grid, HeadIndex, at_heads

EDGES = 8  # partial blocks of a query block, at most: its own, and where window and band begin


@dataclass(frozen=True)
class BlockLists:
    """Which key blocks each query block reads; H is a set of q heads, B may be 1 for all rows.

    Blocks in `full` are read whole; blocks in `part` are tested by causality, window, live slots
    and `bands`. `columns` are single keys read by every later query of the head, except where
    `covered` says that a kept block already holds them.
    """

    grid: Grid
    full_count: Tensor  # [B, H, nq] int32
    full_index: Tensor  # [B, H, nq, width] int32, ascending
    part_count: Tensor
    part_index: Tensor
    bands: tuple[Band, ...]  # one a head
    columns: Tensor | None = None  # [B, H, n] positions, ascending, FAR where there is none
    covered: Tensor | None = None  # [B, H, nq, n] bool
    cut: Tensor | None = None  # [B, H] query blocks that a pattern's max_share cut short
    whole: tuple[bool, ...] = ()  # heads that read all that their band keeps; (): not known

    @classmethod
    def of(
        cls,
        grid: Grid,
        heads: int,
        keep: Tensor | None = None,
        band: Band = FULL,
        columns: Tensor | None = None,
    ) -> BlockLists:
        """Lists from a block map `keep` [B, H, nq, nk] (all blocks), cut to the band's reach."""
        some, every = (m[:, None] for m in grid.reach(band))
        kept = some if keep is None else keep & some  # without a map, one list serves all heads
        wide = edges = grid.nk
        if grid.key_first is None:
            wide = sum(-(-tokens // grid.block) for tokens in (band.sink, band.span(grid.Sk))) + 2
            edges = EDGES
        lists = (*_ascending(kept & every, wide), *_ascending(kept & ~every, edges))
        lists = (t.expand(-1, heads, *t.shape[2:]) for t in lists)
        covered = None
        if columns is not None:
            home = (
                (columns // grid.block)
                .clamp(max=grid.nk - 1)[:, :, None]
                .expand(-1, -1, grid.nq, -1)
            )
            covered = kept.expand(len(columns), heads, -1, -1).gather(3, home)
        whole = (keep is None and columns is None,) * heads
        return cls(grid, *lists, (band,) * heads, columns, covered, whole=whole)

    @classmethod
    def cat(cls, parts: list[BlockLists]) -> BlockLists:
        """One set of lists for the heads of several, in order, over the same grid."""
        if len(parts) == 1:
            return parts[0]
        B = max(len(p.full_count) for p in parts)
        some = any(p.columns is not None for p in parts)
        if some:
            parts = [p if p.columns is not None else p._without_columns() for p in parts]
        cut = any(p.cut is not None for p in parts)
        if cut:
            parts = [p if p.cut is not None else p._without_cut() for p in parts]

        def join(name: str, fill: int | bool | None) -> Tensor:
            found = [getattr(p, name) for p in parts]
            found = [t.expand(B, *t.shape[1:]) for t in found]
            if fill is not None:
                width = max(t.shape[-1] for t in found)
                found = [pad(t, (0, width - t.shape[-1]), value=fill) for t in found]
            return torch.cat(found, 1)

        return cls(
            parts[0].grid,
            join("full_count", None),
            join("full_index", 0),
            join("part_count", None),
            join("part_index", 0),
            tuple(band for p in parts for band in p.bands),
            join("columns", FAR) if some else None,
            join("covered", True) if some else None,
            join("cut", None) if cut else None,
            tuple(whole for p in parts for whole in p.whole or (False,) * p.heads),
        )

    def in_order(self, order: Sequence[int], index: HeadIndex) -> BlockLists:
        """Those of some heads, or all: the head at `order[i]` as the i-th."""
        if tuple(order) == tuple(range(self.heads)):
            return self
        at = index(order, self.full_count.device)
        names = "full_count full_index part_count part_index columns covered cut".split()
        held = {name: getattr(self, name) for name in names}
        held = {name: t if t is None else t[:, at] for name, t in held.items()}
        bands, whole = (tuple(t[i] for i in order if t) for t in (self.bands, self.whole))
        return replace(self, bands=bands, whole=whole, **held)

    def within(self, low: int, high: int) -> BlockLists:
        """What these lists keep of the keys at positions from `low` on and before `high`.

        No block holds keys of both sides of either.
        """
        grid, held = self.grid, {"whole": ()}
        inside = ((grid.first >= low) & (grid.first < high))[:, None, None]
        for name in ("full", "part"):
            count, index = getattr(self, f"{name}_count"), getattr(self, f"{name}_index").long()
            used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
            if grid.key_first is None:  # alike in all rows
                kept = used & inside[0, 0, 0][index]
            else:
                index = index.expand(len(grid.first), -1, -1, -1)
                kept = used & inside.expand(*index.shape[:3], -1).gather(3, index)
            order = torch.sort(~kept, dim=-1, stable=True).indices
            held[f"{name}_count"] = kept.sum(-1, dtype=torch.int32)
            held[f"{name}_index"] = index.gather(3, order).int()
        if self.columns is not None:
            outside = (self.columns < low) | (self.columns >= high)
            held["covered"] = self.covered | outside[:, :, None]
        return replace(self, **held)

    def _without_columns(self) -> BlockLists:
        B, H, nq = self.full_count.shape
        none = torch.zeros(B, H, 0, dtype=torch.int64, device=self.full_count.device)
        return replace(self, columns=none, covered=none[:, :, None].bool().expand(-1, -1, nq, -1))

    def _without_cut(self) -> BlockLists:
        return replace(self, cut=self.full_count.new_zeros(self.full_count.shape[:2]).long())

    @property
    def heads(self) -> int:
        return len(self.bands)

    def kept_blocks(self) -> Tensor:
        """[B, H, nq, nk] map of the blocks in either list."""
        shape = (*self.full_count.shape, self.grid.nk + 1)
        kept = torch.zeros(shape, dtype=torch.bool, device=self.full_count.device)
        for count, index in (
            (self.full_count, self.full_index),
            (self.part_count, self.part_index),
        ):
            used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
            kept.scatter_(3, torch.where(used, index, self.grid.nk).long(), True)
        return kept[..., : self.grid.nk]

    def mask(self, rows: Tensor | None = None) -> Tensor:
        """bool [B, H, R, Sk]: the keys kept for the queries `rows` (all of them)."""
        grid = self.grid
        rows = torch.arange(grid.Sq, device=grid.q_len.device) if rows is None else rows
        q, k = grid.query_pos(rows)[:, None, :, None], grid.key_pos[:, None, None, :]
        kept = self.kept_blocks()[:, :, rows // grid.block].repeat_interleave(grid.block, 3)
        for band in dict.fromkeys(self.bands):
            if band != FULL:
                heads = [h for h, other in enumerate(self.bands) if other == band]
                kept[:, heads] &= (k < band.sink) | (k >= band.start(q))
        if self.columns is not None:
            slots = torch.zeros(
                *self.columns.shape[:2], kept.shape[-1] + 1, dtype=torch.bool, device=kept.device
            )
            slots.scatter_(2, self.columns.clamp(max=kept.shape[-1]), True)
            kept = kept | slots[:, :, None, :-1]
        kept = kept & (k <= q) & (k >= 0) & (q >= 0)
        if grid.window is not None:
            kept = kept & (q - k < grid.window)
        return kept[..., : grid.Sk]

    def blocks(self) -> Tensor:
        """[B, H] blocks computed; gathered columns count by their share of a block."""
        count = (self.full_count + self.part_count).sum(2, dtype=torch.float64)
        if self.columns is not None:
            last = self.grid.q_last[:, None, :, None]
            alone = ~self.covered & (self.columns[:, :, None] <= last) & (last >= 0)
            count = count + alone.sum((2, 3)).double() / self.grid.block
        return count.expand(len(self.grid.q_len), -1)

    def pairs(self) -> Tensor:
        """[B, H] query-key pairs kept."""
        grid, block = self.grid, self.grid.block
        total = (self.full_count * grid.q_rows[:, None]).sum(2) * block
        total = total.expand(len(grid.q_len), self.heads).contiguous()
        lane = torch.arange(block, device=grid.q_first.device)
        q = (grid.q_first[..., None] + lane)[:, None, :, None]  # [B, 1, nq, 1, block]
        real = (lane < grid.q_rows[..., None])[:, None, :, None]
        index = self.part_index.long().expand(len(grid.q_len), -1, -1, -1)
        used = torch.arange(index.shape[-1], device=index.device) < self.part_count[..., None]
        table = grid.first[:, None, None].expand(-1, *index.shape[1:3], -1)
        k0 = table.gather(3, index)[..., None]  # [B, H, nq, width, 1]
        live = grid.live[:, None, None].expand(-1, *index.shape[1:3], -1).gather(3, index)
        k1 = k0 + live[..., None] - 1
        oldest = 0 if grid.window is None else q - grid.window + 1
        parts = []
        for band in dict.fromkeys(self.bands):
            head = [i for i, b in enumerate(self.bands) if b == band]
            at = at_heads(head, total.device)
            a, b = k0[:, at], k1[:, at]
            sink = _overlap(a, b, oldest, q.clamp(max=band.sink - 1))
            newest = band.start(q).clamp(min=band.sink)
            if grid.window is not None:
                newest = torch.maximum(newest, oldest)
            both = (sink + _overlap(a, b, newest, q)) * (real & used[:, at][..., None])
            parts.append((at, both.sum((2, 3, 4))))
        for at, count in parts:
            total[:, at] += count.to(total.dtype)
        if self.columns is not None:
            q0, q1 = grid.q_first[:, None, :, None], grid.q_last[:, None, :, None]
            col = self.columns[:, :, None]
            last = q1 if grid.window is None else torch.minimum(q1, col + grid.window - 1)
            readers = (last - torch.maximum(q0, col) + 1).clamp(min=0)
            total = total + (readers * ~self.covered).sum((2, 3))
        return total


def _overlap(a, b, low, high) -> Tensor:
    """How many integers lie in both [a, b] and [low, high]."""
    top = torch.minimum(b, high) if isinstance(high, Tensor) else b.clamp(max=high)
    bottom = torch.maximum(a, low) if isinstance(low, Tensor) else a.clamp(min=low)
    return (top - bottom + 1).clamp(min=0)


def _ascending(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A map [..., n] as counts [...] and ascending indices [..., width or n], both int32."""
    index = torch.sort(~kept, dim=-1, stable=True).indices[..., :width]
    return kept.sum(-1, dtype=torch.int32), index.to(torch.int32)
