"""From scores to ascending lists of blocks in Triton: the second half of the fused estimators.

A program serves one block of queries of one q head. `best_blocks` finds the score at which enough
is kept by bisecting float32 bit patterns, so ties go to the lower block as a stable sort has it;
`slashes` looks up which blocks hold a kept diagonal. Grids with dropped keys are not served.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.lists import EDGES, FULL, BlockLists, Grid
from hfsparse.shares import ratio

SCRATCH = 64 << 20  # bytes of scores at a time
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
    unit: float = 1.0,
    whole: tuple[Tensor, Tensor] | None = None,
    margin: float | None = None,
    always: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Write the lists of the query blocks from `first` on, by scores `[B, H, n, groups, nk]`.

    Kept are the row's first block and those that hold its own queries, then the best: `share` of
    the visible blocks and no fewer than `least`. `scores` is overwritten.

    tau: the best only until they hold that share of the scores' sum.
    totals `[B, H, n, groups]`: each group's scores are divided by its total and added up.
    margin: of the best only those that are at least the largest score plus this.
    whole: uint8 flags of query blocks `[B, H, nq]` and key blocks `[B, Hkv, nk]` that are read
        whole: they are not ranked and take no room. The scores of others are then logits, in
        `unit` to base 2, and `tau` is meant of their softmax.
    always: how many sinks, recent blocks and last query blocks are kept first, as by Energy.

    With tau or margin `lists.cut` counts the query blocks that had no room for some of them.
    """
    grid = lists.grid
    B, H, n, groups, nk = scores.shape
    short = -1.0 if tau is None else tau if tau < 1 else torch.inf
    whole_q, whole_k = (scores, scores) if whole is None else whole
    _best[(B * H * n,)](
        *(scores, scores if totals is None else totals, whole_q, whole_k, grid.q_len, grid.k_len),
        *(lists.full_count, lists.full_index, lists.part_count, lists.part_index),
        lists.full_count if lists.cut is None else lists.cut,
        *(H, 1 if whole is None else H // whole_k.shape[1], n, first, grid.nq, nk),
        *(lists.full_index.shape[-1], lists.part_index.shape[-1], grid.window or 0),
        *(*always, least, *ratio(share), short, unit, margin or 0.0),
        GROUPS=0 if totals is None else groups,
        MASS=tau is not None,
        NEAR=margin is not None,
        WHOLE=whole is not None,
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


def wide(x: Tensor) -> int:
    """The head dim of x as tiles have it: a power of two, and no less than a product takes."""
    return max(16, triton.next_power_of_2(x.shape[-1]))


def slices(found: BlockLists, groups: int, step: int = 1) -> Iterator[tuple[int, Tensor]]:
    """First query block and scores `[B, H, n, groups, nk]`, for n blocks after others.

    n is a multiple of `step`, so large that the scores take SCRATCH bytes or what the lists take.
    """
    B, H, nq = found.full_count.shape
    nk = found.grid.nk
    most = max(SCRATCH, found.full_index.nbytes) // (4 * B * H * groups * nk)
    n = min(max(most // step, 1) * step, nq)
    size, device = B * H * n * groups * nk, found.full_count.device
    room = torch.empty(size, dtype=torch.float32, device=device)
    for first in range(0, nq, n):
        shape = (B, H, min(n, nq - first), groups, nk)
        yield first, room[: torch.Size(shape).numel()].view(shape)


@triton.jit
def reach(j, i, q_len, k_len, window, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
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
def append(j, kept, index, count, width):
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


NUMBERS = """H group n first nq nk full_width part_width window sinks recent dense least
numerator denominator"""


@triton.jit(do_not_specialize=NUMBERS.split())
def _best(
    SCORES, TOTALS, WHOLE_Q, WHOLE_K, Q_LEN, K_LEN,
    FULL_COUNT, FULL_INDEX, PART_COUNT, PART_INDEX, CUT,
    H, group, n, first, nq, nk, full_width, part_width, window, sinks, recent, dense, least,
    numerator: tl.int64, denominator: tl.int64, tau, unit, margin,
    GROUPS: tl.constexpr, MASS: tl.constexpr, NEAR: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
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
    whole_k = WHOLE_K + (head // group).to(tl.int64) * nk
    always_from = (k_len - q_len + i * BLOCK) // BLOCK - recent
    always_from = tl.where(i >= tl.cdiv(q_len, BLOCK) - dense, -1, always_from)

    top = tl.full([], float("-inf"), tl.float32)
    if MASS and WHOLE:
        for c in range(0, end, CHUNK):
            j = c + tl.arange(0, CHUNK)
            some, _, _ = reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
            some &= ~_whole(j, out, WHOLE_Q, whole_k, end)
            x = tl.load(row + j, mask=j < end, other=float("-inf"))
            top = tl.maximum(top, tl.max(tl.where(some, x, float("-inf")), 0))

    # Scores of groups become one score a block; what is not to be ranked becomes -inf.
    visible, own, total, held = tl.full([], 0, tl.int32), 0, 0.0, 0.0
    for c in range(0, end, CHUNK):
        j = c + tl.arange(0, CHUNK)
        some, _, always = reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
        always |= some & ((j < sinks) | (j > always_from))
        if GROUPS > 0:
            x = tl.zeros([CHUNK], tl.float32)
            for g in tl.static_range(GROUPS):
                weight = tl.load(TOTALS + tl.program_id(0).to(tl.int64) * GROUPS + g)
                part = tl.load(row + g * nk + j, mask=some & (j < end), other=0.0)
                x += part / tl.where(weight > 0, weight, 1.0)  # empty groups have no mass
        else:
            x = tl.load(row + j, mask=j < end, other=0.0)
        visible += tl.sum(some.to(tl.int32), 0)
        if NEAR:
            top = tl.maximum(top, tl.max(tl.where(some, x, float("-inf")), 0))
        if WHOLE:
            some &= ~_whole(j, out, WHOLE_Q, whole_k, end)
            always &= some
            if MASS:
                x = tl.exp2(tl.where(some, x - top, 0.0) * unit)
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
    steps = tl.full([], 32, tl.int32)
    if NEAR:
        low = tl.maximum(low, _ordered(top + margin).to(tl.int64) - 1)
        count, _ = _above(row, end, low.to(tl.int32), CHUNK)
        high = tl.where(count <= room, low, high)
        steps = tl.where(count <= room, 0, steps)  # there is room for all that are near
    for _ in range(steps):
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
        some, every, always = reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
        always |= some & ((j < sinks) | (j > always_from))
        if WHOLE:
            always |= some & _whole(j, out, WHOLE_Q, whole_k, end)
        x = tl.load(row + j, mask=j < end, other=float("-inf"))
        tie = (_ordered(x) == bound) & (x > float("-inf"))
        if NEAR:
            some &= x >= top + margin
            tie &= some
        rank = ties + tl.cumsum(tie.to(tl.int32), 0) - 1
        ties += tl.sum(tie.to(tl.int32), 0)
        tie &= rank < room - count
        if MASS:
            tie &= mass + rank * x < short
            added += tl.sum(tl.where(tie, x, 0.0), 0)
        kept = tie | always | ((_ordered(x) > bound) & (x > float("-inf")))
        left += tl.sum((some & ~kept).to(tl.int32), 0)
        full = append(j, kept & every, full_index, full, full_width)
        part = append(j, kept & ~every, part_index, part, part_width)
    tl.store(FULL_COUNT + out, full)
    tl.store(PART_COUNT + out, part)
    if MASS:
        left = tl.where(mass + added < short, left, 0)
    if MASS or NEAR:
        tl.atomic_add(CUT + head, tl.where(left > 0, 1, 0).to(tl.int64))


@triton.jit
def _whole(j, out, WHOLE_Q, whole_k, end):
    """Whether the query block, or key blocks j, are read whole."""
    key = tl.load(whole_k + j, mask=j < end, other=1)
    return (key != 0) | (tl.load(WHOLE_Q + out) != 0)


@triton.jit
def slash(j, i, below, size, q_len, k_len, window, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Which of key blocks j hold a kept diagonal of query block i, and are read by every query."""
    some, every, _ = reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
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
        kept, every = slash(j, i, below, size, q_len, k_len, window, BLOCK, WINDOW)
        full = append(j, kept & every, full_index, full, full_width)
        part = append(j, kept & ~every, part_index, part, part_width)
    tl.store(FULL_COUNT + out, full)
    tl.store(PART_COUNT + out, part)
    for c in range(0, n_columns, CHUNK):
        slot = c + tl.arange(0, CHUNK)
        real = slot < n_columns
        column = tl.load(COLUMNS + head.to(tl.int64) * n_columns + slot, mask=real, other=0)
        home = tl.minimum(column // BLOCK, nk - 1).to(tl.int32)
        kept, _ = slash(home, i, below, size, q_len, k_len, window, BLOCK, WINDOW)
        tl.store(COVERED + out * n_columns + slot, kept.to(tl.uint8), mask=real)
