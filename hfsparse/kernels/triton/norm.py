"""RMS norms of a few rows in Triton, around PyTorch's own mean: three launches.

Models write a norm as eight operations of PyTorch. Each number is rounded here where they round it,
and the mean is summed up by the same kernel, so the bits are the same. Bound by latency.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

DTYPES = (torch.bfloat16, torch.float16)
WIDE = 1024  # numbers of a program


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16 and float16 are supported"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    """As `plain.rms_norm`."""
    x, N = x.contiguous(), x.shape[-1]
    squares, out = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x)
    _square[(triton.cdiv(x.numel(), WIDE),)](x, squares, x.numel(), WIDE=WIDE, num_warps=4)
    mean = squares.mean(-1, keepdim=True)
    _scale[(x.numel() // N, triton.cdiv(N, WIDE))](
        *(x, weight, mean, out, eps, N),
        ROUNDED=form == "rounded",
        MORE=form == "one more",
        WIDE=WIDE,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["n"])
def _square(X, OUT, n, WIDE: tl.constexpr):
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(OUT + at, x * x, mask=at < n)


@triton.jit
def _scale(X, W, MEAN, OUT, eps, N, ROUNDED: tl.constexpr, MORE: tl.constexpr, WIDE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    x = tl.load(X + row * N + at, mask=at < N, other=0.0).to(tl.float32)
    w = tl.load(W + at, mask=at < N, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.load(MEAN + row) + eps)
    if ROUNDED:
        x = x.to(OUT.dtype.element_ty).to(tl.float32)
    if MORE:
        w += 1.0
    tl.store(OUT + row * N + at, (x * w).to(OUT.dtype.element_ty), mask=at < N)
