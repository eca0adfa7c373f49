"""Vertical-slash heads: a few columns and a few diagonals (MInference, arXiv 2407.02490).

The row's last 64 queries attend exactly; their probabilities, summed by column and by diagonal,
say which to keep. Blocks that hold a kept diagonal are read whole; columns are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfsparse.lists import FAR, BlockLists, Grid
from hfsparse.patterns.pattern import register
from hfsparse.precision import exact
from hfsparse.registry import require

PROBES = 64  # last queries of a row whose attention is computed
FORCED_COLUMNS, FORCED_DIAGONALS = 30, 100  # always kept, as in the paper's code


@register("vertical_slash")
@dataclass(frozen=True)
class VerticalSlash:
    """How many columns and diagonals a head keeps, the forced ones included."""

    columns: int = 1000
    diagonals: int = 4096

    def __post_init__(self):
        require(self.columns >= 1, f"columns is {self.columns}: give 1 or more")
        require(self.diagonals >= 1, f"diagonals is {self.diagonals}: give 1 or more")

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks and columns kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
        by_column, by_diagonal = scores(q, k, grid, scale)
        ends = grid.k_len[:, None, None]
        columns = _best(by_column, FORCED_COLUMNS, self.columns, ends)
        diagonals = _best(by_diagonal, FORCED_DIAGONALS, self.diagonals, ends)
        return BlockLists.of(grid, q.shape[1], slashes(diagonals, grid), columns=columns)


def scores(
    q: Tensor, k: Tensor, grid: Grid, scale: float, count: int = PROBES
) -> tuple[Tensor, Tensor]:
    """Attention of each row's last `count` queries, by key and by distance: two `[B, H, Sk]`."""
    B, H, _, D = q.shape
    probes = (grid.q_len[:, None] - count + torch.arange(count, device=q.device)).clamp(min=-1)
    at = grid.offset[:, None] + probes  # [B, count] positions; probes before the first are unused
    rows = probes.clamp(min=0)[:, None, :, None].expand(B, H, -1, D)
    probe = exact(q.gather(2, rows)).view(B, k.shape[1], -1, count, D)
    logits = torch.einsum("bkgpd,bksd->bkgps", probe, exact(k)).reshape(B, H, count, -1) * scale
    far = at[:, None, :, None] - torch.arange(grid.Sk, device=q.device)  # distance query to key
    seen = (far >= 0) & (probes >= 0)[:, None, :, None]
    if grid.window is not None:
        seen &= far < grid.window
    mass = torch.softmax(logits.float().masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0)
    by_diagonal = mass.new_zeros(B, H, grid.Sk)
    by_diagonal.scatter_add_(
        2, far.clamp(0, grid.Sk - 1).expand(B, H, -1, -1).flatten(2), mass.flatten(2)
    )
    return mass.sum(2), by_diagonal


def _best(score: Tensor, forced: int, count: int, ends: Tensor) -> Tensor:
    """Ascending positions of the `count` best scores `[B, H, S]`, the first `forced` among them."""
    at = torch.arange(score.shape[-1], device=score.device)
    score = score.masked_fill(at < min(forced, count), torch.inf)
    score = score.masked_fill(at >= ends, -torch.inf)
    best = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.where(best < ends, best, FAR).sort(-1).values


def slashes(diagonals: Tensor, grid: Grid) -> Tensor:
    """Block map `[B, H, nq, nk]` of the blocks that hold a kept diagonal `[B, H, n]`."""
    size = grid.Sk + 1
    kept = torch.zeros(*diagonals.shape[:2], size, dtype=torch.int32, device=diagonals.device)
    kept.scatter_(2, diagonals.clamp(max=grid.Sk), 1)
    kept[..., grid.Sk] = 0
    kept = kept.cumsum(-1, dtype=torch.int32)
    before = torch.nn.functional.pad(kept, (1, 0))  # kept diagonals below a distance
    # distances inside a block pair, pads left out: nearest .. farthest
    nearest = grid.q_first[:, :, None] - (grid.first + grid.live - 1)[:, None]
    farthest = grid.q_last[:, :, None] - grid.first[:, None]
    low, high = (t.clamp(0, size)[:, None] for t in (nearest, farthest + 1))
    shape = (*diagonals.shape[:2], grid.nq * grid.nk)

    def at(distance: Tensor) -> Tensor:
        return before.gather(2, distance.flatten(2).expand(shape)).view(
            *shape[:2], grid.nq, grid.nk
        )

    return at(high) > at(low)
