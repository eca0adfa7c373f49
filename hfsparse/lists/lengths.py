"""How long rows are before a call and behind it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


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
        self.prompts: dict[torch.device, Any] = {}  # where they are prompts: as kernels take them

    @classmethod
    def of(cls, starts: Sequence[int] | None, before: int, columns: int, batch: int) -> Lengths:
        """Of `columns` behind `before` others; starts: rows' first real columns (None: all 0)."""
        if starts is None:
            return cls([before] * batch, [columns] * batch, columns)
        past = [max(before - s, 0) for s in starts]
        return cls(past, [before + columns - max(before, s) for s in starts], columns)

    @classmethod
    def between(cls, past: Sequence[int], rows: Sequence[int], columns: int) -> Lengths:
        """Of rows that grow from `past` to `rows` tokens."""
        return cls([*past], [n - p for p, n in zip(past, rows, strict=True)], columns)

    @cached_property
    def runs(self) -> list[tuple[slice, int, int]]:
        """Runs of rows that can be stored in one copy: (slice of rows, past, new)."""
        if len(set(self.past)) == len(set(self.new)) == 1:
            return [(slice(None), self.past[0], self.new[0])]
        each = enumerate(zip(self.past, self.new, strict=True))
        return [(slice(b, b + 1), p, n) for b, (p, n) in each]

    def pads(self, device: torch.device) -> Tensor:
        """[B] pad columns in front of each row's new tokens."""
        return torch.tensor([self.columns - n for n in self.new], device=device)


def on_device(rows: list[int], device: torch.device) -> Tensor:
    """Rows' lengths `[B]` on a device; the host waits for no copy."""
    if len(set(rows)) == 1:
        return torch.full((len(rows),), rows[0], device=device)
    lengths = torch.tensor(rows, device="cpu")
    lengths = lengths.pin_memory() if device.type == "cuda" else lengths
    return lengths.to(device, non_blocking=True)
