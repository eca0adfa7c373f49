"""What a pattern is, and the kinds that plans may name.

@register("streaming")
@dataclass(frozen=True)
class Streaming:
    def lists(self, q, k, grid, scale) -> BlockLists: ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.precision import without_autocast

PATTERNS: dict[str, type] = {}
OWN = 3  # blocks every query block keeps at most: the row's first, and two that hold its queries


class Pattern(Protocol):
    """What the patcher and the profiler ask of a pattern."""

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`: post-RoPE, row-relative."""
        ...


def register(kind: str) -> Callable[[type], type]:
    """Make a pattern known to plans under `kind:`."""

    def add(cls: type) -> type:
        cls.kind, cls.lists = kind, without_autocast(cls.lists)
        PATTERNS[kind] = cls
        return cls

    return add
