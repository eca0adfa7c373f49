"""Dense causal attention through PyTorch's own kernels: full heads, rows under `below`, ring steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hfsparse.lists import Grid

MASK = 1 << 22  # booleans in the largest mask built at a time


def prefill(q: Tensor, k: Tensor, v: Tensor, grid: Grid, *, scale: float) -> Tensor:
    """Attention of q `[B, H, Sq, D]` over all earlier keys of k, v `[B, Hkv, Sk, D]`: `[B, H, Sq, Dv]`.

    Without a past the kernel's own causal form serves, padded rows too: their pads stand at the end.
    """
    if grid.Sq == grid.Sk and grid.key_first is None:
        out = _attend(q, k, v, scale=scale, is_causal=grid.Sq > 1)
    else:
        step = max(1, MASK // (len(q) * grid.Sk))
        key = grid.key_pos[:, : grid.Sk]
        pieces = torch.arange(grid.Sq, device=q.device).split(step)
        out = [
            decode(q[:, :, rows], k, v, grid.query_pos(rows), key, scale=scale) for rows in pieces
        ]
        out = torch.cat(out, 2)
    return out.masked_fill(grid.query_pos()[:, None, :, None] < 0, 0)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    *,
    scale: float,
    start: Tensor | None = None,
    sink: int = 0,
) -> Tensor:
    """As `reference.decode` without page lists: one masked call, or none masked where nothing is hidden."""
    key, query = key_pos[:, None, None, :], query_pos[:, None, :, None]
    kept = (key >= 0) & (key <= query)
    if start is not None:
        kept &= (key < sink) | (key >= start[:, None, :, None])
    return _attend(q, k, v, scale=scale, attn_mask=kept)


def _attend(q: Tensor, k: Tensor, v: Tensor, **kw) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kw)
