"""Products of a few rows with up to three matrices of codes in Triton, in one launch: codes become
numbers in registers.

What bounds it is reading the codes, once for all rows: an H200 takes 1.1 to 1.9 times as long as
its memory needs for matrices of 17 MB and more (benchmarks/results/decode.md). One row is summed
up as `products` sums; several, and groups of columns, meet tensor cores, for which codes are exact
in bf16 and fp16. Scales of whole rows come behind. By definition: `plain.quantised`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.codes import Quantised
from hfsparse.kernels.triton.limits import await_previous, chained, is_nvidia

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

MOST = 3  # matrices of a launch
# Of a tile of a matrix: rows, columns, and how many tiles are on their way at once.
ROW = (8, 1024, 3)  # for one row of x, scales of whole rows
ROWS = (16, 128, 3)  # for others, each of WARPS a tile
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


def products(x: Tensor, matrices: Sequence[Quantised], biases: Sequence[Tensor | None]) -> Tensor:
    """As `plain.quantised`, of up to 8 rows and matrices of one layout; sums are float32, and
    rounded once."""
    x, first = x.contiguous(), 0
    out = x.new_empty(*x.shape[:-1], sum(len(matrix.codes) for matrix in matrices))
    for at in range(0, len(matrices), MOST):
        some = matrices[at : at + MOST]
        _launch(x, some, biases[at : at + MOST], out[..., first:])
        first += sum(len(matrix.codes) for matrix in some)
    return out


def _launch(
    x: Tensor, matrices: Sequence[Quantised], biases: Sequence[Tensor | None], out: Tensor
) -> None:
    K, spare = x.shape[-1], MOST - len(matrices)
    rows, one = x.numel() // K, matrices[0]
    group = 0 if one.group == K else one.group
    alone = rows == 1 and not group
    tall, wide, stages = ROW if alone else ROWS
    if group:
        wide = min(wide, group)
    sizes = [len(matrix.codes) for matrix in matrices] + [0] * spare
    given = [*matrices, *[one] * spare]
    added = [*biases, *[None] * spare]
    _products_of_codes[(sum(triton.cdiv(n, tall) for n in sizes),)](
        *(x, *(matrix.codes for matrix in given), *(matrix.scale for matrix in given)),
        *(matrix.scale if matrix.zero is None else matrix.zero for matrix in given),
        *(out if bias is None else bias for bias in added),
        *(out, rows, *sizes, out.stride(-2) if rows > 1 else 0, K),
        *(matrix.scale.stride(0) for matrix in given),
        ROWS=tall,
        COLUMNS=wide,
        STAGES=stages,
        PADDED=1 if alone else PADDED,
        WARPS=WARPS,
        WHOLE=K % (wide if alone else wide * WARPS) == 0,
        GROUP=group,
        ZEROS=one.zero is not None,
        BIASED=tuple(bias is not None for bias in added),
        NVIDIA=is_nvidia(str(x.device)),
        num_warps=WARPS,
        **chained(str(x.device)),
    )


@triton.jit(do_not_specialize="R n0 n1 n2 o_row s0 s1 s2".split())
def _products_of_codes(
    X, W0, W1, W2, S0, S1, S2, Z0, Z1, Z2, B0, B1, B2, OUT, R, n0, n1, n2, o_row, K, s0, s1, s2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BIASED: tl.constexpr, NVIDIA: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    at, many0, many1 = tl.program_id(0), tl.cdiv(n0, ROWS), tl.cdiv(n1, ROWS)
    if at < many0:
        _product(
            X, W0, S0, Z0, B0, OUT, at, R, n0, o_row, K, s0,
            ROWS, COLUMNS, STAGES, PADDED, WARPS, WHOLE, GROUP, ZEROS, BIASED[0], NVIDIA,
        )  # fmt: skip
    elif at < many0 + many1:
        _product(
            X, W1, S1, Z1, B1, OUT + n0, at - many0, R, n1, o_row, K, s1,
            ROWS, COLUMNS, STAGES, PADDED, WARPS, WHOLE, GROUP, ZEROS, BIASED[1], NVIDIA,
        )  # fmt: skip
    else:
        _product(
            X, W2, S2, Z2, B2, OUT + n0 + n1, at - many0 - many1, R, n2, o_row, K, s2,
            ROWS, COLUMNS, STAGES, PADDED, WARPS, WHOLE, GROUP, ZEROS, BIASED[2], NVIDIA,
        )  # fmt: skip


@triton.jit
def _product(
    X, W, S, Z, B, OUT, at, R, n, o_row, K, s_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BIASED: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    row, r = at * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = row < n
    if not GROUP:  # asked for before the codes, as the bias
        scale = tl.load(S + row * s_row, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        bias = tl.load(B + row, mask=inside, other=0.0).to(tl.float32)
    if PADDED == 1:
        out = _row(
            X, W, row, n, K, ROWS, COLUMNS, STAGES, WHOLE, NVIDIA
        )[:, None]  # fmt: skip
    else:
        out = _rows(
            X, W, S, Z, row, r, R, n, K, s_row,
            ROWS, COLUMNS, STAGES, PADDED, WARPS, WHOLE, GROUP, ZEROS,
        )  # fmt: skip
    if not GROUP:
        out *= scale[:, None]
    if BIASED:
        out += bias[:, None]
    at = OUT + r[None, :] * o_row + row[:, None]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=inside[:, None] & (r < R)[None, :])


@triton.jit
def _row(
    X, W, row, n, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's rows with one row of x `[ROWS]`, of scales of whole rows."""
    inside, column = row < n, tl.arange(0, COLUMNS)
    w_at = W + row.to(tl.int64)[:, None] * K + column[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, K, COLUMNS, num_stages=STAGES):
        live = column < K - first
        kept = inside[:, None] if WHOLE else inside[:, None] & live[None, :]
        number = _to_float(tl.load(w_at + first, mask=kept, other=0.0), NVIDIA)
        if WHOLE:
            x = tl.load(X + first + column)
        else:
            x = tl.load(X + first + column, mask=live, other=0.0)
        acc += number * x.to(tl.float32)[None, :]
    return tl.sum(acc, 1)


@triton.jit
def _rows(
    X, W, S, Z, row, r, R, n, K, s_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's rows with R rows of x `[ROWS, PADDED]`.

    Each warp sums over tiles of its own, [WARPS, ROWS, PADDED]; a tile lies in one group.
    """
    column = tl.arange(0, WARPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, rows = row < n, (r < R)[None, None, :]
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
    return tl.sum(acc, 0)


@triton.jit
def _to_float(code, NVIDIA: tl.constexpr):
    """Codes as float32: of int8 by four bytes of 2^23 + 128 + code at once, for the GPU's own
    conversion is slow."""
    if NVIDIA and code.dtype == tl.int8:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 codes;
            xor.b32 codes, $4, 0x80808080;
            prmt.b32 $0, codes, 0x4B000000, 0x7440;
            prmt.b32 $1, codes, 0x4B000000, 0x7441;
            prmt.b32 $2, codes, 0x4B000000, 0x7442;
            prmt.b32 $3, codes, 0x4B000000, 0x7443;
            sub.f32 $0, $0, 0f4B000080;
            sub.f32 $1, $1, 0f4B000080;
            sub.f32 $2, $2, 0f4B000080;
            sub.f32 $3, $3, 0f4B000080;
            }
            """,
            "=f,=f,=f,=f,r", [code], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    return code.to(tl.float32)
