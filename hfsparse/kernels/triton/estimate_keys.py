"""Patterns that choose by scores of single keys, scored in Triton: `sample` and `hip`.

`sampled` is bound by FLOPs, two passes over the keys for one query of a stride; `halved` by reading
two keys of a block for each halving. Grids with dropped keys are not served.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.estimate_probes import stages
from hfsparse.kernels.triton.limits import LOG2E, load_rows
from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.hip import EVERY, HiP
from hfsparse.patterns.sample import Sample

TILE = 64  # sampled queries of a program and keys of a tile, or blocks of a program
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


def sample(pattern: Sample, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """As Sample.lists."""
    in_flight = stages(q.device, q.dtype, q.shape[-1])
    return pattern.chosen(sampled(q, k, grid, scale, pattern.stride, in_flight), grid)


def hip(pattern: HiP, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """As HiP.lists."""
    return pattern.chosen(halved(q, k, grid), grid)


def sampled(q: Tensor, k: Tensor, grid: Grid, scale: float, stride: int, in_flight: int) -> Tensor:
    """As `sample.scores`: int64 `[B, H, Sk]`; in_flight: tiles of keys."""
    (B, H, Sq, D), stride = q.shape, min(stride, q.shape[2])
    mass = torch.zeros(B, H, grid.Sk, dtype=torch.int64, device=q.device)
    _sampled[(triton.cdiv(triton.cdiv(Sq, stride), TILE), B * H)](
        *(q, k, mass, grid.q_len, grid.k_len, *q.stride()[:3], *k.stride()[:3]),
        *(H, H // k.shape[1], grid.Sk, stride, grid.window or 0, scale * LOG2E.value),
        D=D,
        DP=_wide(D),
        TILE=TILE,
        WINDOW=grid.window is not None,
        PRECISION=_precision(q),
        num_stages=in_flight,
    )
    return mass


def halved(q: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """As `hip.scores`: float32 `[B, H, nq, nk]`, of blocks that end before the queries begin."""
    B, H, _, D = q.shape
    out = torch.empty(B, H, grid.nq, grid.nk, dtype=torch.float32, device=q.device)
    tile = TILE if q.element_size() == 2 else TILE // 2
    _halved[(grid.nq, triton.cdiv(grid.nk, tile), B * H)](
        *(q, k, out, grid.q_len, grid.k_len, *q.stride()[:3], *k.stride()[:3]),
        *(H, H // k.shape[1], grid.nq, grid.nk, grid.window or 0),
        D=D,
        DP=_wide(D),
        BLOCK=grid.block,
        EVERY=EVERY,
        ROWS=max(16, grid.block // EVERY),
        TILE=tile,
        WINDOW=grid.window is not None,
        PRECISION=_precision(q),
    )
    return out


def _wide(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def _precision(q: Tensor) -> str:
    return "tf32" if q.element_size() == 2 else "tf32x3"


@triton.jit(do_not_specialize="H Sk stride window".split())
def _sampled(
    Q, K, MASS, Q_LEN, K_LEN,
    q_b: tl.int64, q_h: tl.int64, q_s, k_b: tl.int64, k_h: tl.int64, k_s,
    H, group, Sk, stride, window, unit,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """First the softmax statistics of TILE queries, `stride` apart, then their sums by key."""
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    q_len, k_len = tl.load(Q_LEN + b).to(tl.int32), tl.load(K_LEN + b).to(tl.int32)
    lane = tl.arange(0, TILE)
    newest = q_len - 1 - tl.program_id(0) * TILE * stride  # the first of the queries
    row = newest - lane * stride
    real = row >= 0
    at = k_len - q_len + row
    end = tl.where(newest >= 0, k_len - q_len + newest + 1, 0)
    begin = 0
    if WINDOW:
        begin = tl.maximum(end - TILE * stride - window, 0) // TILE * TILE
    q = load_rows(Q + b * q_b + h * q_h, q_s, row.to(tl.int64), real, D, DP, True)
    keys = K + b * k_b + (h // group) * k_h
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for n0 in range(begin, end, TILE):
        key = n0 + lane
        s = _logits(q, keys, k_s, key, end, at, real, window, unit, D, DP, WINDOW, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new > float("-inf"), new, 0.0)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = new
    top = tl.where(top > float("-inf"), top, 0.0)
    total = tl.where(total > 0, total, 1.0)
    for n0 in range(begin, end, TILE):
        key = n0 + lane
        s = _logits(q, keys, k_s, key, end, at, real, window, unit, D, DP, WINDOW, PRECISION)
        mass = tl.exp2(s - top[:, None]) / total[:, None]
        counted = (mass * 4294967296.0).to(tl.int64)  # as `shares.counted`
        column = MASS + head.to(tl.int64) * Sk + key
        tl.atomic_add(column, tl.sum(counted, 0), mask=key < end, sem="relaxed")


@triton.jit
def _logits(
    q, keys, k_s, key, end, at, real, window, unit,
    D: tl.constexpr, DP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 of queries at `at` and a tile of keys; -inf where they don't meet."""
    k = load_rows(keys, k_s, key.to(tl.int64), key < end, D, DP, True)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * unit
    seen = (key[None, :] <= at[:, None]) & real[:, None]
    if WINDOW:
        seen &= at[:, None] - key[None, :] < window
    return tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize="H nq nk window".split())
def _halved(
    Q, K, OUT, Q_LEN, K_LEN,
    q_b: tl.int64, q_h: tl.int64, q_s, k_b: tl.int64, k_h: tl.int64, k_s,
    H, group, nq, nk, window,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, EVERY: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query block and TILE key blocks, of which those before it are halved side by side."""
    i, head = tl.program_id(0), tl.program_id(2)
    b, h = (head // H).to(tl.int64), head % H
    q_len, k_len = tl.load(Q_LEN + b).to(tl.int32), tl.load(K_LEN + b).to(tl.int32)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    before = (block + 1) * BLOCK <= k_len - q_len + i * BLOCK
    if tl.max(before.to(tl.int32), 0) == 0:
        return
    lane = tl.arange(0, ROWS) * EVERY
    row = i * BLOCK + lane
    asked = (lane < BLOCK) & (row < q_len)
    at = k_len - q_len + row
    q = load_rows(Q + b * q_b + h * q_h, q_s, row.to(tl.int64), asked, D, DP, True)
    keys = K + b * k_b + (h // group) * k_h
    first, best = block * BLOCK, tl.zeros([TILE], tl.float32)
    half = BLOCK // 2
    while half > 0:
        key = first + half // 2
        left = _match(q, keys, k_s, key, before, at, asked, window, D, DP, WINDOW, PRECISION)
        key += half
        right = _match(q, keys, k_s, key, before, at, asked, window, D, DP, WINDOW, PRECISION)
        first += tl.where(right > left, half, 0)
        best = tl.maximum(left, right)
        half = half // 2
    place = (head.to(tl.int64) * nq + i) * nk + block
    tl.store(OUT + place, best, mask=before)


@triton.jit
def _match(
    q, keys, k_s, key, before, at, asked, window,
    D: tl.constexpr, DP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest product of each key with one of the queries that see it."""
    k = load_rows(keys, k_s, key.to(tl.int64), before, D, DP, True)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    seen = before[None, :] & asked[:, None]
    if WINDOW:
        seen &= at[:, None] - key[None, :] < window
    return tl.max(tl.where(seen, s, LEAST), 0)
