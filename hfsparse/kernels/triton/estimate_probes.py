"""Fused choices by the exact attention of a row's last queries: vertical_slash."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton import select as triton_select
from hfsparse.kernels.triton.limits import LOG2E, shared_memory
from hfsparse.kernels.triton.select import wide
from hfsparse.lists import FAR, BlockLists, Grid
from hfsparse.patterns.vertical_slash import (
    FORCED_COLUMNS,
    FORCED_DIAGONALS,
    PROBES,
    VerticalSlash,
)

SPLITS = 16  # programs that share the keys of a head's probes


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


def probe(
    q: Tensor, k: Tensor, grid: Grid, scale: float, count: int = PROBES
) -> tuple[Tensor, Tensor]:
    """Attention of each row's last `count` queries, by key and by distance: two `[B, H, Sk]`.

    count: a multiple of PROBES. So many at a time are served by a program.
    """
    (B, H), D, parts = q.shape[:2], q.shape[-1], count // PROBES
    single = {"dtype": torch.float32, "device": q.device}
    by_column, by_diagonal = (torch.zeros(parts, B, H, grid.Sk, **single) for _ in range(2))
    top, total = (torch.empty(parts, B, H, SPLITS, PROBES, **single) for _ in range(2))
    for sums in (False, True):
        _probe[(SPLITS, B * H, parts)](
            *(q, k, top, total, by_column, by_diagonal, grid.q_len, grid.k_len),
            *(*q.stride()[:3], *k.stride()[:3]),
            *(H, H // k.shape[1], grid.Sk, grid.window or 0, scale * LOG2E.value),
            D=D,
            DP=wide(q),
            PROBES=PROBES,
            SPLITS=SPLITS,
            SUMS=sums,
            WINDOW=grid.window is not None,
            PRECISION="tf32" if q.element_size() == 2 else "tf32x3",
            num_stages=stages(q.device, q.dtype, D),
        )
    return by_column.sum(0), by_diagonal.sum(0)


def _top(score: Tensor, forced: int, count: int, ends: Tensor) -> Tensor:
    """Ascending positions of the `count` best scores `[B, H, S]`, the first `forced` among them."""
    at = torch.arange(score.shape[-1], device=score.device)
    score = score.masked_fill(at < min(forced, count), torch.inf)
    score = score.masked_fill(at >= ends, -torch.inf)
    best = score.topk(min(count, score.shape[-1]), sorted=False).indices
    return torch.where(best < ends, best, FAR).sort(-1).values


def stages(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Tiles of keys in flight beside the probes, as shared memory allows; 0: not even one."""
    width = max(16, triton.next_power_of_2(head_dim))
    tile, copies = PROBES * width * dtype.itemsize, dtype.itemsize // 2
    room = shared_memory(str(device)) - 4 * PROBES**2  # that of the diagonals' shift
    return next((n for n in (3, 1) if tile * (2 * copies + n - 1) <= room), 0)


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
    split, head, back = tl.program_id(0), tl.program_id(1), tl.program_id(2) * PROBES
    b, h = (head // H).to(tl.int64), head % H
    slot = (tl.program_id(2) * tl.num_programs(1) + head).to(tl.int64)  # of statistics and sums
    q_len, k_len = tl.load(Q_LEN + b).to(tl.int32), tl.load(K_LEN + b).to(tl.int32)
    lane, d = tl.arange(0, PROBES), tl.arange(0, DP)
    row = q_len - PROBES - back + lane
    at = k_len - q_len + row
    real = (row >= 0)[:, None] & (d < D)[None, :]
    q = Q + b * q_b + h * q_h + row.to(tl.int64)[:, None] * q_s + d[None, :]
    q = tl.load(q, mask=real, other=0.0)
    keys = K + b * k_b + (h // group) * k_h
    stats = slot * SPLITS * PROBES + lane
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
            column = COLUMN + slot * Sk + key
            tl.store(column, tl.sum(p, 0), mask=key < k_len)
            # diagonal e of the tile holds key PROBES - 1 + r - e of probe r
            e = tl.arange(0, 2 * PROBES)
            place = PROBES - 1 + lane[:, None] - e[None, :]
            inside = (place >= 0) & (place < PROBES)
            p = tl.gather(p, tl.where(inside, place, 0), 1)
            mass = tl.sum(tl.where(inside, p, 0.0), 0)
            far = k_len - PROBES - back - n0 - (PROBES - 1) + e
            diagonal = DIAGONAL + slot * Sk + far
            tl.atomic_add(diagonal, mass, mask=(far >= 0) & (far < k_len), sem="relaxed")
        else:
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new > float("-inf"), new, 0.0)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
            top = new
    if not SUMS:
        tl.store(TOP + stats + split * PROBES, top)
        tl.store(TOTAL + stats + split * PROBES, total)
