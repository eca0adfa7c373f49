"""Block-sparse heads chosen by antidiagonals (XAttention, arXiv 2503.16428).

Groups of 16 queries meet groups of 16 keys along one antidiagonal each: sixteen products stand for
256. A softmax over the groups of keys and sums by block estimate the mass of each block, and a
query block keeps its heaviest blocks until they hold the share `tau` of it. The row's first block
and those that hold its own queries are always kept, and count first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.blocks import visible
from hfsparse.patterns.pattern import OWN, register
from hfsparse.precision import exact
from hfsparse.registry import later, require_shares
from hfsparse.shares import counted, ratio, share_of

STRIDE = 16  # tokens in a group


@register("antidiagonal")
@dataclass(frozen=True)
class Antidiagonal:
    """Share of the estimated mass kept, in at most the share `max_share` of the visible blocks."""

    tau: float = 0.9
    max_share: float = 0.5
    means: bool = later(False)

    def __post_init__(self):
        require_shares(self, "tau", "max_share")

    def width(self, blocks: int) -> int:
        """The most that a query block keeps of so many blocks, if there are that many."""
        return max(share_of(blocks, *ratio(self.max_share)), OWN)

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
        mass = scores(q, k, grid, scale)
        seen, forced = visible(grid)
        score = mass.masked_fill(forced[:, None], torch.inf).masked_fill(~seen[:, None], -1)
        order = torch.sort(score, dim=-1, descending=True, stable=True).indices
        ranked = counted(mass.gather(3, order))
        before = ranked.cumsum(-1) - ranked  # mass of the blocks that come first
        rank = torch.arange(grid.nk, device=q.device)
        blocks, own = (m.sum(-1)[:, None, :, None] for m in (seen, forced))
        enough = before >= share_of(ranked.sum(-1, keepdim=True), *ratio(self.tau))
        enough &= self.tau < 1  # at 1 rounding must not decide
        wanted = (rank < blocks) & (~enough | (rank < own))
        most = torch.maximum(share_of(blocks, *ratio(self.max_share)), own)
        keep = torch.zeros_like(wanted).scatter_(3, order, wanted & (rank < most))
        cut = (wanted & (rank >= most)).any(-1).sum(-1)
        return replace(BlockLists.of(grid, q.shape[1], keep), cut=cut)


def scores(q: Tensor, k: Tensor, grid: Grid, scale: float) -> Tensor:
    """Estimated attention by block, `[B, H, nq, nk]`: a query block's sum is its groups' number."""
    (B, H), stride = q.shape[:2], min(STRIDE, grid.block)
    q_first, q_live, queries = _groups(q, grid.q_first, grid.q_rows, grid.block, stride)
    k_first, k_live, keys = _groups(k, grid.first, grid.live, grid.block, stride)
    queries = queries.flip(3).flatten(3).unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("bkgqd,bknd->bkgqn", exact(queries), exact(keys.flatten(3)))
    logits = logits.flatten(1, 2).float()
    q0, k0 = q_first[:, None, :, None], k_first[:, None, None]
    q1, k1 = q0 + q_live[:, None, :, None] - 1, k0 + k_live[:, None, None] - 1
    seen = (k0 <= q1) & (q1 >= q0) & (k1 >= k0)
    if grid.window is not None:
        seen &= q0 - k1 < grid.window
    logits = (logits * (scale / stride)).masked_fill(~seen, -torch.inf)
    mass = torch.softmax(logits, -1).masked_fill(~seen, 0)
    per = grid.block // stride
    return mass.view(B, H, grid.nq, per, grid.nk, per).sum((3, 5))


def _groups(x: Tensor, first: Tensor, live: Tensor, block: int, stride: int) -> tuple:
    """Position of each group's first token and its tokens `[B, n]`, and x `[B, H, n, stride, D]`.

    first, live [B, blocks]. Dead tokens are zeros.
    """
    lane = torch.arange(0, block, stride, device=x.device)
    first = (first[..., None] + lane).flatten(1)
    live = (live[..., None] - lane).clamp(0, stride).flatten(1)
    x = torch.nn.functional.pad(x.float(), (0, 0, 0, live.shape[1] * stride - x.shape[2]))
    dead = torch.arange(stride, device=x.device) >= live[..., None]  # [B, n, stride]
    return first, live, x.unflatten(2, (-1, stride)).masked_fill(dead[:, None, ..., None], 0)
