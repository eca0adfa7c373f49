"""PyTorch's flash kernel of the CPU, for the kernels that are made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.kernels.need import Need

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NEVER = -1e30  # a masked logit: of rows that hold -inf alone, it gives NaN and tells no LSE


def why_not(need: Need) -> str | None:
    """Why it can't serve, if it can't."""
    if need.device.type != "cpu":
        return f"serves the CPU, not {need.device.type}"
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    if need.logits:
        return "no softcap, no sink logits"
    return "no gradients" if need.grad else None


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention `[N, H, Q, D]` of q over k, v `[N, H, S, D]`, and its LSE `[N, H, Q]`.

    mask: float32 that is added to logits `[N, H, Q, S]`.
    """
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return run(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def additive(kept: Tensor) -> Tensor:
    """The mask of kept keys: 0 where True, NEVER elsewhere."""
    return torch.zeros(kept.shape, dtype=torch.float32, device="cpu").masked_fill_(~kept, NEVER)
