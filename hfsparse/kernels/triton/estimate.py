"""The patterns that look at q and k, fused: `lists(pattern, ...)` is `pattern.lists(...)` on a GPU.

No host synchronisation, and no map of scores larger than SCRATCH or the lists themselves: scores
are made and turned into lists for some query blocks after others. `triton_select` does the second
half. `antidiagonal` is bound by FLOPs, the others by reading q and k once or twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton import select as triton_select
from hfsparse.kernels.triton.limits import BLOCKS, shared_memory
from hfsparse.lists import FAR, BlockLists, Grid
from hfsparse.patterns.antidiagonal import STRIDE, Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.vertical_slash import (
    FORCED_COLUMNS,
    FORCED_DIAGONALS,
    PROBES,
    VerticalSlash,
)

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

SCRATCH = 64 << 20  # bytes of scores at a time
SPLITS = 16  # programs that share the keys of a head's probes
LOG2E = tl.constexpr(1.4426950408889634)


def lists(pattern, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
    q, k = (t.detach() if t.stride(-1) == 1 else t.detach().contiguous() for t in (q, k))
    return FUSED[type(pattern)](pattern, q, k, grid, scale)


def why_not(need: Need) -> str | None:
    """Why these kernels can't choose a pattern's blocks; None: they can."""
    if type(need.chooser) not in FUSED:
        return f"{need.chooser.kind} is not fused"
    if need.head_dim > 256:
        return f"head dim {need.head_dim}: at most 256 is supported"
    slashes = isinstance(need.chooser, VerticalSlash)
    if slashes and not _stages(need.device, need.dtype, need.head_dim):
        return f"{need.dtype} heads of {need.head_dim}: too wide for this GPU's shared memory"
    if need.dropped:
        return "a grid with dropped keys"
    if need.block not in BLOCKS:
        return f"blocks of {need.block} tokens: 16, 32, 64 and 128 are supported"
    return None


def block_topk(pattern: BlockTopK, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """As BlockTopK.lists."""
    found = triton_select.empty(grid, q.shape[1], pattern.width(grid.nk))
    queries = _means(q, grid.q_len, grid.nq, grid.block)
    keys = _means(k, grid.k_len, grid.nk, grid.block)
    for first, scores in _slices(found, 1):
        B, H, n, _, nk = scores.shape
        _pooled[(triton.cdiv(n, 32), triton.cdiv(nk, 64), B * H)](
            *(queries, keys, scores, grid.q_len, grid.k_len),
            *(H, H // k.shape[1], n, first, grid.nq, nk),
            D=q.shape[-1],
            DEPTH=min(64, _wide(q)),
            BLOCK=grid.block,
        )
        triton_select.best_blocks(
            found, scores, first, share=pattern.share, least=pattern.min_blocks
        )
    return found


def antidiagonal(
    pattern: Antidiagonal, q: Tensor, k: Tensor, grid: Grid, scale: float
) -> BlockLists:
    """As Antidiagonal.lists."""
    B, H, _, D = q.shape
    stride = min(STRIDE, grid.block)
    found = triton_select.empty(grid, H, pattern.width(grid.nk))
    found = replace(found, cut=torch.zeros(B, H, dtype=torch.int64, device=q.device))
    short = q.element_size() == 2
    queries, keys, depth = (128, 256, 64) if short else (64, 64, 32)
    if shared_memory(str(q.device)) < 3 * (queries + keys) * depth * q.element_size():
        keys = 128
    for first, scores in _slices(found, grid.block // stride, queries * stride // grid.block):
        n, groups = scores.shape[2:4]
        totals = torch.empty(B, H, n, groups, dtype=torch.float32, device=q.device)
        _antidiagonal[(triton.cdiv(n * groups, queries), B * H)](
            *(q, k, scores, totals, grid.q_len, grid.k_len, *q.stride()[:3], *k.stride()[:3]),
            *(H, H // k.shape[1], n * groups, first * groups, grid.nk, grid.window or 0),
            scale * LOG2E.value / stride,
            D=D,
            DEPTH=min(depth, _wide(q)),
            STEPS=triton.cdiv(D, min(depth, _wide(q))),
            STRIDE=stride,
            PER=groups,
            QUERIES=queries,
            KEYS=keys,
            WINDOW=grid.window is not None,
            PRECISION="tf32" if short else "tf32x3",
            num_warps=8 if short else 4,
            num_stages=3,
        )
        triton_select.best_blocks(
            found, scores, first, totals, share=pattern.max_share, tau=pattern.tau
        )
    return found


def vertical_slash(
    pattern: VerticalSlash, q: Tensor, k: Tensor, grid: Grid, scale: float
) -> BlockLists:
    """As VerticalSlash.lists."""
    by_column, by_diagonal = probe(q, k, grid, scale)
    ends = grid.k_len[:, None, None]
    columns = _top(by_column, FORCED_COLUMNS, pattern.columns, ends)
    diagonals = _top(by_diagonal, FORCED_DIAGONALS, pattern.diagonals, ends)
    kept = torch.zeros(*by_diagonal.shape[:2], grid.Sk + 1, dtype=torch.int32, device=q.device)
    kept.scatter_(2, diagonals.clamp(max=grid.Sk), 1)
    kept[..., grid.Sk] = 0
    below = torch.nn.functional.pad(kept.cumsum(-1, dtype=torch.int32), (1, 0))
    found = triton_select.empty(grid, q.shape[1], grid.nk)
    covered = triton_select.slashes(found, below, columns)
    return replace(found, columns=columns, covered=covered)


FUSED: dict[type, Callable] = {
    VerticalSlash: vertical_slash,
    BlockTopK: block_topk,
    Antidiagonal: antidiagonal,
}


def probe(q: Tensor, k: Tensor, grid: Grid, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each row's last queries, summed by key and by distance: two `[B, H, Sk]`."""
    (B, H), D = q.shape[:2], q.shape[-1]
    single = {"dtype": torch.float32, "device": q.device}
    by_column, by_diagonal = (torch.zeros(B, H, grid.Sk, **single) for _ in range(2))
    top, total = (torch.empty(B, H, SPLITS, PROBES, **single) for _ in range(2))
    for sums in (False, True):
        _probe[(SPLITS, B * H)](
            *(q, k, top, total, by_column, by_diagonal, grid.q_len, grid.k_len),
            *(*q.stride()[:3], *k.stride()[:3]),
            *(H, H // k.shape[1], grid.Sk, grid.window or 0, scale * LOG2E.value),
            D=D,
            DP=_wide(q),
            PROBES=PROBES,
            SPLITS=SPLITS,
            SUMS=sums,
            WINDOW=grid.window is not None,
            PRECISION="tf32" if q.element_size() == 2 else "tf32x3",
            num_stages=_stages(q.device, q.dtype, D),
        )
    return by_column, by_diagonal


def _top(score: Tensor, forced: int, count: int, ends: Tensor) -> Tensor:
    """Ascending positions of the `count` best scores `[B, H, S]`, the first `forced` among them."""
    at = torch.arange(score.shape[-1], device=score.device)
    score = score.masked_fill(at < min(forced, count), torch.inf)
    score = score.masked_fill(at >= ends, -torch.inf)
    best = score.topk(min(count, score.shape[-1]), sorted=False).indices
    return torch.where(best < ends, best, FAR).sort(-1).values


def _stages(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Tiles of keys in flight beside the probes, as shared memory allows; 0: not even one."""
    width = max(16, triton.next_power_of_2(head_dim))
    tile, copies = PROBES * width * dtype.itemsize, dtype.itemsize // 2
    room = shared_memory(str(device)) - 4 * PROBES**2  # that of the diagonals' shift
    return next((n for n in (3, 1) if tile * (2 * copies + n - 1) <= room), 0)


def _wide(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[-1]))


def _slices(found: BlockLists, groups: int, step: int = 1) -> Iterator[tuple[int, Tensor]]:
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


def _means(x: Tensor, length: Tensor, n: int, block: int) -> Tensor:
    """Mean of each block's real tokens: x `[B, H, S, D]` to float32 `[B, H, n, D]`."""
    B, H, _, D = x.shape
    out = torch.empty(B, H, n, D, dtype=torch.float32, device=x.device)
    _mean[(n, B * H)](
        *(x, out, length, *x.stride()[:3], H, n), D=D, DP=_wide(x), BLOCK=block, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=("H", "n"))
def _mean(
    X, OUT, LENGTH, x_b: tl.int64, x_h: tl.int64, x_s, H, n,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, head = tl.program_id(0), tl.program_id(1)
    live = tl.minimum(tl.load(LENGTH + head // H).to(tl.int32) - i * BLOCK, BLOCK)
    lane, d = tl.arange(0, BLOCK), tl.arange(0, DP)
    at = X + (head // H) * x_b + (head % H) * x_h + i.to(tl.int64) * BLOCK * x_s
    mask = (lane < live)[:, None] & (d < D)[None, :]
    x = tl.load(at + lane[:, None] * x_s + d[None, :], mask=mask, other=0.0)
    mean = tl.sum(x.to(tl.float32), 0) / tl.maximum(live, 1)
    tl.store(OUT + (head.to(tl.int64) * n + i) * D + d, mean, mask=d < D)


@triton.jit(do_not_specialize="H n first nq nk".split())
def _pooled(
    QUERIES, KEYS, SCORES, Q_LEN, K_LEN, H, group, n, first, nq, nk,
    D: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of 32 mean queries and 64 mean keys, if any of the keys is not past the queries."""
    head = tl.program_id(2)
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    j = tl.program_id(1) * 64 + tl.arange(0, 64)
    offset = tl.load(K_LEN + head // H) - tl.load(Q_LEN + head // H)
    if tl.program_id(1) * 64 * BLOCK < offset + (first + (tl.program_id(0) + 1) * 32) * BLOCK:
        queries = (head.to(tl.int64) * nq + first + i)[:, None] * D
        keys = ((head // group).to(tl.int64) * nk + j)[:, None] * D
        s = tl.zeros([32, 64], tl.float32)
        for d0 in range(0, D, DEPTH):
            d = d0 + tl.arange(0, DEPTH)[None, :]
            q = tl.load(QUERIES + queries + d, mask=(i < n)[:, None] & (d < D), other=0.0)
            k = tl.load(KEYS + keys + d, mask=(j < nk)[:, None] & (d < D), other=0.0)
            s = tl.dot(q, tl.trans(k), s, input_precision="tf32x3")
        rows = head.to(tl.int64) * n + i
        mask = (i < n)[:, None] & (j < nk)[None, :]
        tl.store(SCORES + rows[:, None] * nk + j[None, :], s, mask=mask)


@triton.jit(do_not_specialize="H n first nk window".split())
def _antidiagonal(
    Q, K, SCORES, TOTALS, Q_LEN, K_LEN,
    q_b: tl.int64, q_h: tl.int64, q_s, k_b: tl.int64, k_h: tl.int64, k_s,
    H, group, n, first, nk, window, unit,
    D: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, STRIDE: tl.constexpr,
    PER: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of exponentials of QUERIES groups of queries by key block, and over all blocks.

    Group g of queries meets group m of keys in the STRIDE products of its last query with the
    first key, the one before with the next, and so on: one product of rows STRIDE * D long.
    Exponents count from the maximum of the first tile that a group sees, which holds the sinks or
    a window's oldest keys; 100 is where they end, so that no sum overflows.
    """
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    q_len, k_len = tl.load(Q_LEN + b).to(tl.int32), tl.load(K_LEN + b).to(tl.int32)
    slot = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    g = first + slot
    q0 = k_len - q_len + g * STRIDE
    q1 = k_len - q_len + tl.minimum(g * STRIDE + STRIDE, q_len) - 1
    q1 = tl.where(q1 >= q0, q1, -1)  # a group without queries
    lane, d = tl.arange(0, KEYS), tl.arange(0, DEPTH)
    queries = (
        Q + b * q_b + h * q_h + (first + tl.program_id(0) * QUERIES).to(tl.int64) * STRIDE * q_s
    )
    keys = K + b * k_b + (h // group) * k_h
    within = tl.arange(0, QUERIES)[:, None] * (STRIDE * q_s) + d[None, :]
    base = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    rows = SCORES + (head.to(tl.int64) * n + slot[:, None]) * nk
    end = (tl.max(q1, 0) + STRIDE) // STRIDE  # groups of keys
    for m0 in range(0, end, KEYS):
        tile = keys + k_s.to(tl.int64) * (m0 * STRIDE)
        s = tl.zeros([QUERIES, KEYS], tl.float32)
        for x in range(0, STRIDE * STEPS):
            t, d0 = x // STEPS, x % STEPS * DEPTH
            real = (g * STRIDE + STRIDE - 1 - t < q_len)[:, None] & (d0 + d < D)[None, :]
            a = tl.load(queries + (STRIDE - 1 - t) * q_s + d0 + within, mask=real, other=0.0)
            real = ((m0 + lane) * STRIDE + t < k_len)[:, None] & (d0 + d < D)[None, :]
            at = lane[:, None] * (STRIDE * k_s) + t * k_s + d0 + d[None, :]
            c = tl.load(tile + at, mask=real, other=0.0)
            s = tl.dot(a, tl.trans(c), s, input_precision=PRECISION)
        k0 = (m0 + lane) * STRIDE
        seen = k0[None, :] <= q1[:, None]  # so k0 is real: q1 < k_len
        if WINDOW:
            k1 = tl.minimum(k0 + STRIDE, k_len) - 1
            seen &= q0[:, None] - k1[None, :] < window
        s = tl.where(seen, s * unit, float("-inf"))
        base = tl.where(base > float("-inf"), base, tl.max(s, 1))
        p = tl.exp2(tl.minimum(s - tl.where(base > float("-inf"), base, 0.0)[:, None], 100.0))
        blocks = tl.sum(tl.reshape(p, [QUERIES, KEYS // PER, PER]), 2)
        total += tl.sum(blocks, 1)
        j = m0 // PER + tl.arange(0, KEYS // PER)
        tl.store(rows + j[None, :], blocks, mask=(slot < n)[:, None] & (j < nk)[None, :])
    tl.store(TOTALS + head.to(tl.int64) * n + slot, total, mask=slot < n)


@triton.jit(do_not_specialize="H Sk window".split())
def _probe(
    Q, K, TOP, TOTAL, COLUMN, DIAGONAL, Q_LEN, K_LEN,
    q_b: tl.int64, q_h: tl.int64, q_s, k_b: tl.int64, k_h: tl.int64, k_s,
    H, group, Sk, window, unit,
    D: tl.constexpr, DP: tl.constexpr, PROBES: tl.constexpr, SPLITS: tl.constexpr,
    SUMS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First the softmax statistics of the probes over a split of the keys; then (SUMS) the sums.

    Keys come in tiles as wide as there are probes, so a diagonal crosses at most two: adding it up
    by atomics gives the same in any order.
    """
    split, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    q_len, k_len = tl.load(Q_LEN + b).to(tl.int32), tl.load(K_LEN + b).to(tl.int32)
    lane, d = tl.arange(0, PROBES), tl.arange(0, DP)
    row = q_len - PROBES + lane
    at = k_len - q_len + row
    real = (row >= 0)[:, None] & (d < D)[None, :]
    q = Q + b * q_b + h * q_h + row.to(tl.int64)[:, None] * q_s + d[None, :]
    q = tl.load(q, mask=real, other=0.0)
    keys = K + b * k_b + (h // group) * k_h
    stats = head.to(tl.int64) * SPLITS * PROBES + lane
    if SUMS:
        every = stats[None, :] + tl.arange(0, SPLITS)[:, None] * PROBES
        parts = tl.load(TOP + every)
        top = tl.max(parts, 0)
        top = tl.where(top > float("-inf"), top, 0.0)
        total = tl.sum(tl.load(TOTAL + every) * tl.exp2(parts - top[None, :]), 0)
        total = tl.where(total > 0, total, 1.0)
    else:
        top = tl.full([PROBES], float("-inf"), tl.float32)
        total = tl.zeros([PROBES], tl.float32)
    share = tl.cdiv(tl.cdiv(k_len, PROBES), SPLITS) * PROBES
    for n0 in range(split * share, tl.minimum(split * share + share, k_len), PROBES):
        key = n0 + lane
        live = (key < k_len)[:, None] & (d < D)[None, :]
        k = keys + k_s.to(tl.int64) * n0 + lane[:, None] * k_s + d[None, :]
        k = tl.load(k, mask=live, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * unit
        seen = (key[None, :] <= at[:, None]) & (row >= 0)[:, None]
        if WINDOW:
            seen &= at[:, None] - key[None, :] < window
        s = tl.where(seen, s, float("-inf"))
        if SUMS:
            p = tl.exp2(s - top[:, None]) / total[:, None]
            column = COLUMN + head.to(tl.int64) * Sk + key
            tl.store(column, tl.sum(p, 0), mask=key < k_len)
            # diagonal e of the tile holds key PROBES - 1 + r - e of probe r
            e = tl.arange(0, 2 * PROBES)
            place = PROBES - 1 + lane[:, None] - e[None, :]
            inside = (place >= 0) & (place < PROBES)
            p = tl.gather(p, tl.where(inside, place, 0), 1)
            mass = tl.sum(tl.where(inside, p, 0.0), 0)
            far = k_len - PROBES - n0 - (PROBES - 1) + e
            diagonal = DIAGONAL + head.to(tl.int64) * Sk + far
            tl.atomic_add(diagonal, mass, mask=(far >= 0) & (far < k_len), sem="relaxed")
        else:
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new > float("-inf"), new, 0.0)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
            top = new
    if not SUMS:
        tl.store(TOP + stats + split * PROBES, top)
        tl.store(TOTAL + stats + split * PROBES, total)
