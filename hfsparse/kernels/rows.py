"""Heads and rows of a batch, taken apart and put together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor


def q_heads_of(kv_heads: Sequence[int], ratio: int) -> list[int]:
    """The q heads that read some kv heads, `ratio` of them each."""
    return [h * ratio + i for h in kv_heads for i in range(ratio)]


def group_rows(
    keys: Sequence[Hashable], device: torch.device
) -> Iterator[tuple[Hashable, list[int], Tensor | None]]:
    """Batch rows of equal key: (key, rows, their index on the device, or None when all are)."""
    for key in dict.fromkeys(keys):
        rows = [b for b, other in enumerate(keys) if other == key]
        yield key, rows, None if len(rows) == len(keys) else torch.tensor(rows, device=device)


def put_rows(out: Tensor, rows: Tensor | None, at: slice | Tensor, part: Tensor) -> None:
    """Write a part's result into `[B, H, Q, D]` at some rows and heads."""
    if rows is None:
        out[:, at] = part
    else:
        out[rows if isinstance(at, slice) else rows[:, None], at] = part


def take_rows(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Those rows of each tensor; None: all."""
    return tensors if rows is None else tuple(t[rows] for t in tensors)
