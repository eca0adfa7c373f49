"""Attention over rows that are longer than those that a model was trained on.

The cache keeps keys as they come. Queries are turned anew for each chunk of keys, kernels read
chunk by chunk, and what they give is merged by LSE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfsparse.kernels.merge import Merged
from hfsparse.plan.extend import DualChunk


@dataclass(frozen=True, eq=False)
class Extension:
    """A plan's `extend`, for one layer."""

    rule: DualChunk
    inv_freq: Tensor  # [D / 2] radians a token

    def attend(
        self, q: Tensor, position: Tensor, tokens: int, read: Callable[..., Tensor]
    ) -> Tensor:
        """Attention `[B, Hq, Q, Dv]` of q `[B, Hq, Q, D]` at `position` [B, Q].

        tokens: of the longest row. read(q, low, high, lse) -> Tensor: attention over the keys at
        positions from `low` on and before `high`, which fills lse `[B, Hq, Q]`.
        """
        merged = None
        for low in range(0, tokens, self.rule.size):
            lse = q.new_empty(q.shape[:3], dtype=torch.float32)
            out = read(self.turn(q, position, low), low, low + self.rule.size, lse)
            if merged is None:
                merged = Merged(out, lse)
            else:
                merged.add(out, lse)
        return merged.out.to(out.dtype)

    def turn(self, q: Tensor, position: Tensor, low: int) -> Tensor:
        """q for the keys from `low` on; bit for bit itself where nothing moves."""
        inv_freq = self.inv_freq.to(q.device).double()
        angle = self.rule.moves(position, low)[:, None, :, None] * inv_freq
        sharper = self.rule.sharpens(position)[:, None, :, None]
        return rotate(q, angle, sharper).to(q.dtype)


def rotate(q: Tensor, angle: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """q `[..., D]` whose dims d and d + D / 2 are turned by `angle` `[..., D / 2]`, in float32."""
    cos, sin = ((turned * scale).float() for turned in (angle.cos(), angle.sin()))
    a, b = q.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
