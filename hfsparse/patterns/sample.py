"""Column heads found by sampled queries (SampleAttention, arXiv 2406.15486).

One query of `stride` attends exactly. The probabilities of these, summed by column, say which keys
matter: a head keeps the fewest columns that hold the share `alpha` of them, and a local window. The
row's first block and blocks that hold a key of the window are read whole; columns are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfsparse.lists import FAR, BlockLists, Grid
from hfsparse.patterns.pattern import register
from hfsparse.precision import exact
from hfsparse.registry import require, require_shares
from hfsparse.shares import counted, ratio, share_of

LOGITS = 1 << 25  # of sampled queries, at a time


@register("sample")
@dataclass(frozen=True)
class Sample:
    """Share of the sampled attention kept; at most the share `max_share` of the row's keys.

    window: of the row's tokens, the query's own and the nearest before it.
    """

    alpha: float = 0.95
    stride: int = 20
    window: float = 0.08
    max_share: float = 0.1

    def __post_init__(self):
        require_shares(self, "alpha", "window", "max_share")
        require(self.stride >= 1, f"stride is {self.stride}: give 1 or more queries")

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks and columns kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
        return self.chosen(scores(q, k, grid, scale, self.stride), grid)

    def chosen(self, mass: Tensor, grid: Grid) -> BlockLists:
        """What is kept, by the mass `[B, H, Sk]` of `scores`."""
        ranked, order = torch.sort(mass, dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # mass of the columns that come first
        queries = (grid.q_len + self.stride - 1) // self.stride
        queries = queries.clamp(min=1)[:, None, None]
        needed = share_of(mass.sum(-1, keepdim=True) // queries, *ratio(self.alpha)) * queries
        rank, tokens = torch.arange(grid.Sk, device=mass.device), grid.k_len[:, None, None]
        wanted = (rank < tokens) & ((before < needed) | (self.alpha == 1))
        most = share_of(tokens, *ratio(self.max_share))
        columns = torch.where(wanted & (rank < most), order, FAR)
        columns = columns[..., : share_of(grid.Sk, *ratio(self.max_share))].sort(-1).values
        short = (wanted & (rank >= most)).any(-1)
        cut = short * (grid.q_rows > 0).sum(-1, keepdim=True)
        return replace(
            BlockLists.of(grid, mass.shape[1], self._near(grid), columns=columns), cut=cut
        )

    def _near(self, grid: Grid) -> Tensor:
        """Block map `[B, 1, nq, nk]` of the first block and those that hold a key of the window."""
        tokens = share_of(grid.k_len, *ratio(self.window))[:, None, None]
        newest = (grid.first + grid.live - 1)[:, None]
        near = newest > grid.q_first[..., None] - tokens
        near[..., :1] = True
        return near[:, None]


def scores(q: Tensor, k: Tensor, grid: Grid, scale: float, stride: int) -> Tensor:
    """Attention of each row's last query and every stride-th before it, by key: int64 `[B, H, Sk]`.

    The sums are exact, so they don't depend on how many queries are taken at a time.
    """
    B, H, Sq, D = q.shape
    keys, at = exact(k), torch.arange(grid.Sk, device=q.device)
    rows = grid.q_len[:, None] - 1 - torch.arange(0, Sq, stride, device=q.device)
    total = torch.zeros(B, H, grid.Sk, dtype=torch.int64, device=q.device)
    for row in rows.split(max(1, LOGITS // max(1, B * H * grid.Sk)), dim=1):
        place = row.clamp(min=0)[:, None, :, None].expand(-1, H, -1, D)
        probe = exact(q.gather(2, place)).unflatten(1, (k.shape[1], -1))
        logits = torch.einsum("bkgpd,bksd->bkgps", probe, keys).flatten(1, 2).float() * scale
        far = (grid.offset[:, None] + row)[:, None, :, None] - at
        seen = (far >= 0) & (row >= 0)[:, None, :, None]
        if grid.window is not None:
            seen &= far < grid.window
        mass = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0)
        total += counted(mass).sum(2)
    return total
