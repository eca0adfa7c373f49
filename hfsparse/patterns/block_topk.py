"""Block-sparse heads: the best key blocks by mean-pooled q and k (MInference, arXiv 2407.02490).

The score is also MoBA's (arXiv 2502.13189). Each query block keeps a share of the blocks it can
see; the row's first block and those that hold its own queries always.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.blocks import means, products, visible
from hfsparse.patterns.pattern import OWN, register
from hfsparse.registry import later, require, require_shares
from hfsparse.shares import ratio, share_of


@register("block_topk")
@dataclass(frozen=True)
class BlockTopK:
    """Share of the visible blocks kept, never fewer than `min_blocks` (where that many exist)."""

    share: float = 0.1
    min_blocks: int = 16
    means: bool = later(False)

    def __post_init__(self):
        require_shares(self, "share")
        require(self.min_blocks >= 1, f"min_blocks is {self.min_blocks}: give 1 or more")

    def width(self, blocks: int) -> int:
        """The most that a query block keeps of so many blocks, if there are that many."""
        return max(share_of(blocks, *ratio(self.share)), self.min_blocks, OWN)

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
        score = scores(q, k, grid)
        seen, forced = visible(grid)
        score = score.masked_fill(forced[:, None], torch.inf)
        score = score.masked_fill(~seen[:, None], -torch.inf)
        budget = share_of(seen.sum(-1)[:, None], *ratio(self.share)).clamp(min=self.min_blocks)
        width = min(grid.nk, self.width(grid.nk))
        best = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :width]
        rank = torch.arange(width, device=q.device)
        ours = rank < torch.maximum(budget, forced.sum(-1)[:, None])[..., None]
        keep = torch.zeros(*score.shape[:3], grid.nk + 1, dtype=torch.bool, device=q.device)
        keep.scatter_(3, torch.where(ours, best, grid.nk), True)
        return BlockLists.of(grid, q.shape[1], keep[..., : grid.nk])


def scores(q: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """Dot products of mean queries and mean keys by block, `[B, H, nq, nk]`; pads left out."""
    queries = means(q, grid.q_rows, grid.block)
    return products(queries, means(k, grid.live, grid.block))
