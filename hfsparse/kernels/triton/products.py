"""Products of a few rows with up to three matrices in Triton, in one launch.

A step reads each weight once for its rows: what bounds it is memory, and how soon every processor
has something to read. For one row a program holds a few rows of a matrix, and sums over what it
read of them at the end; several rows meet tensor cores. Products that share their input (queries,
keys and values; gate and up) are one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import await_previous, chained

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

MOST = 3  # matrices of a launch
ROWS = 4  # of a tile of a matrix, at most
TILE, WIDEST = 8192, 4096  # numbers of a tile of a matrix, for one row, and columns of the widest
COLUMNS = 2048  # of tiles of which a row takes several
FEW_ROWS, FEW_COLUMNS, STAGES = 16, 128, 3  # for several: a warp's columns, and tiles on their way
WARPS = 4
PADDED = 8  # rows that tensor cores are given
DTYPES = (torch.bfloat16, torch.float16)


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16 and float16 are supported"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def _tile(K: int, several: bool) -> tuple[int, int]:
    """Rows and columns of a matrix `[N, K]` that a program reads at a time."""
    columns = triton.next_power_of_2(K)
    if several:
        return FEW_ROWS, min(FEW_COLUMNS, max(16, columns))
    columns = columns if columns <= WIDEST else COLUMNS
    return min(ROWS, max(1, TILE // columns)), columns


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """As `plain.products`, of up to PADDED rows x `[..., K]`; sums are float32, rounded once."""
    x, K, total = x.contiguous(), x.shape[-1], sum(len(w) for w in weights)
    out, several, first = x.new_empty(*x.shape[:-1], total), x.numel() > K, 0
    tall, columns = _tile(K, several)
    for at in range(0, len(weights), MOST):
        some, added = list(weights[at : at + MOST]), list(biases[at : at + MOST])
        sizes, spare = [len(w) for w in some], MOST - len(some)
        biased = tuple(b is not None for b in added)
        added = [w if b is None else b for w, b in zip(some, added, strict=True)]
        _products[(sum(triton.cdiv(n, tall) for n in sizes),)](
            *(x, *some, *some[:1] * spare, *added, *some[:1] * spare),
            *(out[..., first:], x.numel() // K, total, K, *sizes, *[0] * spare),
            ROWS=tall,
            COLUMNS=columns,
            WHOLE=K % (columns * WARPS if several else columns) == 0,
            BIASED=biased + (False,) * spare,
            SEVERAL=several,
            STAGES=STAGES,
            WARPS=WARPS,
            PADDED=PADDED,
            num_warps=WARPS,
            **chained(str(x.device)),
        )
        first += sum(sizes)
    return out


@triton.jit(do_not_specialize="R n0 n1 n2".split())
def _products(
    X, W0, W1, W2, B0, B1, B2, OUT, R, total, K, n0, n1, n2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr,
    SEVERAL: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, PADDED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    at, many0, many1 = tl.program_id(0), tl.cdiv(n0, ROWS), tl.cdiv(n1, ROWS)
    # fmt: off
    if at < many0:
        _product(X, W0, B0, OUT, R, total, K, n0, at,
                 ROWS, COLUMNS, WHOLE, BIASED[0], SEVERAL, STAGES, WARPS, PADDED)
    elif at < many0 + many1:
        _product(X, W1, B1, OUT + n0, R, total, K, n1, at - many0,
                 ROWS, COLUMNS, WHOLE, BIASED[1], SEVERAL, STAGES, WARPS, PADDED)
    else:
        at -= many0 + many1
        _product(X, W2, B2, OUT + n0 + n1, R, total, K, n2, at,
                 ROWS, COLUMNS, WHOLE, BIASED[2], SEVERAL, STAGES, WARPS, PADDED)
    # fmt: on


@triton.jit
def _product(
    X, W, B, OUT, R, total, K, n, at,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr,
    SEVERAL: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    if SEVERAL:
        _product_of_rows(
            *(X, W, B, OUT, R, total, K, n, at, ROWS, COLUMNS, WHOLE, BIASED),
            *(STAGES, WARPS, PADDED),
        )
    else:
        _product_of_row(X, W, B, OUT, K, n, at, ROWS, COLUMNS, WHOLE, BIASED)


@triton.jit
def _product_of_row(
    X, W, B, OUT, K, n, at,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    row, column = at * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = row < n
    w_at = W + row.to(tl.int64)[:, None] * K + column[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, K, COLUMNS):
        if WHOLE:
            x = tl.load(X + first + column)
            w = tl.load(w_at + first, mask=inside[:, None], other=0.0)
        else:
            live = first + column < K
            x = tl.load(X + first + column, mask=live, other=0.0)
            w = tl.load(w_at + first, mask=inside[:, None] & live[None, :], other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(acc, 1)
    if BIASED:
        out += tl.load(B + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _product_of_rows(
    X, W, B, OUT, R, total, K, n, at,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Each warp sums over columns of its own, `[WARPS, ROWS, PADDED]`."""
    row, r = at * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    column = tl.arange(0, WARPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, rows = (row < n)[None, :, None], (r < R)[None, None, :]
    w_at = W + row.to(tl.int64)[None, :, None] * K + column[:, None, :]
    x_at = X + r[None, None, :] * K + column[:, :, None]
    acc = tl.zeros([WARPS, ROWS, PADDED], tl.float32)
    for first in tl.range(0, K, COLUMNS * WARPS, num_stages=STAGES):
        if WHOLE:
            w = tl.load(w_at + first, mask=inside, other=0.0)
            x = tl.load(x_at + first, mask=rows, other=0.0)
        else:
            live = first + column < K
            w = tl.load(w_at + first, mask=inside & live[:, None, :], other=0.0)
            x = tl.load(x_at + first, mask=rows & live[:, :, None], other=0.0)
        acc = tl.dot(w, x, acc)
    out = tl.sum(acc, 0)
    if BIASED:
        out += tl.load(B + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
    out_at = OUT + r[None, :] * total + row[:, None]
    tl.store(out_at, out.to(OUT.dtype.element_ty), mask=(row < n)[:, None] & (r < R)[None, :])
