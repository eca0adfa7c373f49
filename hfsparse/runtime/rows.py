"""Heads and rows of a batch, taken apart and put together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

NO_GUARD = nullcontext()


class Lengths:
    """How many tokens each row of a batch has before a call, in its columns, and behind it.

    One object serves all layers of a call: what they share is kept by it.
    """

    def __init__(self, past: list[int], new: list[int], columns: int):
        self.past, self.new, self.columns = past, new, columns
        self.rows = [p + n for p, n in zip(past, new, strict=True)]
        self.longest = max(self.rows)
        self.behind = any(past)  # some row has a past
        self.padded = min(new) < columns

    @classmethod
    def of(cls, starts: Sequence[int] | None, before: int, columns: int, batch: int) -> Lengths:
        """Of `columns` behind `before` others; starts: rows' first real columns (None: all 0)."""
        if starts is None:
            return cls([before] * batch, [columns] * batch, columns)
        past = [max(before - s, 0) for s in starts]
        return cls(past, [before + columns - max(before, s) for s in starts], columns)

    def pads(self, device: torch.device) -> Tensor:
        """[B] pad columns in front of each row's new tokens."""
        return torch.tensor([self.columns - n for n in self.new], device=device)


def device_guard(t: Tensor) -> AbstractContextManager:
    """Its device as the current one: Triton launches there (a model may lie on several)."""
    return torch.cuda.device(t.device) if t.is_cuda else NO_GUARD


def q_heads_of(kv_heads: Sequence[int], ratio: int) -> list[int]:
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
    return tensors if rows is None else tuple(t[rows] for t in tensors)


def new_output(q: Tensor, v: Tensor) -> Tensor:
    """Room for the output `[B, H, Q, Dv]`, token by token in memory, as models want it next."""
    B, H, Q, _ = q.shape
    if torch.is_grad_enabled():  # autograd refuses some writes into a view of a leaf
        return q.new_empty(B, H, Q, v.shape[3])
    return q.new_empty(B, Q, H, v.shape[3]).transpose(1, 2)
