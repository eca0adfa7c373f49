"""Products of a few rows with a matrix of codes in Triton: codes become numbers in registers.

What bounds it is reading the codes, once for all rows: an H200 takes 1.1 to 2.0 times as long as
its memory needs for matrices of 17 MB and more (benchmarks/results/decode.md). Several rows, and
int8, which is slow to become float32, meet tensor cores: codes are exact in bf16 and fp16, and
scales come behind. By definition: `plain.quantised`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hfsparse.kernels.codes import Quantised
from hfsparse.kernels.triton.limits import await_previous, chained, is_nvidia

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

# Of a tile of the matrix: rows, columns, and how many tiles are on their way at once.
ROW = (8, 1024, 3, 4)  # for one row of x
ROWS = (16, 128, 3, 4)  # for more, each of 4 warps a tile
ALONE = (torch.float8_e4m3fn,)
MOST = 3  # matrices of a launch
AHEAD = 16
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
    """As `plain.quantised`, of up to 8 rows; sums are float32, and rounded once."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], sum(len(matrix.codes) for matrix in matrices))
    first = 0
    for at in range(0, len(matrices), MOST):
        _launch(x, matrices[at : at + MOST], biases[at : at + MOST], out, first)
        first += sum(len(matrix.codes) for matrix in matrices[at : at + MOST])
    return out


def _launch(x: Tensor, matrices, biases, out: Tensor, first: int) -> None:
    """Products that lie in the output from column `first` on."""
    K, spare = x.shape[-1], MOST - len(matrices)
    first_one, rows = matrices[0], x.numel() // K
    one = rows == 1 and first_one.codes.dtype in ALONE
    tall, wide, stages, warps = ROW if one else ROWS
    group = 0 if first_one.group == K else first_one.group
    if group:
        wide = max(wide, group) if one else min(wide, group)
    sizes = [len(matrix.codes) for matrix in matrices] + [0] * spare
    given = [*matrices, *matrices[:1] * spare]
    added = [*biases, *[None] * spare]
    kernel = _products_of_row if one else _products_of_rows
    kernel[(sum(triton.cdiv(n, tall) for n in sizes),)](
        *(x, *(m.codes for m in given), *(m.scale for m in given)),
        *(m.scale if m.zero is None else m.zero for m in given),
        *(out if bias is None else bias for bias in added),
        *(out[..., first:], rows, *sizes, out.shape[-1], K, *(m.scale.stride(0) for m in given)),
        ROWS=tall,
        COLUMNS=wide,
        STAGES=stages,
        PADDED=PADDED,
        WARPS=warps,
        AHEAD=AHEAD,
        WHOLE=K % (wide if one else wide * warps) == 0,
        GROUP=group,
        ZEROS=first_one.zero is not None,
        BIASED=tuple(bias is not None for bias in added),
        num_warps=warps,
        **chained(str(x.device)),
    )


@triton.jit(do_not_specialize="R n0 n1 n2 N s0 s1 s2".split())
def _products_of_row(
    X, W0, W1, W2, S0, S1, S2, Z0, Z1, Z2, B0, B1, B2, OUT, R, n0, n1, n2, N, K, s0, s1, s2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, AHEAD: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, BIASED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    at, many0, many1 = tl.program_id(0), tl.cdiv(n0, ROWS), tl.cdiv(n1, ROWS)
    if at < many0:
        _product_of_row(
            X,
            W0,
            S0,
            Z0,
            B0,
            OUT,
            at,
            R,
            n0,
            N,
            K,
            s0,
            ROWS,
            COLUMNS,
            STAGES,
            PADDED,
            WARPS,
            AHEAD,
            WHOLE,
            GROUP,
            ZEROS,
            BIASED[0],
            CHAINED,
        )
    elif at < many0 + many1:
        _product_of_row(
            X,
            W1,
            S1,
            Z1,
            B1,
            OUT + n0,
            at - many0,
            R,
            n1,
            N,
            K,
            s1,
            ROWS,
            COLUMNS,
            STAGES,
            PADDED,
            WARPS,
            AHEAD,
            WHOLE,
            GROUP,
            ZEROS,
            BIASED[1],
            CHAINED,
        )
    else:
        _product_of_row(
            X,
            W2,
            S2,
            Z2,
            B2,
            OUT + n0 + n1,
            at - many0 - many1,
            R,
            n2,
            N,
            K,
            s2,
            ROWS,
            COLUMNS,
            STAGES,
            PADDED,
            WARPS,
            AHEAD,
            WHOLE,
            GROUP,
            ZEROS,
            BIASED[2],
            CHAINED,
        )


@triton.jit(do_not_specialize="R n0 n1 n2 N s0 s1 s2".split())
def _products_of_rows(
    X, W0, W1, W2, S0, S1, S2, Z0, Z1, Z2, B0, B1, B2, OUT, R, n0, n1, n2, N, K, s0, s1, s2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, AHEAD: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, BIASED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    at, many0, many1 = tl.program_id(0), tl.cdiv(n0, ROWS), tl.cdiv(n1, ROWS)
    if at < many0:
        _product_of_rows(
            X,
            W0,
            S0,
            Z0,
            B0,
            OUT,
            at,
            R,
            n0,
            N,
            K,
            s0,
            ROWS,
            COLUMNS,
            STAGES,
            PADDED,
            WARPS,
            AHEAD,
            WHOLE,
            GROUP,
            ZEROS,
            BIASED[0],
            CHAINED,
        )
    elif at < many0 + many1:
        _product_of_rows(
            X,
            W1,
            S1,
            Z1,
            B1,
            OUT + n0,
            at - many0,
            R,
            n1,
            N,
            K,
            s1,
            ROWS,
            COLUMNS,
            STAGES,
            PADDED,
            WARPS,
            AHEAD,
            WHOLE,
            GROUP,
            ZEROS,
            BIASED[1],
            CHAINED,
        )
    else:
        _product_of_rows(
            X,
            W2,
            S2,
            Z2,
            B2,
            OUT + n0 + n1,
            at - many0 - many1,
            R,
            n2,
            N,
            K,
            s2,
            ROWS,
            COLUMNS,
            STAGES,
            PADDED,
            WARPS,
            AHEAD,
            WHOLE,
            GROUP,
            ZEROS,
            BIASED[2],
            CHAINED,
        )


@triton.jit
def _product_of_row(
    X, W, S, Z, B, OUT, at, R, n, N, K, s_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, AHEAD: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, BIASED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row, column = at * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = row < n
    scale, bias = _of_rows(S, B, row, n, s_row, GROUP, BIASED)
    w_at = W + row.to(tl.int64)[:, None] * K + column[None, :]
    _await(W, row, n, K, AHEAD, CHAINED)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, K, COLUMNS, num_stages=STAGES):
        live = column < K - first
        kept = inside[:, None] if WHOLE else inside[:, None] & live[None, :]
        number = _to_float(tl.load(w_at + first, mask=kept, other=0.0), CHAINED)
        if WHOLE:
            x = tl.load(X + first + column)
        else:
            x = tl.load(X + first + column, mask=live, other=0.0)
        if GROUP:
            GROUPS: tl.constexpr = COLUMNS // GROUP
            group = first // GROUP + tl.arange(0, GROUPS)
            where = row[:, None] * s_row + group[None, :]
            held = inside[:, None] & (group < K // GROUP)[None, :]
            number = tl.reshape(number, [ROWS, GROUPS, GROUP])
            if ZEROS:
                number -= tl.load(Z + where, mask=held, other=0).to(tl.float32)[:, :, None]
            number *= tl.load(S + where, mask=held, other=0.0).to(tl.float32)[:, :, None]
            number = tl.reshape(number, [ROWS, COLUMNS])
        acc += number * x.to(tl.float32)[None, :]
    out = tl.sum(acc, 1) * scale + bias
    tl.store(OUT + row, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _product_of_rows(
    X, W, S, Z, B, OUT, at, R, n, N, K, s_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, AHEAD: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, BIASED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Each warp sums over tiles of its own, [WARPS, ROWS, PADDED]; a tile lies in one group."""
    row, r = at * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    column = tl.arange(0, WARPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, rows = row < n, (r < R)[None, None, :]
    scale, bias = _of_rows(S, B, row, n, s_row, GROUP, BIASED)
    w_at = W + row.to(tl.int64)[None, :, None] * K + column[:, None, :]
    x_at = X + r[None, None, :] * K + column[:, :, None]
    _await(W, row, n, K, AHEAD, CHAINED)
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
            where = row[None, :] * s_row + group[:, None]
            held = inside[None, :] & (group < K // GROUP)[:, None]
            if ZEROS:
                code = code.to(tl.float32)
                code -= tl.load(Z + where, mask=held, other=0).to(tl.float32)[:, :, None]
            s = tl.load(S + where, mask=held, other=0.0).to(tl.float32)
            acc += tl.dot(code.to(x.dtype), x) * s[:, :, None]
        else:
            acc = tl.dot(code.to(x.dtype), x, acc)
    out = tl.sum(acc, 0) * scale[:, None] + bias[:, None]
    at = OUT + r[None, :] * N + row[:, None]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=inside[:, None] & (r < R)[None, :])


@triton.jit
def _await(W, row, n, K, AHEAD: tl.constexpr, CHAINED: tl.constexpr):
    """As `await_previous`, while the first codes of each row, which no launch writes, come."""
    if CHAINED:
        if AHEAD:
            gdc_launch_dependents()
            column = tl.minimum(tl.arange(0, AHEAD) * 128, K - 1)
            at = W + tl.minimum(row, n - 1).to(tl.int64)[:, None] * K + column[None, :]
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
            gdc_wait()
        else:
            await_previous(CHAINED)


@triton.jit
def _to_float(code, NVIDIA: tl.constexpr):
    """Codes as float32; of int8 by bytes of 2^23 + code + 128, sooner than by conversion."""
    if NVIDIA and code.dtype == tl.int8:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            xor.b32 t, $4, 0x80808080;
            prmt.b32 $0, t, 0x4B000000, 0x7440;
            prmt.b32 $1, t, 0x4B000000, 0x7441;
            prmt.b32 $2, t, 0x4B000000, 0x7442;
            prmt.b32 $3, t, 0x4B000000, 0x7443;
            sub.f32 $0, $0, 0f4B000080;
            sub.f32 $1, $1, 0f4B000080;
            sub.f32 $2, $2, 0f4B000080;
            sub.f32 $3, $3, 0f4B000080;
            }
            """,
            "=f,=f,=f,=f,r", [code], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    return code.to(tl.float32)


@triton.jit
def _of_rows(S, B, row, n, s_row, GROUP: tl.constexpr, BIASED: tl.constexpr):
    """Scales of whole rows, and biases: read at first, for no launch writes them."""
    scale = tl.full(row.shape, 1.0, tl.float32)
    bias = tl.zeros(row.shape, tl.float32)
    if not GROUP:
        scale = tl.load(S + row * s_row, mask=row < n, other=0.0).to(tl.float32)
    if BIASED:
        bias = tl.load(B + row, mask=row < n, other=0.0).to(tl.float32)
    return scale, bias
