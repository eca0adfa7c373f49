"""Dense causal attention by PyTorch's own kernels: full heads, rows under `below`, ring steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hfsparse.kernels.positions import positions
from hfsparse.lists import Grid

MASK = 1 << 22  # booleans in the largest mask built at a time


def prefill(q: Tensor, k: Tensor, v: Tensor, grid: Grid, *, scale: float) -> Tensor:
    """Attention `[B, H, Sq, Dv]` of q `[B, H, Sq, D]` over earlier keys of k, v `[B, Hkv, Sk, D]`.

    Without a past the kernel's own causal form serves, padded rows too: their pads come last.
    """
    if not (grid.padded or grid.past):
        return _attend(q, k, v, scale, causal=grid.Sq > 1)
    key = grid.key_pos[:, : grid.Sk]
    k, v = _clean(k, v, key)
    if not grid.past and grid.key_first is None:
        out = _attend(q, k, v, scale, causal=grid.Sq > 1)
    else:
        step = max(1, MASK // (len(q) * grid.Sk))
        pieces = torch.arange(grid.Sq, device=q.device).split(step)
        out = [_masked(q[:, :, rows], k, v, grid.query_pos(rows), key, scale) for rows in pieces]
        out = torch.cat(out, 2)
    return out.masked_fill(grid.query_pos()[:, None, :, None] < 0, 0)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_pos: Tensor,
    key_pos: Tensor | None = None,
    *,
    length: Tensor,
    scale: float,
    start: Tensor | None = None,
    sink: int = 0,
) -> Tensor:
    """As `reference.decode` without page lists: one masked call."""
    key_pos = positions(key_pos, length, k.shape[2])
    return _masked(q, *_clean(k, v, key_pos), query_pos, key_pos, scale, start, sink)


def _clean(k: Tensor, v: Tensor, key_pos: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with zeros in dead slots, whose NaN a mask would not hold back."""
    dead = (key_pos < 0)[:, None, :, None]
    if dead.device.type == "cpu" and not bool(dead.any()):  # elsewhere asking costs more
        return k, v
    return k.masked_fill(dead, 0), v.masked_fill(dead, 0)


def _masked(q, k, v, query_pos, key_pos, scale, start=None, sink=0) -> Tensor:
    key, query = key_pos[:, None, None, :], query_pos[:, None, :, None]
    kept = (key >= 0) & (key <= query)
    if start is not None:
        kept &= (key < sink) | (key >= start[:, None, :, None])
    return _attend(q, k, v, scale, kept)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    return out if out.dtype == v.dtype else out.to(v.dtype)  # autocast may give another
