"""From scores to ascending lists of blocks in Triton: the second half of the fused estimators.

A program serves one block of queries of one q head. `best_blocks` finds the score at which enough
is kept by bisecting float32 bit patterns, so ties go to the lower block as a stable sort has it;
`slashes` looks up which blocks hold a kept diagonal. Grids with dropped keys are not served.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.lists import EDGES, FULL, BlockLists, Grid
from hfsparse.shares import ratio

CHUNK = 1024  # key blocks, or columns, looked at together
LOWEST = tl.constexpr(-2139095041)  # -inf, as an integer that orders as floats do


def empty(grid: Grid, heads: int, width: int) -> BlockLists:
    """Lists of no block, with room for `width` full ones a query block, to be written into."""
    shape, device = (len(grid.q_len), heads, grid.nq), grid.q_len.device
    full, part = (
        (
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(*shape, min(grid.nk, wide), dtype=torch.int32, device=device),
        )
        for wide in (width, EDGES)
    )
    return BlockLists(grid, *full, *part, (FULL,) * heads)


def best_blocks(
    lists: BlockLists,
    scores: Tensor,
    first: int,
    totals: Tensor | None = None,
    *,
    share: float,
    least: int = 0,
    tau: float | None = None,
) -> None:
    """Write the lists of the query blocks from `first` on, by scores `[B, H, n, groups, nk]`.

    Kept are the row's first block and those that hold its own queries, then the best: `share` of
    the visible blocks and no fewer than `least`; given `tau`, only until they hold that share of
    the scores' sum, and `lists.cut` counts those cut short. totals `[B, H, n, groups]`: each
    group's scores are divided by its total and added up. `scores` is overwritten.
    """
    grid = lists.grid
    B, H, n, groups, nk = scores.shape
    short = -1.0 if tau is None else tau if tau < 1 else torch.inf
    _best[(B * H * n,)](
        *(scores, scores if totals is None else totals, grid.q_len, grid.k_len),
        *(lists.full_count, lists.full_index, lists.part_count, lists.part_index),
        lists.full_count if lists.cut is None else lists.cut,
        *(H, n, first, grid.nq, nk, lists.full_index.shape[-1], lists.part_index.shape[-1]),
        *(grid.window or 0, least, *ratio(share), short),
        GROUPS=0 if totals is None else groups,
        MASS=tau is not None,
        BLOCK=grid.block,
        WINDOW=grid.window is not None,
        CHUNK=CHUNK,
        num_warps=2 if totals is None else 4,
    )


def slashes(lists: BlockLists, below: Tensor, columns: Tensor) -> Tensor:
    """Write the lists of the blocks that hold a kept diagonal; returns `covered` for `columns`.

    below [B, H, distances + 1] int32: kept diagonals below each distance. columns [B, H, n].
    """
    grid = lists.grid
    B, H, n = columns.shape
    covered = torch.empty(B, H, grid.nq, n, dtype=torch.uint8, device=columns.device)
    _slashes[(B * H * grid.nq,)](
        *(below, columns, covered, grid.q_len, grid.k_len),
        *(lists.full_count, lists.full_index, lists.part_count, lists.part_index),
        *(H, grid.nq, grid.nk, lists.full_index.shape[-1], lists.part_index.shape[-1]),
        *(grid.window or 0, below.shape[-1] - 1, n),
        BLOCK=grid.block,
        WINDOW=grid.window is not None,
        CHUNK=CHUNK,
        num_warps=4,
    )
    return covered.view(torch.bool)


@triton.jit
def _reach(j, i, q_len, k_len, window, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """As Grid.reach, for key blocks j of query block i: some pair, every pair, always kept."""
    q0 = k_len - q_len + i * BLOCK
    q1 = q0 + tl.minimum(q_len - i * BLOCK, BLOCK) - 1
    k0 = j * BLOCK
    k1 = k0 + tl.minimum(k_len - k0, BLOCK) - 1
    some = (q1 >= q0) & (k1 >= k0) & (k0 <= q1)
    every = some & (k1 <= q0) & (k1 - k0 == BLOCK - 1)
    if WINDOW:
        some &= q0 - k1 < window
        every &= q1 - k0 < window
    return some, every & some, some & ((k1 >= q0) | (j == 0))


@triton.jit
def _append(j, kept, index, count, width):
    """Write the kept ones of ascending j behind `count` others; the new count."""
    place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(index + place, j, mask=kept & (place < width))
    return count + tl.sum(kept.to(tl.int32), 0)


@triton.jit
def _ordered(x):
    """float32 as int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _above(row, n, bound, CHUNK: tl.constexpr):
    """How many scores of a row lie above a bound, and their sum."""
    count, mass = 0, 0.0
    for c in range(0, n, CHUNK):
        j = c + tl.arange(0, CHUNK)
        x = tl.load(row + j, mask=j < n, other=float("-inf"))
        above = _ordered(x) > bound
        count += tl.sum(above.to(tl.int32), 0)
        mass += tl.sum(tl.where(above, x, 0.0), 0)
    return count, mass


NUMBERS = "H n first nq nk full_width part_width window least numerator denominator"


@triton.jit(do_not_specialize=NUMBERS.split())
def _best(
    SCORES, TOTALS, Q_LEN, K_LEN, FULL_COUNT, FULL_INDEX, PART_COUNT, PART_INDEX, CUT,
    H, n, first, nq, nk, full_width, part_width, window, least,
    numerator: tl.int64, denominator: tl.int64, tau,
    GROUPS: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // n  # b * H + h
    i = first + tl.program_id(0) % n
    q_len = tl.load(Q_LEN + head // H).to(tl.int32)
    k_len = tl.load(K_LEN + head // H).to(tl.int32)
    groups = tl.maximum(GROUPS, 1)
    row = SCORES + tl.program_id(0).to(tl.int64) * groups * nk
    out = head.to(tl.int64) * nq + i
    end = tl.cdiv(k_len - q_len + tl.minimum((i + 1) * BLOCK, q_len), BLOCK)
    end = tl.where(q_len > i * BLOCK, end, 0)  # key blocks that are not past the queries

    # Scores of groups become one score a block; what is not to be ranked becomes -inf.
    visible, own, total, held = tl.full([], 0, tl.int32), 0, 0.0, 0.0
    for c in range(0, end, CHUNK):
        j = c + tl.arange(0, CHUNK)
        some, _, always = _reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
        if GROUPS > 0:
            x = tl.zeros([CHUNK], tl.float32)
            for g in tl.static_range(GROUPS):
                whole = tl.load(TOTALS + tl.program_id(0).to(tl.int64) * GROUPS + g)
                part = tl.load(row + g * nk + j, mask=some & (j < end), other=0.0)
                x += part / tl.where(whole > 0, whole, 1.0)  # empty groups have no mass
        else:
            x = tl.load(row + j, mask=j < end, other=0.0)
        visible += tl.sum(some.to(tl.int32), 0)
        own += tl.sum(always.to(tl.int32), 0)
        total += tl.sum(tl.where(some, x, 0.0), 0)
        held += tl.sum(tl.where(always, x, 0.0), 0)
        tl.store(row + j, tl.where(some & ~always, x, float("-inf")), mask=j < end)
    tl.debug_barrier()

    # The lowest bound for which what lies above it is not enough yet.
    budget = tl.cdiv(visible * numerator, denominator).to(tl.int32)
    room = tl.maximum(tl.maximum(budget, least), own) - own
    short = total * tau - held
    low, high = tl.full([], LOWEST, tl.int64), tl.full([], 0x7FFFFFFF, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        count, mass = _above(row, end, middle.to(tl.int32), CHUNK)
        few = count < room  # so the best of what lies at the bound is wanted
        if MASS:
            few &= mass < short
        low, high = tl.where(few, low, middle + 1), tl.where(few, middle, high)

    # All above the bound, and as many as are needed of those at it.
    bound = high.to(tl.int32)
    count, mass = _above(row, end, bound, CHUNK)
    full, part, ties, left, added = 0, 0, 0, 0, 0.0
    full_index, part_index = FULL_INDEX + out * full_width, PART_INDEX + out * part_width
    for c in range(0, end, CHUNK):
        j = c + tl.arange(0, CHUNK)
        some, every, always = _reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
        x = tl.load(row + j, mask=j < end, other=float("-inf"))
        tie = (_ordered(x) == bound) & (x > float("-inf"))
        rank = ties + tl.cumsum(tie.to(tl.int32), 0) - 1
        ties += tl.sum(tie.to(tl.int32), 0)
        tie &= rank < room - count
        if MASS:
            tie &= mass + rank * x < short
            added += tl.sum(tl.where(tie, x, 0.0), 0)
        kept = tie | always | ((_ordered(x) > bound) & (x > float("-inf")))
        left += tl.sum((some & ~kept).to(tl.int32), 0)
        full = _append(j, kept & every, full_index, full, full_width)
        part = _append(j, kept & ~every, part_index, part, part_width)
    tl.store(FULL_COUNT + out, full)
    tl.store(PART_COUNT + out, part)
    if MASS:
        tl.atomic_add(CUT + head, tl.where((left > 0) & (mass + added < short), 1, 0).to(tl.int64))


@triton.jit
def _slash(j, i, below, size, q_len, k_len, window, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Which of key blocks j hold a kept diagonal of query block i, and are read by every query."""
    some, every, _ = _reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
    q0 = k_len - q_len + i * BLOCK
    q1 = q0 + tl.minimum(q_len - i * BLOCK, BLOCK) - 1
    k0 = j * BLOCK
    k1 = k0 + tl.minimum(k_len - k0, BLOCK) - 1
    low = tl.minimum(tl.maximum(q0 - k1, 0), size)  # distances inside a pair of blocks
    high = tl.minimum(tl.maximum(q1 - k0 + 1, 0), size)
    kept = tl.load(below + high, mask=some, other=0) > tl.load(below + low, mask=some, other=0)
    return kept, every


@triton.jit(do_not_specialize="H nq nk full_width part_width window size n_columns".split())
def _slashes(
    BELOW, COLUMNS, COVERED, Q_LEN, K_LEN, FULL_COUNT, FULL_INDEX, PART_COUNT, PART_INDEX,
    H, nq, nk, full_width, part_width, window, size, n_columns,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head, i = tl.program_id(0) // nq, tl.program_id(0) % nq
    q_len = tl.load(Q_LEN + head // H).to(tl.int32)
    k_len = tl.load(K_LEN + head // H).to(tl.int32)
    out = tl.program_id(0).to(tl.int64)
    below = BELOW + head.to(tl.int64) * (size + 1)
    full_index, part_index = FULL_INDEX + out * full_width, PART_INDEX + out * part_width
    end = tl.cdiv(k_len - q_len + tl.minimum((i + 1) * BLOCK, q_len), BLOCK)
    end = tl.where(q_len > i * BLOCK, end, 0)
    full, part = 0, 0
    for c in range(0, end, CHUNK):
        j = c + tl.arange(0, CHUNK)
        kept, every = _slash(j, i, below, size, q_len, k_len, window, BLOCK, WINDOW)
        full = _append(j, kept & every, full_index, full, full_width)
        part = _append(j, kept & ~every, part_index, part, part_width)
    tl.store(FULL_COUNT + out, full)
    tl.store(PART_COUNT + out, part)
    for c in range(0, n_columns, CHUNK):
        slot = c + tl.arange(0, CHUNK)
        real = slot < n_columns
        column = tl.load(COLUMNS + head.to(tl.int64) * n_columns + slot, mask=real, other=0)
        home = tl.minimum(column // BLOCK, nk - 1).to(tl.int32)
        kept, _ = _slash(home, i, below, size, q_len, k_len, window, BLOCK, WINDOW)
        tl.store(COVERED + out * n_columns + slot, kept.to(tl.uint8), mask=real)
