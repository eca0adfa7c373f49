"""Products of a few rows with a matrix of codes in Triton: codes become numbers in registers.

What bounds it is reading the codes, once for all rows: an H200 takes 1.1 to 2.0 times as long as
its memory needs for matrices of 17 MB and more (benchmarks/results/decode.md). Several rows, and
int8, which is slow to become float32, meet tensor cores: codes are exact in bf16 and fp16, and
scales come behind. By definition: `plain.quantised`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.codes import Quantised
from hfsparse.kernels.triton.limits import await_previous, chained, is_nvidia

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

# Of a tile of the matrix: rows, columns, and how many tiles are on their way at once.
ROW = (8, 1024, 3)  # for one row of x
ROWS = (16, 128, 3)  # for more, each of 4 warps a tile
WARPS = 4
PADDED = 8  # rows of x that tensor cores are given
DTYPES = (torch.bfloat16, torch.float16)
FP8_FROM = (8, 9)  # compute capability


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16 and float16 are supported"
    if need.grad:
        return "no gradients: call under torch.no_grad()"
    fp8 = need.codes == torch.float8_e4m3fn and is_nvidia(str(need.device))
    if fp8 and torch.cuda.get_device_capability(need.device) < FP8_FROM:
        return "no fp8 before compute capability 8.9"
    return None


def product(x: Tensor, matrix: Quantised, bias: Tensor | None) -> Tensor:
    """As `plain.quantised`, of up to 8 rows; sums are float32, and rounded once."""
    codes, scale, zero = matrix
    x, (N, K) = x.contiguous(), codes.shape
    out, rows = x.new_empty(*x.shape[:-1], N), x.numel() // K
    one = rows == 1 and codes.dtype != torch.int8
    tall, wide, stages = ROW if one else ROWS
    group = 0 if matrix.group == K else matrix.group
    if group:
        wide = max(wide, group) if one else min(wide, group)
    kernel = _product_of_row if one else _product_of_rows
    kernel[(triton.cdiv(N, tall),)](
        *(x, codes, scale, scale if zero is None else zero, out if bias is None else bias, out),
        *(rows, N, K, scale.stride(0)),
        ROWS=tall,
        COLUMNS=wide,
        STAGES=stages,
        PADDED=PADDED,
        WARPS=WARPS,
        WHOLE=K % (wide if one else wide * WARPS) == 0,
        GROUP=group,
        ZEROS=zero is not None,
        BIASED=bias is not None,
        num_warps=WARPS,
        **chained(str(x.device)),
    )
    return out


@triton.jit(do_not_specialize=["R"])
def _product_of_row(
    X, W, S, Z, B, OUT, R, N, K, s_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BIASED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = row < N
    w_at = W + row.to(tl.int64)[:, None] * K + column[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, K, COLUMNS, num_stages=STAGES):
        live = column < K - first
        kept = inside[:, None] if WHOLE else inside[:, None] & live[None, :]
        number = tl.load(w_at + first, mask=kept, other=0.0).to(tl.float32)
        if WHOLE:
            x = tl.load(X + first + column)
        else:
            x = tl.load(X + first + column, mask=live, other=0.0)
        if GROUP:
            GROUPS: tl.constexpr = COLUMNS // GROUP
            group = first // GROUP + tl.arange(0, GROUPS)
            at = row[:, None] * s_row + group[None, :]
            held = inside[:, None] & (group < K // GROUP)[None, :]
            number = tl.reshape(number, [ROWS, GROUPS, GROUP])
            if ZEROS:
                number -= tl.load(Z + at, mask=held, other=0).to(tl.float32)[:, :, None]
            number *= tl.load(S + at, mask=held, other=0.0).to(tl.float32)[:, :, None]
            number = tl.reshape(number, [ROWS, COLUMNS])
        acc += number * x.to(tl.float32)[None, :]
    out = tl.sum(acc, 1)
    if not GROUP:
        out *= tl.load(S + row * s_row, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        out += tl.load(B + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def _product_of_rows(
    X, W, S, Z, B, OUT, R, N, K, s_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BIASED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Each warp sums over tiles of its own, [WARPS, ROWS, PADDED]; a tile lies in one group."""
    await_previous(CHAINED)
    row, r = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    column = tl.arange(0, WARPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, rows = row < N, (r < R)[None, None, :]
    w_at = W + row.to(tl.int64)[None, :, None] * K + column[:, None, :]
    x_at = X + r[None, None, :] * K + column[:, :, None]
    acc = tl.zeros([WARPS, ROWS, PADDED], tl.float32)
    for first in tl.range(0, K, COLUMNS * WARPS, num_stages=STAGES):
        live = column < K - first
        kept = inside[None, :, None] if WHOLE else inside[None, :, None] & live[:, None, :]
        code = tl.load(w_at + first, mask=kept, other=0.0)
        x = tl.load(x_at + first, mask=rows if WHOLE else rows & live[:, :, None], other=0.0)
        if code.dtype != tl.int8:  # on Hopper the way through float32 is shorter
            code = code.to(tl.float32)
        if GROUP:
            group = (first + tl.arange(0, WARPS) * COLUMNS) // GROUP
            at = row[None, :] * s_row + group[:, None]
            held = inside[None, :] & (group < K // GROUP)[:, None]
            if ZEROS:
                code = code.to(tl.float32)
                code -= tl.load(Z + at, mask=held, other=0).to(tl.float32)[:, :, None]
            s = tl.load(S + at, mask=held, other=0.0).to(tl.float32)
            acc += tl.dot(code.to(x.dtype), x) * s[:, :, None]
        else:
            acc = tl.dot(code.to(x.dtype), x, acc)
    out = tl.sum(acc, 0)
    if not GROUP:
        out *= tl.load(S + row * s_row, mask=inside, other=0.0).to(tl.float32)[:, None]
    if BIASED:
        out += tl.load(B + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = OUT + r[None, :] * N + row[:, None]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=inside[:, None] & (r < R)[None, :])
