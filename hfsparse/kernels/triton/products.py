"""Products of a few rows with up to three matrices in Triton, in one launch, of plain numbers or of
codes, which become numbers in registers.

A step reads each weight once for its rows: what bounds it is memory, and how soon every processor
has something to read. For one row a program holds a few rows of a matrix, and sums over what it
read of them at the end; several rows, and groups of columns, meet tensor cores, for which codes are
exact in bf16 and fp16. Each warp sums over columns of its own; of plain numbers for more than 16
rows all share a tile, for else programs would read x as often as weights. Scales of whole rows come
behind. Products that share their input (queries, keys and values; gate and up) are one launch. By
definition: `plain.products`, `plain.quantised`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.codes import TILE, Quantised
from hfsparse.kernels.triton.limits import await_previous, chained, is_nvidia, shared_memory

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

MOST = 3  # matrices of a launch
WARPS = 4
HALVINGS = tl.constexpr(WARPS.bit_length() - 1)
# Of a tile of a matrix: rows, columns, and how many tiles are on their way at once.
ROW = (4, 2048, 1)  # for one row of x
ROW_OF_CODES = (16, 512, 4)  # scales of whole rows
# By rows of x that tensor cores are given, each of WARPS a tile.
ROWS = {8: (16, 128, 3), 16: (32, 128, 3), 32: (32, 128, 3)}
# Of four bits: rows, and how many tiles are on their way at once.
TILES = {8: (32, 4), 16: (32, 4), 32: (32, 3)}
# Of plain numbers for the most rows of x: one of all warps, or, for want of shared memory, of each.
TOGETHER, NARROW = (64, 128, 6), (32, 64, 4)
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


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """As `plain.products`, of up to 32 rows x `[..., K]`; sums are float32, and rounded once."""
    none = [None] * len(weights)
    return _products_of(x, weights, none, none, biases)


def products_of_codes(
    x: Tensor, matrices: Sequence[Quantised], biases: Sequence[Tensor | None]
) -> Tensor:
    """As `plain.quantised`, of matrices of one layout; else as `products`."""
    return _products_of(x, *zip(*matrices, strict=True), biases)


def _products_of(x: Tensor, *parts: Sequence[Tensor | None]) -> Tensor:
    """Parts: weights, scales, zeros and biases of all matrices."""
    x, first, sizes = x.contiguous(), 0, [len(weight) for weight in parts[0]]
    out = x.new_empty(*x.shape[:-1], sum(sizes))
    for at in range(0, len(sizes), MOST):
        some = slice(at, at + MOST)
        _launch(x, out[..., first:], *(part[some] for part in parts))
        first += sum(sizes[some])
    return out


def _launch(x: Tensor, out: Tensor, *parts: Sequence[Tensor | None]) -> None:
    weights, scales, zeros, biases = parts
    K, spare, scaled = x.shape[-1], [None] * (MOST - len(weights)), scales[0] is not None
    tiled = weights[0].dtype == torch.int32
    rows, group = x.numel() // K, Quantised(weights[0], scales[0]).group if scaled else K
    group = 0 if group == K else group
    if tiled:  # read are half a word's codes at once, and both numbers of a group's scale
        weights = [codes.view(torch.int16) for codes in weights]
        scales = [scale.view(torch.int32) for scale in scales]
        parts = weights, scales, zeros, biases
    padded = 1 if rows == 1 and not group else max(min(ROWS), triton.next_power_of_2(rows))
    tall, wide, stages, warps = _tile(x, padded, group, weights[0].dtype)
    given = []
    for part in parts:
        stand_in = next((t for t in part if t is not None), x)
        given += [stand_in if t is None else t for t in (*part, *spare)]
    sizes, steps, added = (
        [0 if t is None else value(t) for t in (*part, *spare)]
        for part, value in ((weights, len), (scales, lambda t: t.stride(0)), (biases, len))
    )
    _products[(sum(triton.cdiv(n, tall) for n in sizes),)](
        *(x, *given, out, rows, *sizes, *steps, *added, out.stride(-2) if rows > 1 else 0, K),
        ROWS=tall,
        COLUMNS=wide,
        STAGES=stages,
        PADDED=padded,
        WARPS=warps,
        WHOLE=K % (wide * warps) == 0,
        SCALED=scaled,
        TILED=tiled,
        GROUP=group,
        ZEROS=zeros[0] is not None,
        BIASED=any(added),
        NVIDIA=is_nvidia(str(x.device)),
        num_warps=WARPS,
        **chained(str(x.device)),
    )


def _tile(x: Tensor, padded: int, group: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """A tile of a matrix that is read in this type, and how many warps have one each."""
    if dtype == torch.int16:
        tall, stages = TILES[padded]
        return tall, TILE[1], stages, WARPS
    codes = dtype not in DTYPES
    columns, warps = max(16, triton.next_power_of_2(x.shape[-1])), WARPS
    if padded == 1:
        (tall, wide, stages), warps = ROW_OF_CODES if codes else ROW, 1
        if columns == 2 * wide and not codes:  # rows in one go, half as many
            tall, wide = tall // 2, columns
    elif padded < max(ROWS) or codes:
        tall, wide, stages = ROWS[padded]
    else:
        (tall, wide, stages), warps = TOGETHER, 1
        if (tall + padded) * wide * stages * x.itemsize > shared_memory(str(x.device)):
            (tall, wide, stages), warps = NARROW, WARPS
    return tall, min(wide, group or columns), stages, warps


@triton.jit(do_not_specialize="R n0 n1 n2 s0 s1 s2 b0 b1 b2 o_row".split())
def _products(
    X, W0, W1, W2, S0, S1, S2, Z0, Z1, Z2, B0, B1, B2, OUT,
    R, n0, n1, n2, s0, s1, s2, b0, b1, b2, o_row, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr, TILED: tl.constexpr,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, BIASED: tl.constexpr, NVIDIA: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    at, many0, many1 = tl.program_id(0), tl.cdiv(n0, ROWS), tl.cdiv(n1, ROWS)
    W, S, Z, B, n, s_row, added, first = W0, S0, Z0, B0, n0, s0, b0, 0
    if at >= many0 + many1:
        W, S, Z, B, n, s_row, added, first = W2, S2, Z2, B2, n2, s2, b2, n0 + n1
        at -= many0 + many1
    elif at >= many0:
        W, S, Z, B, n, s_row, added, first = W1, S1, Z1, B1, n1, s1, b1, n0
        at -= many0
    row, r = at * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = row < n
    if SCALED and not GROUP:  # asked for before the codes, as the bias
        scale = tl.load(S + row * s_row, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        bias = tl.load(B + row, mask=row < added, other=0.0).to(tl.float32)
    if TILED:
        out = _tiles(X, W, S, row, r, R, n, K, ROWS, COLUMNS, STAGES, PADDED, WARPS, GROUP, NVIDIA)
    elif PADDED == 1:
        out = _row(X, W, row, n, K, ROWS, COLUMNS, STAGES, WHOLE, NVIDIA)[:, None]
    elif WARPS == 1:
        out = _rows_together(X, W, row, r, R, n, K, ROWS, COLUMNS, STAGES, PADDED, WHOLE)
    else:
        out = _rows(
            X, W, S, Z, row, r, R, n, K, s_row,
            ROWS, COLUMNS, STAGES, PADDED, WARPS, WHOLE, GROUP, ZEROS,
        )  # fmt: skip
    if SCALED and not GROUP:
        out *= scale[:, None]
    if BIASED:
        out += bias[:, None]
    out_at = OUT + first + r[None, :] * o_row + row[:, None]
    tl.store(out_at, out.to(OUT.dtype.element_ty), mask=inside[:, None] & (r < R)[None, :])


@triton.jit
def _row(
    X, W, row, n, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's rows with one row of x `[ROWS]`; a thread keeps one of what it loads at
    once."""
    TOGETHER: tl.constexpr = 128 // W.dtype.element_ty.primitive_bitwidth
    inside, column = row < n, tl.arange(0, COLUMNS)
    w_at = W + row.to(tl.int64)[:, None] * K + column[None, :]
    acc = tl.zeros([ROWS, COLUMNS // TOGETHER], tl.float32)
    for first in tl.range(0, K, COLUMNS, num_stages=STAGES):
        live = column < K - first
        kept = inside[:, None] if WHOLE else inside[:, None] & live[None, :]
        number = _to_float(tl.load(w_at + first, mask=kept, other=0.0), NVIDIA)
        if WHOLE:
            x = tl.load(X + first + column)
        else:
            x = tl.load(X + first + column, mask=live, other=0.0)
        product = number * x.to(tl.float32)[None, :]
        acc += tl.sum(tl.reshape(product, [ROWS, COLUMNS // TOGETHER, TOGETHER]), 2)
    return tl.sum(acc, 1)


@triton.jit
def _rows_together(
    X, W, row, r, R, n, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """As `_rows`, of plain numbers: all warps share a tile, and x is read for more rows at once."""
    inside, rows, column = (row < n)[:, None], (r < R)[None, :], tl.arange(0, COLUMNS)
    w_at = W + row.to(tl.int64)[:, None] * K + column[None, :]
    x_at = X + r[None, :] * K + column[:, None]
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    for first in tl.range(0, K, COLUMNS, num_stages=STAGES):
        live = column < K - first
        w = tl.load(w_at + first, mask=inside if WHOLE else inside & live[None, :], other=0.0)
        x = tl.load(x_at + first, mask=rows if WHOLE else rows & live[:, None], other=0.0)
        acc = tl.dot(w, x, acc)
    return acc


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
        if code.dtype == tl.float8e4nv:  # on Hopper the way through float32 is shorter
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
    return _sum_of_warps(acc, ROWS, PADDED)


@triton.jit
def _sum_of_warps(acc, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Sums `[ROWS, PADDED]` of those of each warp, by halves: tl.sum has more barriers."""
    for _ in tl.static_range(HALVINGS):
        halves = tl.reshape(acc, [2, acc.shape[0] // 2, ROWS, PADDED])
        one, other = tl.split(tl.permute(halves, (1, 2, 3, 0)))
        acc = one + other
    return tl.reshape(acc, [ROWS, PADDED])


@triton.jit
def _tiles(
    X, W, S, row, r, R, n, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr,
    WARPS: tl.constexpr, GROUP: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """As `_rows`, of codes of four bits in tiles (`Quantised`), which each warp reads for itself.

    Codes meet tensor cores as what their bits are on top of a power of two, without which, and
    with the zeros, sums of x by group come behind.
    """
    half = tl.arange(0, COLUMNS // 4)  # each of four codes, of columns 8 apart
    column = half // 2 % 4 * 32 + half // 8 * 2 + half % 2
    tile, inside, rows = tl.arange(0, WARPS), row < n, (r < R)[None, None, :]
    run = (row // 8).to(tl.int64) * (K // COLUMNS * 8) + row % 8  # of a row, in its tile
    w_at = W + (run[None, :] + tile[:, None] * 8)[:, :, None] * (COLUMNS // 4) + half[None, None, :]
    x_at = X + r[None, None, :] * K + (tile[:, None] * COLUMNS + column[None, :])[:, :, None]
    acc = tl.zeros([WARPS, ROWS, PADDED], tl.float32)
    ones = tl.full([WARPS, ROWS, COLUMNS // 4], 1.0, X.dtype.element_ty)
    for first in tl.range(0, K, COLUMNS * WARPS, num_stages=STAGES):
        words = tl.load(w_at + first * 2, mask=inside[None, :, None], other=0)
        s_at = S + row[None, :] + ((first + tile * COLUMNS) // GROUP * n)[:, None]
        pair = tl.load(s_at, mask=inside[None, :], other=0)
        scale = (pair << 16).to(tl.float32, bitcast=True)
        added = (pair & -65536).to(tl.float32, bitcast=True)
        product = tl.zeros([WARPS, ROWS, PADDED], tl.float32)
        total = tl.zeros([WARPS, ROWS, PADDED], tl.float32)
        for i in tl.static_range(4):
            x = tl.load(x_at + first + 8 * i, mask=rows, other=0.0)
            code = _code_of_four(words, i, X.dtype.element_ty, NVIDIA)
            product = tl.dot(code, x, product)
            total = tl.dot(ones, x, total)
        added -= scale * ((128 if X.dtype.element_ty == tl.bfloat16 else 1024) + 8)
        acc += product * scale[:, :, None] + total * added[:, :, None]
    return _sum_of_warps(acc, ROWS, PADDED)


@triton.jit
def _code_of_four(words, i: tl.constexpr, dtype: tl.constexpr, NVIDIA: tl.constexpr):
    """Code i of the four of each word of 16 bits, plus 128 in bf16, or 1024 in fp16: bits of a
    mantissa, of two words at once."""
    if NVIDIA and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            f"""
            {{
            .reg .b32 codes;
            shr.b32 codes, $1, {4 * i};
            lop3.b32 $0, codes, 0x000f000f, 0x43004300, 0xea;
            }}
            """,
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    power: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
    return (words >> 4 * i & 15 | power).to(tl.int16).to(dtype, bitcast=True)


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
