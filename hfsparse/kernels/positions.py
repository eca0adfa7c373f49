"""Positions of the keys in a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(key_pos: Tensor | None, length: Tensor, slots: int) -> Tensor:
    """[B, slots] position of each slot, -1 where it holds nothing."""
    slot = torch.arange(slots, device=length.device)
    return torch.where(slot < length[:, None], slot if key_pos is None else key_pos, -1)
