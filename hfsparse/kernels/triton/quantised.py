"""Products of a few rows with a matrix of codes in Triton: codes become numbers in registers.

What bounds it is reading the codes, once for all rows. A program holds a few rows of the matrix; a
tile of them is unpacked once and meets each row of x. By definition: `plain.quantised`.
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

ROWS, COLUMNS, WARPS = 4, 2048, 4  # of a tile of the matrix
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
    """As `plain.quantised`; sums are float32, and rounded once."""
    x, K, columns, group = x.contiguous(), x.shape[-1], matrix.columns, matrix.group
    out, scale, zero = x.new_empty(*x.shape[:-1], matrix.rows), matrix.scale, matrix.zero
    rows, whole = x.numel() // K, group == columns and zero is None
    tile = min(COLUMNS, triton.next_power_of_2(K))
    kernel = _product_of_words if matrix.codes.dtype == torch.int32 else _product_of_bytes
    kernel[(triton.cdiv(matrix.rows, ROWS),)](
        *(x, matrix.codes, scale, scale if zero is None else zero, out if bias is None else bias),
        *(out, K, matrix.rows, columns, *scale.stride()),
        R=rows,
        PADDED=triton.next_power_of_2(rows),
        ROWS=ROWS,
        COLUMNS=tile,
        WHOLE=K % tile == 0,
        GROUP=0 if whole else group,
        ZERO=0 if zero is None else 1 if zero.is_floating_point() else -1,
        BIASED=bias is not None,
        TILED=matrix.tiled,
        num_warps=WARPS,
        **chained(str(x.device)),
    )
    return out


@triton.jit
def _product_of_bytes(
    X, W, S, Z, B, OUT, K, N, width, s_row, s_group,
    R: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BIASED: tl.constexpr,
    TILED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    w_at = W + row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < N)[:, None]
    w = tl.load(w_at, mask=inside & (column < K)[None, :], other=0.0)
    await_previous(CHAINED)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    for first in range(0, K, COLUMNS):
        ahead = first + COLUMNS + column < K
        later = tl.load(w_at + first + COLUMNS, mask=inside & ahead[None, :], other=0.0)
        number = w.to(tl.float32)
        if GROUP:
            number = tl.reshape(number, [ROWS, COLUMNS // GROUP, GROUP])
            s, z = _ends(S, Z, row, first, K, N, s_row, s_group, COLUMNS // GROUP, GROUP, ZERO)
            number = number * s[:, :, None] + z[:, :, None]
            number = tl.reshape(number, [ROWS, COLUMNS])
        for r in tl.static_range(R):
            x = _row(X + r * K, first, K, COLUMNS, WHOLE)
            acc = _put(acc, tl.sum(number * x[None, :], 1), r, PADDED)
        w = later
    if not GROUP:
        acc *= tl.load(S + row * s_row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    _store(OUT, acc, B, row, N, R, PADDED, BIASED)


@triton.jit
def _product_of_words(
    X, W, S, Z, B, OUT, K, N, width, s_row, s_group,
    R: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BIASED: tl.constexpr,
    TILED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Of a word's codes the n-th is 16^n times itself where it lies: x is divided by that."""
    row, word = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS // 8)
    if TILED:
        rows = W + (row // 8).to(tl.int64) * width + row % 8 * 16
        w_at, STEP = rows[:, None] + (word // 16 * 128 + word % 16)[None, :], COLUMNS
    else:
        rows = W + row.to(tl.int64) * (width // 8)
        w_at, STEP = rows[:, None] + word[None, :], COLUMNS // 8
    inside = (row < N)[:, None]
    w = tl.load(w_at, mask=inside & (word * 8 < width)[None, :], other=0)
    await_previous(CHAINED)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    for first in range(0, width, COLUMNS):
        w_at += STEP
        ahead = first + COLUMNS + word * 8 < width
        later = tl.load(w_at, mask=inside & ahead[None, :], other=0)
        s, z = _ends(S, Z, row, first, width, N, s_row, s_group, COLUMNS // GROUP, GROUP, ZERO)
        code = (w if TILED else w ^ -2004318072).to(tl.uint32, bitcast=True)  # 0 to 15
        n0, n1 = (code & 0xF).to(tl.float32), (code & 0xF0).to(tl.float32)
        n2, n3 = (code & 0xF00).to(tl.float32), (code & 0xF000).to(tl.float32)
        n4, n5 = (code & 0xF0000).to(tl.float32), (code & 0xF00000).to(tl.float32)
        n6, n7 = (code & 0xF000000).to(tl.float32), (code & 0xF0000000).to(tl.float32)
        for r in tl.static_range(R):
            x = _row(X + r * K, first, K, COLUMNS, WHOLE)
            if TILED:  # [tile, w, 16, 8, c, 1] as in `codes.py`
                x = tl.permute(tl.reshape(x, [COLUMNS // 128, 4, 2, 2, 4, 2]), [0, 4, 1, 5, 2, 3])
            even, odd = tl.split(tl.reshape(x, [COLUMNS // 8, 2, 2, 2]))
            (x04, x26), (x15, x37) = tl.split(even), tl.split(odd)
            (x0, x4), (x2, x6) = tl.split(x04), tl.split(x26)
            (x1, x5), (x3, x7) = tl.split(x15), tl.split(x37)
            total = x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7
            part = n0 * x0[None, :] + n1 * (x1 * 2.0**-4)[None, :]
            part += n2 * (x2 * 2.0**-8)[None, :]
            part += n3 * (x3 * 2.0**-12)[None, :]
            part += n4 * (x4 * 2.0**-16)[None, :]
            part += n5 * (x5 * 2.0**-20)[None, :]
            part += n6 * (x6 * 2.0**-24)[None, :]
            part += n7 * (x7 * 2.0**-28)[None, :]
            part = tl.sum(tl.reshape(part, [ROWS, COLUMNS // GROUP, GROUP // 8]), 2)
            total = tl.sum(tl.reshape(total, [COLUMNS // GROUP, GROUP // 8]), 1)
            acc = _put(acc, tl.sum(part * s + (z - 8 * s) * total[None, :], 1), r, PADDED)
        w = later
    _store(OUT, acc, B, row, N, R, PADDED, BIASED)


@triton.jit
def _row(X, first, K, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of a row of x, in float32."""
    at = first + tl.arange(0, COLUMNS)
    x = tl.load(X + at) if WHOLE else tl.load(X + at, mask=at < K, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _ends(
    S, Z, row, first, width, N, s_row, s_group,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of a tile's groups [ROWS, GROUPS]."""
    group = first // GROUP + tl.arange(0, GROUPS)
    at = row.to(tl.int64)[:, None] * s_row + group[None, :] * s_group
    inside = (row < N)[:, None] & (group * GROUP < width)[None, :]
    s = tl.load(S + at, mask=inside, other=0.0).to(tl.float32)
    if ZERO == 0:
        return s, tl.zeros_like(s)
    z = tl.load(Z + at, mask=inside, other=0.0).to(tl.float32)
    return s, z if ZERO > 0 else -s * z


@triton.jit
def _put(acc, found, r: tl.constexpr, PADDED: tl.constexpr):
    """Add what a tile comes to with row r of x."""
    return acc + tl.where((tl.arange(0, PADDED) == r)[None, :], found[:, None], 0.0)


@triton.jit
def _store(
    OUT, acc, B, row, N, R: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr
):  # fmt: skip
    r = tl.arange(0, PADDED)
    if BIASED:
        acc += tl.load(B + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    at = OUT + r[None, :] * N + row[:, None]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=(row < N)[:, None] & (r < R)[None, :])
