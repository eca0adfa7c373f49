"""What a pattern is, and the kinds that plans may name.

@register("streaming")
@dataclass(frozen=True)
class Streaming:
    def lists(self, q, k, grid, scale) -> BlockLists: ...
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.registry import Registry

PATTERNS = Registry("lists")
OWN = 3  # blocks every query block keeps at most: the row's first, and two that hold its queries

register = PATTERNS.register


class Pattern(Protocol):
    """What the patcher and the profiler ask of a pattern.

    One whose blocks positions alone choose may say so by `placed(grid, heads) -> BlockLists`: the
    layers of a call then share its lists.
    """

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`: post-RoPE, row-relative."""
        ...
