"""Fused choices by the means of blocks: block_topk, energy and sparge."""

from __future__ import annotations

from dataclasses import replace
from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton import select as triton_select
from hfsparse.kernels.triton.limits import LOG2E
from hfsparse.kernels.triton.select import slices, wide
from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.energy import Energy
from hfsparse.patterns.sparge import Sparge, centre


def block_topk(pattern: BlockTopK, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """As BlockTopK.lists."""
    found = triton_select.empty(grid, q.shape[1], pattern.width(grid.nk))
    queries = means(q, grid.q_len, grid.nq, grid.block)
    keys = means(k, grid.k_len, grid.nk, grid.block)
    for first, scores in slices(found, 1):
        products(queries, keys, scores, first, grid)
        triton_select.best_blocks(
            found, scores, first, share=pattern.share, least=pattern.min_blocks
        )
    return found


def energy(pattern: Energy, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """As Energy.lists."""
    (B, H), D, block = q.shape[:2], q.shape[-1], grid.block
    found = triton_select.empty(grid, H, pattern.width(grid.nk))
    found = replace(found, cut=torch.zeros(B, H, dtype=torch.int64, device=q.device))
    keys, short = means(k, grid.k_len, grid.nk, block), q.element_size() == 2
    for first, scores in slices(found, 1):
        _energy[(scores.shape[2], B * H)](
            *(q, keys, scores, grid.q_len, grid.k_len, *q.stride()[:3]),
            *(H, H // k.shape[1], scores.shape[2], first, grid.nk, grid.window or 0),
            scale * LOG2E.value,
            D=D,
            DEPTH=min(64 if short else 32, wide(q)),
            BLOCK=block,
            KEYS=64,
            WINDOW=grid.window is not None,
            PRECISION="tf32" if short else "tf32x3",
            num_warps=8 if block == 128 else 4,
        )
        triton_select.best_blocks(
            *(found, scores, first),
            share=pattern.max_share,
            margin=log2(pattern.alpha),
            always=(pattern.sink_blocks, pattern.recent_blocks, pattern.dense_blocks),
        )
    return found


def sparge(pattern: Sparge, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """As Sparge.lists."""
    B, H, block = *q.shape[:2], grid.block
    found = triton_select.empty(grid, H, grid.nk)
    if pattern.tau < 1:
        found = replace(found, cut=torch.zeros(B, H, dtype=torch.int64, device=q.device))
    queries, keys = means(q, grid.q_len, grid.nq, block), means(k, grid.k_len, grid.nk, block)
    zero = torch.zeros_like(queries[:, :, 0])
    whole = (
        _unlike(q, zero, grid.q_len, grid.nq, block, float(pattern.theta)),
        _unlike(k, centre(keys, grid), grid.k_len, grid.nk, block, float(pattern.theta)),
    )
    for first, scores in slices(found, 1):
        products(queries, keys, scores, first, grid)
        triton_select.best_blocks(
            *(found, scores, first),
            share=pattern.max_share,
            tau=pattern.tau if pattern.tau < 1 else None,
            unit=scale * LOG2E.value,
            whole=whole,
        )
    return found


def products(queries: Tensor, keys: Tensor, scores: Tensor, first: int, grid: Grid) -> None:
    """Write products of the mean queries from `first` on, and mean keys, into scores."""
    B, H, n, _, nk = scores.shape
    _pooled[(triton.cdiv(n, 32), triton.cdiv(nk, 64), B * H)](
        *(queries, keys, scores, grid.q_len, grid.k_len),
        *(H, H // keys.shape[1], n, first, grid.nq, nk),
        D=queries.shape[-1],
        DEPTH=min(64, wide(queries)),
        BLOCK=grid.block,
    )


def means(x: Tensor, length: Tensor, n: int, block: int) -> Tensor:
    """Mean of each block's real tokens: x `[B, H, S, D]` to float32 `[B, H, n, D]`."""
    B, H, _, D = x.shape
    out = torch.empty(B, H, n, D, dtype=torch.float32, device=x.device)
    _mean[(n, B * H)](
        *(x, out, length, *x.stride()[:3], H, n), D=D, DP=wide(x), BLOCK=block, num_warps=4
    )
    return out


def _unlike(x: Tensor, origin: Tensor, length: Tensor, n: int, block: int, theta: float) -> Tensor:
    """Blocks whose mean cosine is not above theta: x `[B, H, S, D]` to uint8 `[B, H, n]`.

    Vectors begin at `origin` `[B, H, D]`.
    """
    B, H, _, D = x.shape
    out = torch.empty(B, H, n, dtype=torch.uint8, device=x.device)
    _cosines[(n, B * H)](
        *(x, origin, out, length, *x.stride()[:3], H, n, theta),
        D=D,
        DP=wide(x),
        BLOCK=block,
        num_warps=4 if D <= 128 else 8,
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


@triton.jit(do_not_specialize=("H", "n"))
def _cosines(
    X, ORIGIN, OUT, LENGTH, x_b: tl.int64, x_h: tl.int64, x_s, H, n, theta,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether the squared length of the block's mean unit vector is not above theta."""
    i, head = tl.program_id(0), tl.program_id(1)
    live = tl.minimum(tl.load(LENGTH + head // H).to(tl.int32) - i * BLOCK, BLOCK)
    lane, d = tl.arange(0, BLOCK), tl.arange(0, DP)
    at = X + (head // H) * x_b + (head % H) * x_h + i.to(tl.int64) * BLOCK * x_s
    mask = (lane < live)[:, None] & (d < D)[None, :]
    x = tl.load(at + lane[:, None] * x_s + d[None, :], mask=mask, other=0.0).to(tl.float32)
    origin = tl.load(ORIGIN + head.to(tl.int64) * D + d, mask=d < D, other=0.0)
    x = tl.where(mask, x - origin[None, :], 0.0)
    long = tl.sqrt(tl.sum(x * x, 1))
    mean = tl.sum(x / tl.where(long > 0, long, 1.0)[:, None], 0) / tl.maximum(live, 1)
    alike = tl.minimum(tl.sum(mean * mean, 0), 1.0) > theta
    tl.store(OUT + head.to(tl.int64) * n + i, tl.where(alike, 0, 1).to(tl.uint8))


@triton.jit(do_not_specialize="H n first nk window".split())
def _energy(
    Q, KEYS_MEAN, SCORES, Q_LEN, K_LEN, q_b: tl.int64, q_h: tl.int64, q_s,
    H, group, n, first, nk, window, unit,
    D: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logarithms to base 2 of the energies of one query block.

    Each counts from the largest logit of its key block, so none is lost whatever the others are.
    """
    slot, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    q_len, k_len = tl.load(Q_LEN + b).to(tl.int32), tl.load(K_LEN + b).to(tl.int32)
    row = (first + slot) * BLOCK + tl.arange(0, BLOCK)
    p = tl.where(row < q_len, k_len - q_len + row, -1)
    queries = Q + b * q_b + h * q_h + row.to(tl.int64)[:, None] * q_s
    keys = KEYS_MEAN + (head // group).to(tl.int64) * nk * D
    out = SCORES + (head.to(tl.int64) * n + slot) * nk
    lane = tl.arange(0, KEYS)
    end = (tl.max(p, 0) + BLOCK) // BLOCK
    for j0 in range(0, end, KEYS):
        j = j0 + lane
        s = tl.zeros([BLOCK, KEYS], tl.float32)
        for d0 in range(0, D, DEPTH):
            d = d0 + tl.arange(0, DEPTH)[None, :]
            q = tl.load(queries + d, mask=(row < q_len)[:, None] & (d < D), other=0.0)
            k = tl.load(keys + j[:, None] * D + d, mask=(j < nk)[:, None] & (d < D), other=0.0)
            s = tl.dot(q.to(tl.float32), tl.trans(k), s, input_precision=PRECISION)
        k0 = j * BLOCK
        seen = k0[None, :] <= p[:, None]
        if WINDOW:
            k1 = tl.minimum(k0 + BLOCK, k_len) - 1
            seen &= p[:, None] - k1[None, :] < window
        s = tl.where(seen, s * unit, float("-inf"))
        top = tl.max(s, 0)
        base = tl.where(top > float("-inf"), top, 0.0)
        total = tl.sum(tl.exp2(s - base[None, :]), 0)
        tl.store(out + j, base + tl.log2(total), mask=j < nk)
