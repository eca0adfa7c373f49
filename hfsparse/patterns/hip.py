"""Block-sparse heads found by halving (HiP, arXiv 2406.09827).

Between sink and window each block of keys is halved until one key is left: of two halves the one
whose middle key matches the queries better goes on. The score of the key that is left ranks the
block, and a query block keeps a share of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.blocks import leading, ordered, visible
from hfsparse.patterns.pattern import register
from hfsparse.precision import exact
from hfsparse.registry import later, require, require_shares
from hfsparse.shares import ratio, share_of

EVERY = 4  # queries of a block, of which one is asked
GATHERED = 1 << 26  # numbers of keys, at a time


@register("hip")
@dataclass(frozen=True)
class HiP:
    """Share kept of the blocks between the first `sink` and the last `recent` tokens."""

    share: float = 0.1
    sink: int = 256
    recent: int = 1024
    means: bool = later(False)

    def __post_init__(self):
        require_shares(self, "share")
        require(self.sink >= 0, f"sink is {self.sink}: give 0 or more tokens")
        require(self.recent >= 1, f"recent is {self.recent}: give 1 or more tokens")

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
        return self.chosen(scores(q, k, grid), grid)

    def chosen(self, score: Tensor, grid: Grid) -> BlockLists:
        """What is kept, by the `scores` `[B, H, nq, nk]`."""
        seen, own = visible(grid)
        first, newest = grid.first[:, None], (grid.first + grid.live - 1)[:, None]
        near = (first < self.sink) | (newest > grid.q_first[..., None] - self.recent)
        always = (own | (seen & near))[:, None]
        seen = seen[:, None]
        count = always.sum(-1) + share_of((seen & ~always).sum(-1), *ratio(self.share))
        keep = leading(ordered(score, seen, always), count)
        return BlockLists.of(grid, score.shape[1], keep)


def scores(q: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """Best product of a query and the key that halving leaves, `[B, H, nq, nk]`.

    Only blocks of which every query of the block sees all keys have one that means something.
    """
    B, H, Sq, D = q.shape
    nq, nk, block, kv_heads = grid.nq, grid.nk, grid.block, k.shape[1]
    queries = torch.nn.functional.pad(q, (0, 0, 0, nq * block - Sq))
    queries = queries.unflatten(2, (nq, block))[:, :, :, ::EVERY].unflatten(1, (kv_heads, -1))
    keys = torch.nn.functional.pad(k, (0, 0, 0, nk * block - k.shape[2]))
    lane = torch.arange(0, block, EVERY, device=q.device)
    at = torch.where(lane < grid.q_rows[..., None], grid.q_first[..., None] + lane, -1)
    first = torch.arange(nk, device=q.device) * block
    step = max(1, GATHERED // max(1, B * H * nk * D))
    found = []
    for i in range(0, nq, step):
        few, place = exact(queries[:, :, :, i : i + step]), at[:, None, None, i : i + step, :, None]

        def score(of: Tensor, few=few, place=place) -> Tensor:
            """Largest product with the key at `of`, all `[B, Hkv, G, n, nk]`."""
            wide = (first + of).flatten(2)[..., None].expand(-1, -1, -1, D)
            key = exact(keys.gather(2, wide)).view(*of.shape, D)
            product = torch.einsum("bkgnrd,bkgnjd->bkgnrj", few, key).float()
            read = place >= 0
            if grid.window is not None:
                read = read & (place - (first + of)[..., None, :] < grid.window)
            return product.masked_fill(~read, torch.finfo(product.dtype).min).amax(-2)

        left = torch.zeros(*few.shape[:4], nk, dtype=torch.int64, device=q.device)
        half = block // 2
        while half:
            low, high = score(left + half // 2), score(left + half + half // 2)
            left, best = left + half * (high > low), torch.maximum(low, high)
            half //= 2
        found.append(best.flatten(1, 2))
    return torch.cat(found, 2)
