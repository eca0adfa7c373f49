"""A call that reads prompts: which rows go together, over which keys, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from hfsparse.kernels.rows import group_rows, put_rows, take_rows
from hfsparse.lists import Grid, default_block
from hfsparse.lists.lengths import Lengths, on_device

TOGETHER = 1 << 15  # queries of a run: lists of blocks grow with these, times their keys


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows of a call whose prompts are alike: what a row reads depends on its own length only.

    piece: of these rows' queries and keys (in a chunked layer); None: all.
    """

    short: bool  # under below.prefill
    kept: bool  # under below.cache
    block: int
    rows: Tensor | None  # None: all
    grid: Grid
    skip: float | None
    work: tuple[int, int]  # pairs and blocks of dense attention
    piece: tuple[slice, slice] | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of the call."""
        return self.rows is None and self.piece is None

    def take(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its rows' queries `[B, H, Q, D]`, keys and values."""
        if self.piece is not None:
            queries, keys = self.piece
            q, k, v = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        return take_rows(self.rows, q, k, v)

    def put(self, out: Tensor, at: slice | Tensor, part: Tensor) -> None:
        """Write the attention of its queries and of heads `at` into `out` `[B, H, Q, Dv]`."""
        out = out if self.piece is None else out[:, :, self.piece[0]]
        put_rows(out, self.rows, at, part)

    def lies(self, ring: Grid | None) -> Grid:
        """Where the keys of its rows lie: in a ring that holds all rows', else as the call says.

        Those of a piece follow one another in a ring, too, from their chunk's first on.
        """
        return self.grid if ring is None or self.piece else _take(ring, self.rows, self.block)


@dataclass(frozen=True, eq=False)
class Layout:
    """A call that reads prompts, the same for every layer of one window."""

    grid: Grid
    groups: list[RowGroup]


def lay_out(
    lengths: Lengths,
    later: int,
    limits: tuple[int, int],
    skip: float | None,
    window: int | None,
    device: torch.device,
) -> Layout:
    """later: tokens of each prompt that are still to come; limits: below.prefill and below.cache;
    skip, window: the plan's and the layer's own."""
    whole = [n + later for n in lengths.rows]
    window = window if window is not None and lengths.longest > window else None
    grid = _grid(lengths, default_block(max(whole), device), window, device)
    kinds = [(n < limits[0], n < limits[1], default_block(n, device)) for n in whole]
    tokens, groups = [*zip(lengths.past, lengths.new, strict=True)], []
    for (short, kept, block), rows, at in group_rows(kinds, device):
        own = _take(grid, at, block)
        some = tokens if at is None else [tokens[b] for b in rows]
        work = dense_work(tuple(some), block, window)
        groups.append(RowGroup(short, kept, block, at, own, None if short else skip, work))
    return Layout(grid, groups)


def lay_out_chunks(
    lengths: Lengths,
    later: int,
    limits: tuple[int, int],
    skip: float | None,
    chunk: int,
    device: torch.device,
) -> Layout:
    """As `lay_out`, in layers that see no further back than the newest multiple of `chunk`.

    One chunk after another of rows that are alike is a prompt of its own, with the chunk's past.
    """
    grid = _grid(lengths, default_block(lengths.longest + later, device), None, device)
    whole = [(n + later < limits[0], n + later < limits[1]) for n in lengths.rows]
    groups = []
    kinds = zip(whole, lengths.past, lengths.new, strict=True)
    for ((short, kept), past, new), rows, at in group_rows([*kinds], device):
        for behind, *piece in pieces(past, new, chunk):
            columns, count = piece[0].stop - piece[0].start, len(rows or lengths.rows)
            own = Lengths([behind] * count, [columns] * count, columns)
            block = default_block(own.longest, device)
            work = dense_work(((behind, columns),) * count, block, None)
            more = None if short else skip, work, tuple(piece)
            groups.append(RowGroup(short, kept, block, at, _grid(own, block, None, device), *more))
    return Layout(grid, groups)


def lay_out_runs(
    runs: Sequence[tuple[int, int]],
    tokens: int,
    batch: int,
    limits: tuple[int, int],
    skip: float | None,
    window: int | None,
    device: torch.device,
) -> Layout:
    """As `lay_out`, of some runs of the tokens of rows of so many, over the rows' keys from 0 on.

    Each run is read as a chunk behind its past, a long one as several.
    """
    short, kept = tokens < limits[0], tokens < limits[1]
    block, groups, done = default_block(tokens, device), [], 0
    for start, end in runs:
        for low in range(start, end, TOGETHER):
            new = min(end - low, TOGETHER)
            own = Lengths([low] * batch, [new] * batch, new)
            near = window if window is not None and own.longest > window else None
            work = dense_work(((low, new),) * batch, block, near)
            piece = slice(done, done + new), slice(0, own.longest)
            more = None if short else skip, work, piece
            groups.append(
                RowGroup(short, kept, block, None, _grid(own, block, near, device), *more)
            )
            done += new
    return Layout(groups[0].grid, groups)


def pieces(past: int, new: int, chunk: int) -> Iterator[tuple[int, slice, slice]]:
    """A row's new tokens by chunks: tokens of the chunk before them, and where the chunk's queries
    and keys are among the row's new tokens and among its keys from the chunk of the first on."""
    first, end = past - past % chunk, past + new
    for start in range(first, end, chunk):
        low, high = max(start, past), min(start + chunk, end)
        if low < high:
            yield low - start, slice(low - past, high - past), slice(start - first, high - first)


def _grid(lengths: Lengths, block: int, window: int | None, device: torch.device) -> Grid:
    """Queries over all tokens of their rows; where nothing is behind, over themselves."""
    q_len, k_len = (on_device(t, device) for t in (lengths.new, lengths.rows))
    keys = lengths.longest if lengths.behind else lengths.columns
    known = {"padded": lengths.padded, "past": lengths.behind}
    return Grid(q_len, k_len, lengths.columns, keys, block, window, **known)


def _take(grid: Grid, rows: Tensor | None, block: int) -> Grid:
    """The grid of some rows (None: all), in blocks of this size; a ring's are as they lie."""
    place = grid if rows is None else grid.take(rows)
    same = grid.key_first is not None or grid.block == block
    return place if same else replace(place, block=block)


@lru_cache(64)
def dense_work(
    tokens: tuple[tuple[int, int], ...], block: int, window: int | None
) -> tuple[int, int]:
    """Pairs and blocks of dense attention, given each row's past and new tokens."""

    def seen(tokens: int) -> int:
        """Pairs of a row's first tokens."""
        near = tokens if window is None else min(tokens, window)
        return near * (near + 1) // 2 + (tokens - near) * near

    pairs = blocks = 0
    for past, new in tokens:
        pairs += seen(past + new) - seen(past)
        for first in range(past, past + new, block):
            last = min(first + block, past + new) - 1
            low = 0 if window is None else max(first - window + 1, 0)
            blocks += last // block - low // block + 1
    return pairs, blocks
