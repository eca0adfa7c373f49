"""The forms in which patterns, selectors, caches and kernels meet: Grid, BlockLists, PageLists.

Everything is row-relative: a batch row's first real token is position 0, whatever padding stood
before it. Densities count query-key pairs (budgets use these) and blocks (speed follows these).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

PAGE = 64  # tokens in a decode page
RATE_ONE = 1 << 16  # `recent_per_token` is held as a fraction of this, so that spans are exact
ANY = 1 << 40  # a recent window that never ends
FAR = 1 << 40  # the position of a column slot that holds no column
EDGES = 8  # partial blocks of a query block, at most: its own, and where window and band begin


def at_heads(heads: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index for heads: a view where they stand side by side, else a tensor on the device."""
    first, end = heads[0], heads[-1] + 1
    return slice(first, end) if list(heads) == [*range(first, end)] else _tensor(heads, device)


def _tensor(heads: Sequence[int], device: torch.device) -> Tensor:
    """Complete when this returns: other streams may read it."""
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)


class HeadIndex:
    """Indices for heads, each made once and owned here.

    A plain list would be copied to the device by each use, and the host would wait for that. CUDA
    graphs read an index where it lies: it stays there as long as its owner lives.
    """

    def __init__(self):
        self._made: dict[tuple, slice | Tensor] = {}

    def __reduce__(self):
        return HeadIndex, ()  # a copy makes its own

    def __call__(self, heads: Sequence[int], device: torch.device) -> slice | Tensor:
        """As `at_heads`."""
        return self._once(at_heads, tuple(heads), device)

    def tensor(self, heads: Sequence[int], device: torch.device) -> Tensor:
        """The index as a tensor in any case."""
        return self._once(_tensor, tuple(heads), device)

    def _once(self, *key) -> slice | Tensor:
        if key not in self._made:  # two threads both get the first one's
            self._made.setdefault(key, key[0](*key[1:]))
        return self._made[key]


def default_block(tokens: int, device: torch.device | None = None) -> int:
    """Block edge: 128 as GPU kernels like it; 32 on a CPU for short rows, where that keeps less."""
    on_cpu = device is None or device.type == "cpu"
    return 32 if tokens < 4096 and on_cpu else 128


@dataclass(frozen=True)
class Band:
    """Keys a streaming head reads: the first `sink` and the last `recent + rate * position`."""

    sink: int = 0
    recent: int = ANY
    rate: int = 0  # in 1/65536 tokens of window per token of position

    def start(self, position: Tensor) -> Tensor:
        """First key of the recent window of queries at `position`; never decreases."""
        return position - self.span(position) + 1

    def span(self, position):
        """Length of the recent window, the query included. Takes ints and integer tensors."""
        return self.recent + position * self.rate // RATE_ONE


FULL = Band()


@dataclass(frozen=True)
class Grid:
    """Where the queries and keys of a batch stand.

    Query i of row b is at position `k_len[b] - q_len[b] + i`; rows are padded to `Sq` and `Sk`.
    Key slots come in blocks: block j of row b holds positions `first[b, j] ..` in its leading
    `live[b, j]` slots. By default block j begins at position `j * block`; a ring that has dropped
    keys says otherwise.
    """

    q_len: Tensor  # [B] new queries
    k_len: Tensor  # [B] tokens in the row, the new ones included
    Sq: int
    Sk: int
    block: int = 32
    window: int | None = None  # the model's own sliding window, in tokens
    key_first: Tensor | None = None  # [B, nk]
    key_live: Tensor | None = None  # [B, nk]
    # Known without asking the device; True: perhaps.
    padded: bool = True  # rows of other lengths
    past: bool = True  # tokens before the queries
    # Lists of a band alone, by band and number of heads.
    _banded: dict[tuple[Band, int], BlockLists] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    @classmethod
    def causal(cls, B: int, S: int, block: int = 32, device="cpu", window: int | None = None):
        """The grid of prompts of S tokens without padding or past."""
        length = torch.full((B,), S, device=device)
        return cls(length, length, S, S, block, window)

    @property
    def nq(self) -> int:
        return -(-self.Sq // self.block)

    @property
    def nk(self) -> int:
        return -(-self.Sk // self.block)

    @cached_property
    def offset(self) -> Tensor:
        """[B] position of each row's first new query."""
        return self.k_len - self.q_len

    @cached_property
    def first(self) -> Tensor:
        """[B, nk] position of each key block's first slot."""
        if self.key_first is not None:
            return self.key_first
        starts = torch.arange(self.nk, device=self.k_len.device) * self.block
        return starts.expand(len(self.k_len), -1)

    @cached_property
    def live(self) -> Tensor:
        """[B, nk] keys held by each block."""
        if self.key_live is not None:
            return self.key_live
        return (self.k_len[:, None] - self.first).clamp(0, self.block)

    @cached_property
    def q_rows(self) -> Tensor:
        """[B, nq] queries in each query block."""
        starts = torch.arange(self.nq, device=self.q_len.device) * self.block
        return (self.q_len[:, None] - starts).clamp(0, self.block)

    @cached_property
    def q_first(self) -> Tensor:
        """[B, nq] position of each query block's first query."""
        starts = torch.arange(self.nq, device=self.q_len.device) * self.block
        return self.offset[:, None] + starts

    @property
    def q_last(self) -> Tensor:
        """[B, nq] position of each query block's last query."""
        return self.q_first + self.q_rows - 1

    @cached_property
    def key_pos(self) -> Tensor:
        """[B, nk * block] position of each key slot, -1 where it holds none."""
        lane = torch.arange(self.block, device=self.first.device)
        pos = self.first[..., None] + lane
        return torch.where(lane < self.live[..., None], pos, -1).flatten(1)

    def query_pos(self, rows: Tensor | None = None) -> Tensor:
        """[B, R] positions of the queries `rows` (all), -1 past the row's end."""
        rows = torch.arange(self.Sq, device=self.q_len.device) if rows is None else rows
        return torch.where(rows < self.q_len[:, None], self.offset[:, None] + rows, -1)

    def reach(self, band: Band = FULL) -> tuple[Tensor, Tensor]:
        """Block maps [B, nq, nk]: causality, window and band keep some pair, and every pair."""
        q0, q1 = self.q_first[..., None], self.q_last[..., None]
        k0, k1 = self.first[:, None], (self.first + self.live - 1)[:, None]
        some = (k0 <= q1) & (self.q_rows[..., None] > 0) & (self.live[:, None] > 0)
        some &= (k0 < band.sink) | (k1 >= band.start(q0))
        every = (k1 <= q0) & (self.live[:, None] == self.block)
        every &= (k1 < band.sink) | (k0 >= band.start(q1))
        if self.window is not None:
            some &= q0 - k1 < self.window
            every &= q1 - k0 < self.window
        return some, some & every

    def banded(self, band: Band, heads: int) -> BlockLists:
        """Lists of the band alone, made once: they are the same in every layer of a call."""
        if (band, heads) not in self._banded:
            self._banded[band, heads] = BlockLists.of(self, heads, band=band)
        return self._banded[band, heads]

    def take(self, rows: Tensor) -> Grid:
        """The grid of some of the batch's rows."""
        some = [None if t is None else t[rows] for t in (self.key_first, self.key_live)]
        q_len, k_len = self.q_len[rows], self.k_len[rows]
        return replace(self, q_len=q_len, k_len=k_len, key_first=some[0], key_live=some[1])

    def pairs(self) -> Tensor:
        """[B] query-key pairs of dense attention, dropped keys included."""
        seen = self.query_pos() + 1
        return (seen if self.window is None else seen.clamp(max=self.window)).sum(1)

    def blocks(self) -> Tensor:
        """[B] blocks of dense attention, dropped keys included."""
        if self.key_first is None:
            return self.reach()[0].sum((1, 2))
        whole = int(self.k_len.max())
        return replace(self, Sk=whole, key_first=None, key_live=None).blocks()


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
        return cls(grid, *lists, (band,) * heads, columns, covered)

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
        )

    def in_order(self, heads: list[int], index: HeadIndex) -> BlockLists:
        """The same for `heads`, which these lists hold in another order, ascending."""
        order = sorted(range(len(heads)), key=heads.__getitem__)
        if order == list(range(len(heads))):
            return self
        at = index(order, self.full_count.device)
        names = "full_count full_index part_count part_index columns covered cut".split()
        held = {name: getattr(self, name) for name in names}
        held = {name: t if t is None else t[:, at] for name, t in held.items()}
        return replace(self, bands=tuple(self.bands[i] for i in order), **held)

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


@dataclass(frozen=True)
class PageLists:
    """Which pages of a kv head's cache a decode step reads; ties went to the lower page."""

    pages: Tensor  # [B, Hkv, width] int64, ascending
    count: Tensor  # [B, Hkv]

    @classmethod
    def cat(cls, parts: Sequence[PageLists]) -> PageLists:
        """Those of some heads, then those of others."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.pages.shape[2] for part in parts)
        pages = [pad(part.pages, (0, width - part.pages.shape[2])) for part in parts]
        return cls(torch.cat(pages, 1), torch.cat([part.count for part in parts], 1))

    def of(self, heads: Sequence[int], device: torch.device, index: HeadIndex) -> PageLists:
        """Those of some kv heads, on a device."""
        if len(heads) == self.pages.shape[1] and device == self.pages.device:
            return self
        at = index(heads, self.pages.device)
        return PageLists(self.pages[:, at].to(device), self.count[:, at].to(device))

    def keys(self, length: Tensor) -> Tensor:
        """[B, Hkv] keys in the pages, for rows of `length` [B] whose last page is read, if any."""
        return (self.count * PAGE - (-length % PAGE)[:, None]).clamp(min=0)


def _overlap(a, b, low, high) -> Tensor:
    """How many integers lie in both [a, b] and [low, high]."""
    top = torch.minimum(b, high) if isinstance(high, Tensor) else b.clamp(max=high)
    bottom = torch.maximum(a, low) if isinstance(low, Tensor) else a.clamp(min=low)
    return (top - bottom + 1).clamp(min=0)


def _ascending(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A map [..., n] as counts [...] and ascending indices [..., width or n], both int32."""
    index = torch.sort(~kept, dim=-1, stable=True).indices[..., :width]
    return kept.sum(-1, dtype=torch.int32), index.to(torch.int32)
