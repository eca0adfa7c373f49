"""Block-sparse heads: key blocks of nearly the highest energy (FlashPrefill, arXiv 2603.06199).

The energy of a key block is the sum, over the rows of a query block, of exp(q · its mean key),
scaled as logits are; all count from one maximum, and rows are not normalised. A query block keeps
the blocks of at least `alpha` times its largest energy: nothing is sorted or summed up. A row sees
a block from the block's first key on.

FlashPrefill V2 adds up the rows of a whole group of q heads; here each q head chooses for itself.
In a chunk, `dense_blocks` are the chunk's own last blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.blocks import leading, means, ordered, products, visible
from hfsparse.patterns.pattern import register
from hfsparse.registry import later, require, require_shares
from hfsparse.shares import ratio, share_of


@register("energy")
@dataclass(frozen=True)
class Energy:
    """Share of the largest energy, and blocks that are kept in any case.

    `sink_blocks` are the row's first blocks, `recent_blocks` the last ones up to that of the query
    block's first query, `dense_blocks` the last query blocks, which keep all they see. Of the
    visible blocks at most the share `max_share` is kept, unless more are kept in any case.
    """

    alpha: float = 0.1
    sink_blocks: int = 2
    recent_blocks: int = 4
    dense_blocks: int = 0
    max_share: float = 0.5
    means: bool = later(False)

    def __post_init__(self):
        require_shares(self, "alpha", "max_share")
        for name in ("sink_blocks", "recent_blocks", "dense_blocks"):
            count = getattr(self, name)
            require(count >= 0, f"{name} is {count}: give 0 or more blocks")

    def width(self, blocks: int) -> int:
        """The most that a query block keeps of so many blocks, if there are that many."""
        always = max(self.sink_blocks, 1) + max(self.recent_blocks, 1) + 1  # OWN among them
        return blocks if self.dense_blocks else max(self.capped(blocks), always)

    def capped(self, blocks):
        """The share `max_share` of so many blocks."""
        return share_of(blocks, *ratio(self.max_share))

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
        level = levels(q, k, grid, scale)
        seen, own = (m[:, None] for m in visible(grid))
        own = own | (seen & self._always(grid)[:, None])
        near = level >= level.amax(-1, keepdim=True) + log(self.alpha)
        wanted = (own | (seen & near)).sum(-1)
        most = torch.maximum(self.capped(seen.sum(-1)), own.sum(-1))
        keep = leading(ordered(level, seen, own), torch.minimum(wanted, most))
        return replace(BlockLists.of(grid, q.shape[1], keep), cut=(wanted > most).sum(-1))

    def _always(self, grid: Grid) -> Tensor:
        """Map `[B, nq, nk]` of sinks, recent blocks and all of the last query blocks."""
        block, sinks = grid.block, self.sink_blocks * grid.block
        recent = grid.q_first.div(block, rounding_mode="floor") - self.recent_blocks
        home = grid.first // block
        always = (grid.first < sinks)[:, None] | (home[:, None] > recent[..., None])
        blocks = (grid.q_rows > 0).sum(-1, keepdim=True)
        i = torch.arange(grid.nq, device=blocks.device)
        return always | (i >= blocks - self.dense_blocks)[..., None]


def levels(q: Tensor, k: Tensor, grid: Grid, scale: float) -> Tensor:
    """Logarithms of the energies `[B, H, nq, nk]`, -inf where no row sees the block."""
    logits = products(q, means(k, grid.live, grid.block)) * scale  # [B, H, Sq, nk]
    p, newest = grid.query_pos()[..., None], grid.first + grid.live - 1
    seen = (grid.first[:, None] <= p) & (grid.live[:, None] > 0)  # [B, Sq, nk]; p is -1 in pads
    if grid.window is not None:
        seen &= p - newest[:, None] < grid.window
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    rows = grid.nq * grid.block - grid.Sq
    logits = torch.nn.functional.pad(logits, (0, 0, 0, rows), value=-torch.inf)
    return logits.unflatten(2, (grid.nq, grid.block)).logsumexp(3)
