"""The fused choice of antidiagonal heads, which is bound by FLOPs."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton import select as triton_select
from hfsparse.kernels.triton.limits import LOG2E, shared_memory
from hfsparse.kernels.triton.select import slices, wide
from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.antidiagonal import STRIDE, Antidiagonal


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
    for first, scores in slices(found, grid.block // stride, queries * stride // grid.block):
        n, groups = scores.shape[2:4]
        totals = torch.empty(B, H, n, groups, dtype=torch.float32, device=q.device)
        _antidiagonal[(triton.cdiv(n * groups, queries), B * H)](
            *(q, k, scores, totals, grid.q_len, grid.k_len, *q.stride()[:3], *k.stride()[:3]),
            *(H, H // k.shape[1], n * groups, first * groups, grid.nk, grid.window or 0),
            scale * LOG2E.value / stride,
            D=D,
            DEPTH=min(depth, wide(q)),
            STEPS=triton.cdiv(D, min(depth, wide(q))),
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
