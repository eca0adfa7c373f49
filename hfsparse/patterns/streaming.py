"""Streaming heads: the first `sink` and the last `recent` tokens (StreamingLLM, arXiv 2309.17453).

With `recent_per_token` the window grows with the query's position, as in MoA (arXiv 2406.14909):
span(p) = recent + recent_per_token * p, rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hfsparse.lists import RATE_ONE, Band, BlockLists, Grid
from hfsparse.lists.packed import BITS, Bits
from hfsparse.patterns.pattern import register
from hfsparse.registry import later, require


@register("streaming")
@dataclass(frozen=True)
class Streaming:
    """Parameters in tokens; the query's own token counts as recent."""

    sink: int = 64
    recent: int = 256
    recent_per_token: float = 0.0
    bits: Bits = later(16)  # of a number that a ring keeps; prompts know nothing of it

    def __post_init__(self):
        require(self.sink >= 0, f"sink is {self.sink}: give 0 or more tokens")
        require(self.recent >= 1, f"recent is {self.recent}: give 1 or more tokens")
        require(
            0 <= self.recent_per_token <= 1,
            f"recent_per_token is {self.recent_per_token}: give 0 to 1, or dropped keys come back",
        )
        require(self.bits in BITS, f"bits is {self.bits!r}: give 16, 8, 4 or fp8")

    @property
    def band(self) -> Band:
        return Band(self.sink, self.recent, round(self.recent_per_token * RATE_ONE))

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]`; only positions decide, q and k are not read."""
        return BlockLists.of(grid, q.shape[1], band=self.band)
