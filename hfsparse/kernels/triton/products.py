"""Products of one row with up to three matrices in Triton, in one launch.

A step of batch 1 reads each weight once for one row: what bounds it is memory, and how soon every
processor has something to read. A program holds a few rows of a matrix, and sums over what it read
of them at the end; products that share their input (queries, keys and values; gate and up) are one
launch.
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
TILE, WIDEST = 8192, 4096  # numbers of a tile of a matrix, and columns of the widest
COLUMNS = 2048  # of tiles of which a row takes several
DTYPES = (torch.bfloat16, torch.float16)


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16 and float16 are supported"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """As `plain.products`, of a row x `[..., K]`; sums are float32, and rounded once."""
    x, K = x.contiguous(), x.shape[-1]
    out = x.new_empty(*x.shape[:-1], sum(len(w) for w in weights))
    columns, first = triton.next_power_of_2(K), 0
    columns = columns if columns <= WIDEST else COLUMNS
    rows = min(ROWS, max(1, TILE // columns))
    for at in range(0, len(weights), MOST):
        some, added = list(weights[at : at + MOST]), list(biases[at : at + MOST])
        sizes, spare = [len(w) for w in some], MOST - len(some)
        biased = tuple(b is not None for b in added)
        added = [w if b is None else b for w, b in zip(some, added, strict=True)]
        _products[(sum(triton.cdiv(n, rows) for n in sizes),)](
            *(x, *some, *some[:1] * spare, *added, *some[:1] * spare),
            *(out[..., first:], K, *sizes, *[0] * spare),
            ROWS=rows,
            COLUMNS=columns,
            WHOLE=K % columns == 0,
            BIASED=biased + (False,) * spare,
            num_warps=4,
            **chained(str(x.device)),
        )
        first += sum(sizes)
    return out


@triton.jit(do_not_specialize="n0 n1 n2".split())
def _products(
    X, W0, W1, W2, B0, B1, B2, OUT, K, n0, n1, n2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    at, many0, many1 = tl.program_id(0), tl.cdiv(n0, ROWS), tl.cdiv(n1, ROWS)
    if at < many0:
        _product(X, W0, B0, OUT, K, n0, at, ROWS, COLUMNS, WHOLE, BIASED[0])
    elif at < many0 + many1:
        _product(X, W1, B1, OUT + n0, K, n1, at - many0, ROWS, COLUMNS, WHOLE, BIASED[1])
    else:
        at -= many0 + many1
        _product(X, W2, B2, OUT + n0 + n1, K, n2, at, ROWS, COLUMNS, WHOLE, BIASED[2])


@triton.jit
def _product(
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
