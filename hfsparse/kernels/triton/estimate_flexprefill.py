"""The fused choice of FlexPrefill's heads: last queries and means as other estimators take them.

A query-aware head's map of estimated attention is made whole, as large as its lists; one program a
head bisects the mass at which enough is kept. Other heads' programs end at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton import select as triton_select
from hfsparse.kernels.triton.estimate_means import means, products
from hfsparse.kernels.triton.estimate_probes import probe
from hfsparse.kernels.triton.limits import LOG2E
from hfsparse.kernels.triton.select import CHUNK, append, reach, slash
from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.flexprefill import PROBES, FlexPrefill, divergence
from hfsparse.shares import ratio

WHOLE = tl.constexpr(4294967296.0)  # a mass of 1, as `counted` has it
ALL = tl.constexpr(0x3F800000)  # 1.0, as an integer
NONE = tl.constexpr(0x7FFFFFFF)  # above every mass


def flexprefill(pattern: FlexPrefill, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """As FlexPrefill.lists."""
    (B, H), nq, nk = q.shape[:2], grid.nq, grid.nk
    by_key, by_distance = probe(q, k, grid, scale, PROBES)
    queries = means(q, grid.q_len, nq, grid.block)
    keys = means(k, grid.k_len, nk, grid.block)
    aware = divergence(q, keys, by_key, grid, scale) < pattern.tau
    verticals, distances, short = pattern.bands(by_key, by_distance, aware, grid)

    mass = torch.empty(B, H, nq, 1, nk, dtype=torch.float32, device=q.device)
    products(queries, keys, mass, 0, grid)
    bound, last = (torch.empty(B, H, dtype=torch.int32, device=q.device) for _ in range(2))
    short_map = torch.empty(B, H, dtype=torch.uint8, device=q.device)
    is_aware = aware.view(torch.uint8)
    more = dict(BLOCK=grid.block, WINDOW=grid.window is not None)
    _masses[(nq, B * H)](
        *(mass, is_aware, grid.q_len, grid.k_len, H, nq, nk, grid.window or 0, scale * LOG2E.value),
        CHUNK=CHUNK,
        **more,
    )
    _bounds[(B * H,)](
        *(mass, is_aware, bound, last, short_map, grid.q_len, H, nq * nk),
        *(pattern.enough, *ratio(pattern.max_share)),
        BLOCK=grid.block,
        CHUNK=4 * CHUNK,
        num_warps=16,
    )

    marks = torch.zeros(B, H, grid.Sk + 1, dtype=torch.int32, device=q.device)
    marks[..., : grid.Sk : grid.block] = distances
    below = torch.nn.functional.pad(marks.cumsum(-1, dtype=torch.int32), (1, 0))
    found = triton_select.empty(grid, H, nk)
    _joined[(nq, B * H)](
        *(mass, bound, last, below, verticals.view(torch.uint8), grid.q_len, grid.k_len),
        *(found.full_count, found.full_index, found.part_count, found.part_index),
        *(H, nq, nk, found.full_index.shape[-1], found.part_index.shape[-1]),
        *(grid.window or 0, below.shape[-1] - 1),
        CHUNK=CHUNK,
        **more,
    )
    return replace(found, cut=pattern.cut(short | short_map.view(torch.bool), grid))


@triton.jit(do_not_specialize="H nq nk window".split())
def _masses(
    MAP, AWARE, Q_LEN, K_LEN, H, nq, nk, window, unit,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A row of products becomes its softmax, -1 where no query may read."""
    i, head = tl.program_id(0), tl.program_id(1)
    if tl.load(AWARE + head) != 0:
        q_len = tl.load(Q_LEN + head // H).to(tl.int32)
        k_len = tl.load(K_LEN + head // H).to(tl.int32)
        row = MAP + (head.to(tl.int64) * nq + i) * nk
        top = tl.full([], float("-inf"), tl.float32)
        for c in range(0, nk, CHUNK):
            j = c + tl.arange(0, CHUNK)
            seen, _, _ = reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
            x = tl.load(row + j, mask=j < nk, other=0.0)
            top = tl.maximum(top, tl.max(tl.where(seen, x * unit, float("-inf")), 0))
        total = tl.full([], 0.0, tl.float32)
        for c in range(0, nk, CHUNK):
            j = c + tl.arange(0, CHUNK)
            seen, _, _ = reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
            x = tl.load(row + j, mask=j < nk, other=0.0)
            total += tl.sum(tl.where(seen, tl.exp2(tl.where(seen, x * unit - top, 0.0)), 0.0), 0)
        for c in range(0, nk, CHUNK):
            j = c + tl.arange(0, CHUNK)
            seen, _, _ = reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
            x = tl.load(row + j, mask=j < nk, other=0.0)
            p = tl.exp2(tl.where(seen, x * unit - top, 0.0)) / tl.maximum(total, 1.0)
            tl.store(row + j, tl.where(seen, p, -1.0), mask=j < nk)


@triton.jit
def _heavier(at, n, bound, CHUNK: tl.constexpr):
    """How many masses of a map lie above a bound, and their sum, counted."""
    count, sums = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    for c in range(0, n, CHUNK):
        place = c + tl.arange(0, CHUNK)
        x = tl.load(at + place, mask=place < n, other=-1.0)
        above = x.to(tl.int32, bitcast=True) > bound
        count += tl.sum(above.to(tl.int32), 0)
        sums += tl.sum(tl.where(above, x * WHOLE, 0.0).to(tl.int64), 0)
    return count, sums


@triton.jit(do_not_specialize="H n enough numerator denominator".split())
def _bounds(
    MAP, AWARE, BOUND, LAST, SHORT, Q_LEN, H, n,
    enough: tl.int64, numerator: tl.int64, denominator: tl.int64,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The bound above which a head's pairs are kept, and the last place kept of those at it.

    A mass is at least 0, so the integers of its bits order as masses do.
    """
    head = tl.program_id(0)
    if tl.load(AWARE + head) != 0:
        at = MAP + head.to(tl.int64) * n
        rows = tl.cdiv(tl.load(Q_LEN + head // H), BLOCK).to(tl.int64)
        low, high = tl.full([], -1, tl.int32), tl.full([], ALL, tl.int32)
        pairs, _ = _heavier(at, n, low, CHUNK)
        most = tl.cdiv(pairs.to(tl.int64) * numerator, denominator)
        for _ in range(31):
            middle = (low + high) >> 1
            count, mass = _heavier(at, n, middle, CHUNK)
            few = (count < most) & (mass < enough * rows)
            low, high = tl.where(few, low, middle + 1), tl.where(few, middle, high)
        count, mass = _heavier(at, n, high, CHUNK)
        own = (tl.maximum(high, 0).to(tl.float32, bitcast=True) * WHOLE).to(tl.int64)
        ties, taken = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        last = tl.full([], -1, tl.int32)
        for c in range(0, n, CHUNK):
            place = c + tl.arange(0, CHUNK)
            x = tl.load(at + place, mask=place < n, other=-1.0)
            tie = (x.to(tl.int32, bitcast=True) == high) & (x >= 0)
            rank = ties + tl.cumsum(tie.to(tl.int32), 0) - 1
            ties += tl.sum(tie.to(tl.int32), 0)
            tie &= (count + rank < most) & (mass + rank * own < enough * rows)
            taken += tl.sum(tie.to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(tie, place, -1), 0))
        wants = mass + taken * own < enough * rows
        tl.store(BOUND + head, high)
        tl.store(LAST + head, last)
        tl.store(SHORT + head, (wants & (count + taken < pairs)).to(tl.uint8))
    else:
        tl.store(BOUND + head, NONE)
        tl.store(LAST + head, -1)
        tl.store(SHORT + head, 0)


@triton.jit(do_not_specialize="H nq nk full_width part_width window size".split())
def _joined(
    MAP, BOUND, LAST, BELOW, VERTICAL, Q_LEN, K_LEN,
    FULL_COUNT, FULL_INDEX, PART_COUNT, PART_INDEX,
    H, nq, nk, full_width, part_width, window, size,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the lists of what is always kept, of verticals, slashes and the map's best."""
    i, head = tl.program_id(0), tl.program_id(1)
    q_len = tl.load(Q_LEN + head // H).to(tl.int32)
    k_len = tl.load(K_LEN + head // H).to(tl.int32)
    out = head.to(tl.int64) * nq + i
    below = BELOW + head.to(tl.int64) * (size + 1)
    full_index, part_index = FULL_INDEX + out * full_width, PART_INDEX + out * part_width
    bound, last = tl.load(BOUND + head), tl.load(LAST + head)
    end = tl.cdiv(k_len - q_len + tl.minimum((i + 1) * BLOCK, q_len), BLOCK)
    end = tl.where(q_len > i * BLOCK, end, 0)
    full, part = 0, 0
    for c in range(0, end, CHUNK):
        j = c + tl.arange(0, CHUNK)
        some, every, always = reach(j, i, q_len, k_len, window, BLOCK, WINDOW)
        kept, _ = slash(j, i, below, size, q_len, k_len, window, BLOCK, WINDOW)
        kept |= tl.load(VERTICAL + head.to(tl.int64) * nk + j, mask=j < end, other=0) != 0
        mass = tl.load(MAP + out * nk + j, mask=j < end, other=-1.0).to(tl.int32, bitcast=True)
        kept |= (mass > bound) | ((mass == bound) & (i * nk + j <= last))
        kept = some & (kept | always)
        full = append(j, kept & every, full_index, full, full_width)
        part = append(j, kept & ~every, part_index, part, part_width)
    tl.store(FULL_COUNT + out, full)
    tl.store(PART_COUNT + out, part)
