"""H2O: keep the heavy hitters, the keys that all queries so far attended to (arXiv 2306.14048).

Softmax weights are summed by key over every query of the prompt and of each step, and averaged over
the q heads of a group. A new token pushes out the key of the lowest sum outside the newest ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hfsparse.evictions.attention import attention_got
from hfsparse.evictions.eviction import register
from hfsparse.lists import Grid
from hfsparse.registry import require


@register("h2o")
@dataclass(frozen=True)
class H2O:
    """Keys that a head holds, however long its row."""

    size: int = 1024
    window: int = 512

    adds_up = True

    def __post_init__(self):
        require(self.size >= 1, f"size is {self.size}: give 1 or more keys")
        require(self.window >= 1, f"window is {self.window}: give 1 or more keys")

    @property
    def watched(self) -> None:
        return None

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        grid: Grid,
        scale: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """As `Eviction.scores`."""
        return attention_got(q, k, grid, scale, softcap, s_aux)
