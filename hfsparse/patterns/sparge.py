"""Block-sparse heads: mean-pooled blocks, where a mean speaks for its block (SpargeAttn).

A block is alike if its tokens' cosines, over all pairs of them, have a mean above `theta`; keys
count from the mean key of the row (arXiv 2502.18137). A query block that is alike keeps the best
key blocks that are alike, by the softmax of the dot products of means; blocks that are not alike
are kept by every query block, and keep every block themselves. So a `theta` below 0 ranks all
blocks. The best blocks are those that hold the share `tau` of that softmax, or, with a `tau` of 1,
a plain share of the visible blocks. Where the authors' code keeps the blocks before `tau`
is reached, this keeps the one that reaches it, too. Each q head chooses for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.blocks import leading, means, ordered, products, tokens, visible
from hfsparse.patterns.pattern import register
from hfsparse.registry import later, require, require_shares
from hfsparse.shares import counted, ratio, share_of


@register("sparge")
@dataclass(frozen=True)
class Sparge:
    """Share of the estimated attention kept, in at most the share `max_share` of the blocks.

    Blocks that are kept because they are not alike come on top. The defaults are `theta` and share
    of the authors' form with a plain share, and `tau` of their other form, whose `theta` of 0.6
    would have SmolLM2 read nearly every block whole.
    """

    theta: float = -0.1
    tau: float = 0.98
    max_share: float = 0.5
    means: bool = later(False)

    def __post_init__(self):
        require(-1 <= self.theta <= 1, f"theta is {self.theta}: give -1 to 1")
        require_shares(self, "tau", "max_share")

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
        keys = means(k, grid.live, grid.block)
        alike_k = cosines(k, grid.live, grid.block, centre(keys, grid)) > self.theta
        alike_q = cosines(q, grid.q_rows, grid.block) > self.theta
        alike_k = alike_k.repeat_interleave(q.shape[1] // k.shape[1], 1, output_size=q.shape[1])
        seen, own = (m[:, None] for m in visible(grid))
        ranked = seen & alike_q[..., None] & alike_k[:, :, None]
        first = own & ranked
        score = products(means(q, grid.q_rows, grid.block), keys) * scale
        order = ordered(score, ranked, first)
        mass = torch.softmax(score.masked_fill(~ranked, -torch.inf), -1).masked_fill(~ranked, 0)
        mass = counted(mass.gather(3, order))
        before = mass.cumsum(-1) - mass  # of the blocks that come first
        short = before < share_of(mass.sum(-1, keepdim=True), *ratio(self.tau))
        count = ranked.sum(-1)
        if self.tau < 1:  # at 1 rounding must not decide
            count = torch.minimum(count, torch.maximum(short.sum(-1), first.sum(-1)))
        most = torch.maximum(share_of(seen.sum(-1), *ratio(self.max_share)), first.sum(-1))
        keep = leading(order, torch.minimum(count, most)) | own | (seen & ~ranked)
        found = BlockLists.of(grid, q.shape[1], keep)
        return found if self.tau == 1 else replace(found, cut=(count > most).sum(-1))


def centre(keys: Tensor, grid: Grid) -> Tensor:
    """The row's mean key `[B, Hkv, D]` of its blocks' `[B, Hkv, nk, D]`."""
    total = (keys * grid.live[:, None, :, None]).sum(2)
    return total / grid.live.sum(1)[:, None, None].clamp(min=1)


def cosines(x: Tensor, live: Tensor, block: int, origin: Tensor | None = None) -> Tensor:
    """Mean cosine of all pairs of a block's tokens, each with itself too: `[B, H, n]`.

    x `[B, H, S, D]`, live `[B, n]`; vectors begin at `origin` `[B, H, D]`. Those of no length have
    a cosine of 0 with all others.
    """
    if origin is not None:
        x = x.float() - origin[:, :, None]
    x = tokens(x, live, block)
    units = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (units.sum(3).square().sum(-1) / live.clamp(min=1).square()[:, None]).clamp(max=1)
