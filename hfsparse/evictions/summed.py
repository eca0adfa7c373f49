"""What evictions have in common whose scores add up over queries: the cache stays at its size.

Softmax weights are summed by key over queries, those of a prompt and those of each step, and
averaged over the q heads of a group; `decay` is what is left of a sum one query later. A new token
pushes out the key of the lowest sum outside the newest ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hfsparse.evictions.attention import attention_got
from hfsparse.evictions.eviction import require_sizes
from hfsparse.lists import Grid


@dataclass(frozen=True)
class Summed:
    """Keys that a head holds, however long its row."""

    size: int = 1024
    window: int = 512

    adds_up = True
    decay = 1.0
    watched = None

    def __post_init__(self):
        require_sizes(self)

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
        return attention_got(q, k, grid, scale, softcap, s_aux, self.decay)
