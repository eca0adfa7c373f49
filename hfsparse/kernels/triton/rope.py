"""Rotary embedding of a few tokens' queries and keys in one Triton launch.

Models write it as some ten operations of PyTorch. Each number is rounded here where they round it,
and no product is joined with a sum, so the bits are the same. Bound by latency.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import WIDEST, await_previous, chained

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

DTYPES = (torch.bfloat16, torch.float16)
HEADS = 4  # of a program


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16 and float16 are supported"
    if need.head_dim % 2 or need.head_dim > WIDEST:
        return f"head dim {need.head_dim}: even ones up to {WIDEST} are supported"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.rotate`."""
    (B, H, S, D), Hkv = q.shape, k.shape[1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    made = [t.new_empty(B, S, t.shape[1], D).transpose(1, 2) for t in (q, k)]  # as projections lie
    _rotate[(B * S, triton.cdiv(H, HEADS) + triton.cdiv(Hkv, HEADS))](
        *(q, k, cos.contiguous(), sin.contiguous(), *made),
        *(s for t in (q, k) for s in t.stride()[:3]),
        *(H, Hkv, S),
        ONE=len(cos) == 1,
        D=D,
        HALF=triton.next_power_of_2(D // 2),
        HEADS=HEADS,
        num_warps=2,
        enable_fp_fusion=False,
        **chained(str(q.device)),
    )
    return tuple(made)


@triton.jit
def _rotate(
    Q,
    K,
    COS,
    SIN,
    Q_OUT,
    K_OUT,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    H,
    Hkv,
    S,
    ONE: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, at = token // S, token % S
    angle = (at if ONE else token) * D
    parts = tl.cdiv(H, HEADS)
    await_previous(CHAINED)
    if part < parts:
        x, out = Q + row * q_row + at * q_token, Q_OUT + token * H * D
        _rotate_heads(x, q_head, out, part * HEADS, H, COS + angle, SIN + angle, D, HALF, HEADS)
    else:
        part -= parts
        x, out = K + row * k_row + at * k_token, K_OUT + token * Hkv * D
        _rotate_heads(x, k_head, out, part * HEADS, Hkv, COS + angle, SIN + angle, D, HALF, HEADS)


@triton.jit
def _rotate_heads(
    X, stride, OUT, first, H, COS, SIN, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
):
    """Some heads of one token, from their first one on."""
    at = tl.arange(0, HEADS * HALF)  # in one dim: angles lie in registers as heads do
    head, d = first + at // HALF, at % HALF
    live = (head < H) & (d < D // 2)
    X += head * stride + d
    OUT += head * D + d
    low = tl.load(X, mask=live, other=0.0).to(tl.float32)
    high = tl.load(X + D // 2, mask=live, other=0.0).to(tl.float32)
    cos = tl.load(COS + d, mask=live, other=0.0).to(tl.float32)
    sin = tl.load(SIN + d, mask=live, other=0.0).to(tl.float32)
    tl.store(OUT, _turn(low, -high, cos, sin, OUT.dtype.element_ty), mask=live)
    cos = tl.load(COS + d + D // 2, mask=live, other=0.0).to(tl.float32)
    sin = tl.load(SIN + d + D // 2, mask=live, other=0.0).to(tl.float32)
    tl.store(OUT + D // 2, _turn(high, low, cos, sin, OUT.dtype.element_ty), mask=live)


@triton.jit
def _turn(x, other, cos, sin, DTYPE: tl.constexpr):
    """Products are rounded before they are added."""
    a, b = (x * cos).to(DTYPE), (other * sin).to(DTYPE)
    return (a.to(tl.float32) + b.to(tl.float32)).to(DTYPE)
