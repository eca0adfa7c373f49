"""The activation of an MLP's gate and its product with `up` in one Triton launch.

Models write two operations of PyTorch. The functions are CUDA's own, as PyTorch has them, and the
activation is rounded before it is multiplied, so the bits are the same. Bound by latency.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from hfsparse.kernels.triton.limits import await_previous, chained, is_nvidia

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

DTYPES = (torch.bfloat16, torch.float16)
WIDE = 512  # numbers of a program
ROOT = tl.constexpr(0.7978845608028654)  # of 2 / pi


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16 and float16 are supported"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def gated(gate: Tensor, up: Tensor, form: str) -> Tensor:
    """As `plain.gated`."""
    gate, up = gate.contiguous(), up.contiguous()
    out, device = torch.empty_like(gate), str(gate.device)
    _gated[(triton.cdiv(gate.numel(), WIDE),)](
        *(gate, up, out, gate.numel()),
        SILU=form == "silu",
        LIBRARY=is_nvidia(device),
        WIDE=WIDE,
        num_warps=2,
        enable_fp_fusion=False,
        **chained(device),
    )
    return out


@triton.jit(do_not_specialize=["n"])
def _gated(
    GATE,
    UP,
    OUT,
    n,
    SILU: tl.constexpr,
    LIBRARY: tl.constexpr,
    WIDE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    await_previous(CHAINED)
    x = tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=at < n, other=0.0).to(tl.float32)
    if SILU:
        x = tl.div_rn(x, 1.0 + (libdevice.exp(-x) if LIBRARY else tl.exp(-x)))
    else:  # GELU by a tanh
        inner = ROOT * tl.fma(x * x * x, tl.full(x.shape, 0.044715, tl.float32), x)
        x = 0.5 * x * (1.0 + (libdevice.tanh(inner) if LIBRARY else _tanh(inner)))
    x = x.to(OUT.dtype.element_ty).to(tl.float32)
    tl.store(OUT + at, (x * up).to(OUT.dtype.element_ty), mask=at < n)


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
