"""What patterns that rank blocks share: which blocks count, and their means."""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.lists import Grid
from hfsparse.precision import exact


def visible(grid: Grid) -> tuple[Tensor, Tensor]:
    """Block maps `[B, nq, nk]`: what some query may read, and of it what is always kept.

    Always kept are the row's first block and those that hold the query block's own tokens.
    """
    seen, _ = grid.reach()
    newest = (grid.first + grid.live - 1)[:, None]
    own = seen & (newest >= grid.q_first[..., None])
    own[..., 0] |= seen[..., 0]
    return seen, own


def tokens(x: Tensor, live: Tensor, block: int) -> Tensor:
    """x `[B, H, S, D]` as float32 blocks `[B, H, n, block, D]`; zeros past `live` `[B, n]`."""
    x = torch.nn.functional.pad(x.float(), (0, 0, 0, live.shape[1] * block - x.shape[2]))
    real = torch.arange(block, device=x.device) < live[..., None]
    return x.unflatten(2, (-1, block)).masked_fill(~real[:, None, ..., None], 0)


def means(x: Tensor, live: Tensor, block: int) -> Tensor:
    """Mean over the live tokens of each block: x `[B, H, S, D]`, live `[B, n]` → `[B, H, n, D]`."""
    return tokens(x, live, block).sum(3) / live.clamp(min=1)[:, None, :, None]


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """Dot products of `[B, H, n, D]` and `[B, Hkv, m, D]`, each head with its group's keys."""
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    return torch.einsum("bkgqd,bknd->bkgqn", exact(grouped), exact(keys)).flatten(1, 2).float()


def ordered(score: Tensor, ranked: Tensor, own: Tensor) -> Tensor:
    """Blocks `[B, H, nq, nk]`: those `own`, other `ranked` ones by score, then the rest.

    ranked, own: maps `[B, H or 1, nq, nk]`. Equal scores go to the lower block.
    """
    score = score.masked_fill(own, torch.inf).masked_fill(~ranked, -torch.inf)
    return torch.sort(score, dim=-1, descending=True, stable=True).indices


def leading(order: Tensor, count: Tensor) -> Tensor:
    """Map `[..., n]` of the first `count` `[...]` places of each order."""
    rank = torch.arange(order.shape[-1], device=order.device)
    chosen = (rank < count[..., None]).expand(order.shape)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, chosen)
