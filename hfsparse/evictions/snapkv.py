"""SnapKV: keep the keys that a prompt's last queries attended to (arXiv 2404.14469).

The last `window` queries' attention is summed by key and averaged over the q heads of a group. A
key counts for as much as the best of the `pool` keys around it, so that what stands beside an
answer stays with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from hfsparse.evictions.attention import attention_got
from hfsparse.evictions.eviction import register, require_sizes
from hfsparse.lists import Grid
from hfsparse.registry import require


@register("snapkv")
@dataclass(frozen=True)
class SnapKV:
    """Keys that a prompt leaves; pool: neighbours that share their score, 1: none do."""

    size: int = 1024
    window: int = 64
    pool: int = 7

    adds_up = False

    def __post_init__(self):
        require_sizes(self)
        odd = self.pool >= 1 and self.pool % 2 == 1
        require(odd, f"pool is {self.pool}: give an odd number of keys, 1 or more")

    @property
    def watched(self) -> int:
        return self.window

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        grid: Grid,
        scale: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """As `Eviction.scores`; the newest keys, which stay in any case, lend theirs to none."""
        got = attention_got(q, k, grid, scale, softcap, s_aux)
        slot = torch.arange(k.shape[2], device=k.device)
        got = got.masked_fill(slot >= (grid.k_len - self.window)[:, None, None], 0)
        return max_pool1d(got, self.pool, 1, self.pool // 2)
