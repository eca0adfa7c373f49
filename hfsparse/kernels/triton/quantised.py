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

# A tile of the matrix: rows, columns, and how many are on their way at once; by rows of x.
BYTES = {1: (4, 1024, 3), 2: (4, 1024, 3), 4: (4, 512, 4), 8: (4, 512, 4)}
WORDS = {1: (8, 1024, 3), 2: (8, 1024, 3), 4: (8, 1024, 3), 8: (4, 1024, 4)}
WARPS = 4
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
    padded, words = triton.next_power_of_2(rows), matrix.codes.dtype == torch.int32
    tall, wide, stages = (WORDS if words else BYTES)[padded]
    wide = min(wide, triton.next_power_of_2(columns)) if whole else max(wide, group)
    kernel = _product_of_words if words else _product_of_bytes
    kernel[(triton.cdiv(matrix.rows, tall),)](
        *(x, matrix.codes, scale, scale if zero is None else zero, out if bias is None else bias),
        *(out, rows, K, matrix.rows, columns, *scale.stride()),
        PADDED=padded,
        ROWS=tall,
        COLUMNS=wide,
        STAGES=stages,
        EVEN=rows == padded and K % wide == 0,
        GROUP=0 if whole else group,
        ZERO=0 if zero is None else 1 if zero.is_floating_point() else -1,
        BIASED=bias is not None,
        TILED=matrix.tiled,
        num_warps=WARPS,
        **chained(str(x.device)),
    )
    return out


@triton.jit(do_not_specialize=["R"])
def _product_of_bytes(
    X, W, S, Z, B, OUT, R, K, N, width, s_row, s_group,
    PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BIASED: tl.constexpr,
    TILED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    w_at = W + row.to(tl.int64)[:, None] * width + column[None, :]
    acc = tl.zeros([PADDED, ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, K, COLUMNS, num_stages=STAGES):
        inside = (row < N)[:, None] if EVEN else (row < N)[:, None] & (first + column < K)[None, :]
        number = tl.load(w_at + first, mask=inside, other=0.0).to(tl.float32)
        if GROUP:
            number = tl.reshape(number, [ROWS, COLUMNS // GROUP, GROUP])
            s, z = _ends(S, Z, row, first, K, N, s_row, s_group, COLUMNS // GROUP, GROUP, ZERO)
            number = tl.reshape(number * s[:, :, None] + z[:, :, None], [ROWS, COLUMNS])
        x = _rows(X, first, R, K, PADDED, COLUMNS, EVEN)
        acc += number[None, :, :] * x[:, None, :]
    out = tl.sum(acc, 2)
    if not GROUP:
        out *= tl.load(S + row * s_row, mask=row < N, other=0.0).to(tl.float32)[None, :]
    _store(OUT, out, B, row, N, R, PADDED, BIASED)


@triton.jit(do_not_specialize=["R"])
def _product_of_words(
    X, W, S, Z, B, OUT, R, K, N, width, s_row, s_group,
    PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BIASED: tl.constexpr,
    TILED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The n-th code of a word is, where it lies, 16^n times itself: x is divided by that."""
    await_previous(CHAINED)
    row, word = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS // 8)
    GROUPS: tl.constexpr = COLUMNS // GROUP
    if TILED:
        rows = W + (row // 8).to(tl.int64) * width + row % 8 * 16
        w_at, STEP = rows[:, None] + (word // 16 * 128 + word % 16)[None, :], 1
    else:
        rows = W + row.to(tl.int64) * (width // 8)
        w_at, STEP = rows[:, None] + word[None, :], 8
    acc = tl.zeros([PADDED, ROWS, GROUPS], tl.float32)
    for first in tl.range(0, width, COLUMNS, num_stages=STAGES):
        inside = (row < N)[:, None]
        inside = inside if EVEN else inside & (first + word * 8 < width)[None, :]
        code = tl.load(w_at + first // STEP, mask=inside, other=0)
        code = (code if TILED else code ^ -2004318072).to(tl.uint32, bitcast=True)  # 0 to 15
        s, z = _ends(S, Z, row, first, width, N, s_row, s_group, GROUPS, GROUP, ZERO)
        x = _rows(X, first, R, K, PADDED, COLUMNS, EVEN)
        if TILED:  # as in `codes.py`
            x = tl.reshape(x, [PADDED, COLUMNS // 128, 4, 2, 2, 4, 2])
            x = tl.permute(x, [0, 1, 5, 2, 6, 3, 4])
        even, odd = tl.split(tl.reshape(x, [PADDED, COLUMNS // 8, 2, 2, 2]))
        (x04, x26), (x15, x37) = tl.split(even), tl.split(odd)
        (x0, x4), (x2, x6) = tl.split(x04), tl.split(x26)
        (x1, x5), (x3, x7) = tl.split(x15), tl.split(x37)
        total = x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7
        part = (code & 0xF).to(tl.float32)[None, :, :] * x0[:, None, :]
        part += (code & 0xF0).to(tl.float32)[None, :, :] * (x1 * 2.0**-4)[:, None, :]
        part += (code & 0xF00).to(tl.float32)[None, :, :] * (x2 * 2.0**-8)[:, None, :]
        part += (code & 0xF000).to(tl.float32)[None, :, :] * (x3 * 2.0**-12)[:, None, :]
        part += (code & 0xF0000).to(tl.float32)[None, :, :] * (x4 * 2.0**-16)[:, None, :]
        part += (code & 0xF00000).to(tl.float32)[None, :, :] * (x5 * 2.0**-20)[:, None, :]
        part += (code & 0xF000000).to(tl.float32)[None, :, :] * (x6 * 2.0**-24)[:, None, :]
        part += (code & 0xF0000000).to(tl.float32)[None, :, :] * (x7 * 2.0**-28)[:, None, :]
        part = tl.sum(tl.reshape(part, [PADDED, ROWS, GROUPS, GROUP // 8]), 3)
        total = tl.sum(tl.reshape(total, [PADDED, GROUPS, GROUP // 8]), 2)
        acc += part * s[None, :, :] + (z - 8 * s)[None, :, :] * total[:, None, :]
    _store(OUT, tl.sum(acc, 2), B, row, N, R, PADDED, BIASED)


@triton.jit
def _rows(
    X, first, R, K, PADDED: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """A tile of x `[PADDED, COLUMNS]` in float32."""
    r, at = tl.arange(0, PADDED)[:, None], first + tl.arange(0, COLUMNS)[None, :]
    if EVEN:
        return tl.load(X + r * K + at).to(tl.float32)
    return tl.load(X + r * K + at, mask=(r < R) & (at < K), other=0.0).to(tl.float32)


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
def _store(OUT, out, B, row, N, R, PADDED: tl.constexpr, BIASED: tl.constexpr):
    """out `[PADDED, ROWS]`, rounded."""
    r, live = tl.arange(0, PADDED)[:, None], (row < N)[None, :]
    if BIASED:
        out += tl.load(B + row, mask=row < N, other=0.0).to(tl.float32)[None, :]
    at = OUT + r * N + row[None, :]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=live & (r < R))
