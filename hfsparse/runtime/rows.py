"""How long rows are, and room for what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
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


def new_output(q: Tensor, v: Tensor) -> Tensor:
    """Room for the output `[B, H, Q, Dv]`, token by token in memory, as models want it next."""
    B, H, Q, _ = q.shape
    if torch.is_grad_enabled():  # autograd refuses some writes into a view of a leaf
        return q.new_empty(B, H, Q, v.shape[3])
    return q.new_empty(B, Q, H, v.shape[3]).transpose(1, 2)
