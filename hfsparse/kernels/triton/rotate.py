"""Rotary embeddings of queries and keys in Triton, in one launch.

Models write them as ten operations of PyTorch. Each number is rounded here where they round it, so
the bits are the same. Bound by latency.
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


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16 and float16 are supported"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.rotate`."""
    (B, H, S, D), Hkv = q.shape, k.shape[1]
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    made = [t.new_empty(B, S, t.shape[1], D).transpose(1, 2) for t in (q, k)]
    _rotate[(B * S, H + Hkv)](
        *(q, k, *made, cos, sin),
        *(s for t in (q, k, *made) for s in t.stride()[:3]),
        *(t.stride(i) if t.shape[0] > 1 or i else 0 for t in (cos, sin) for i in (0, 1)),
        *(H, S, D // 2),
        WIDE=triton.next_power_of_2(D // 2),
        num_warps=1,
    )
    return made[0], made[1]


@triton.jit(do_not_specialize="H S".split())
def _rotate(
    Q, K, OUT_Q, OUT_K, COS, SIN,
    q_b, q_h, q_s, k_b, k_h, k_s, out_q_b, out_q_h, out_q_s, out_k_b, out_k_h, out_k_s,
    cos_b, cos_s, sin_b, sin_s, H, S, half, WIDE: tl.constexpr,
):  # fmt: skip
    b, s = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    head = tl.program_id(1)
    cos, sin = COS + b * cos_b + s * cos_s, SIN + b * sin_b + s * sin_s
    if head < H:
        at, out = Q + b * q_b + head * q_h + s * q_s, b * out_q_b + head * out_q_h + s * out_q_s
        _turn(at, OUT_Q + out, cos, sin, half, WIDE)
    else:
        head -= H
        at, out = K + b * k_b + head * k_h + s * k_s, b * out_k_b + head * out_k_h + s * out_k_s
        _turn(at, OUT_K + out, cos, sin, half, WIDE)


@triton.jit
def _turn(X, OUT, COS, SIN, half, WIDE: tl.constexpr):
    """One head of one token, whose first half of channels turns with the second."""
    d = tl.arange(0, WIDE)
    live = d < half
    first, second = tl.load(X + d, mask=live), tl.load(X + half + d, mask=live)
    one = _times(first, COS + d, live) + _times(-second, SIN + d, live)
    two = _times(second, COS + half + d, live) + _times(first, SIN + half + d, live)
    tl.store(OUT + d, one.to(OUT.dtype.element_ty), mask=live)
    tl.store(OUT + half + d, two.to(OUT.dtype.element_ty), mask=live)


@triton.jit
def _times(x, at, live):
    """A product, rounded as PyTorch rounds it."""
    product = x.to(tl.float32) * tl.load(at, mask=live).to(tl.float32)
    return product.to(x.dtype).to(tl.float32)
