"""Heads that are query-aware or vertical-slash, as the prompt has it (FlexPrefill).

The row's last 128 queries attend exactly (arXiv 2502.20766). Their attention by block is held
against an estimate, the softmax of their mean query and the blocks' mean keys. Where the root of
the Jensen-Shannon divergence of the two is below `tau`, means can be trusted, and the head is
query-aware: the softmax of each query block's mean over the mean keys is a row of a map, of which
the best blocks are kept, in whatever row, until they hold the share `gamma` of it. Other heads keep
verticals, which are columns of blocks, and slashes, which are diagonals of blocks: of each as many
blocks as it takes single keys, or distances, to hold the share `gamma` of the exact attention.

A chunk's last queries are its own: each chunk of a prompt decides anew. Slash t is the blocks that
hold the distance t * block; behind a past that is no multiple of a block it is two blocks wide.
Each q head decides for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.blocks import leading, means, products, visible
from hfsparse.patterns.pattern import register
from hfsparse.patterns.vertical_slash import scores, slashes
from hfsparse.registry import require, require_shares
from hfsparse.shares import counted, ratio, share_of

PROBES = 128  # last queries whose attention is computed
WHOLE = 1 << 32  # a mass of 1, as it is counted


@register("flexprefill")
@dataclass(frozen=True)
class FlexPrefill:
    """Share of attention that is kept, and the divergence below which a head is query-aware.

    Of verticals and of slashes at least `min_budget` tokens are kept, whatever the head is. At most
    the share `max_share` of the row's blocks become verticals, and as many slashes; at most that
    share of all visible pairs of blocks is kept of a query-aware head's map.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    max_share: float = 0.5

    def __post_init__(self):
        require_shares(self, "gamma", "max_share")
        require(0 <= self.tau <= 1, f"tau is {self.tau}: give 0 to 1")
        require(self.min_budget >= 1, f"min_budget is {self.min_budget}: give 1 or more tokens")

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
        by_key, by_distance = scores(q, k, grid, scale, PROBES)
        queries, keys = means(q, grid.q_rows, grid.block), means(k, grid.live, grid.block)
        aware = divergence(q, keys, by_key, grid, scale) < self.tau  # [B, H]
        verticals, distances, short = self.bands(by_key, by_distance, aware, grid)
        best, short_map = self._map(products(queries, keys) * scale, grid)
        seen, own = (m[:, None] for m in visible(grid))
        t = torch.arange(grid.nk, device=q.device) * grid.block
        keep = slashes(torch.where(distances, t, grid.Sk), grid) | verticals[:, :, None]
        keep = seen & (keep | own | (best & aware[..., None, None]))
        cut = self.cut(short | (aware & short_map), grid)
        return replace(BlockLists.of(grid, q.shape[1], keep), cut=cut)

    @property
    def enough(self) -> int:
        """The share `gamma` of a mass of 1, as it is counted; at 1 rounding must not decide."""
        return share_of(WHOLE, *ratio(self.gamma)) if self.gamma < 1 else 2 * WHOLE

    def bands(self, by_key: Tensor, by_distance: Tensor, aware: Tensor, grid: Grid) -> tuple:
        """Verticals and slashes kept `[B, H, nk]`, and whether some had no room `[B, H]`.

        by_key, by_distance: sums of the last queries' attention `[B, H, Sk]`. aware `[B, H]`.
        """
        verticals, short_v = self._chosen(by_key, aware, grid)
        distances, short_d = self._chosen(by_distance, aware, grid)
        return verticals, distances, short_v | short_d

    def cut(self, short: Tensor, grid: Grid) -> Tensor:
        """Query blocks cut short `[B, H]`: all of a head's, if something had no room there."""
        return torch.where(short, (grid.q_rows > 0).sum(-1, keepdim=True), 0)

    def _chosen(self, mass: Tensor, aware: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Blocks `[B, H, nk]` of the keys, or distances, with most of the mass `[B, H, Sk]`.

        And whether there was no room for some `[B, H]`, which is not so where a head is aware.
        """
        probes = grid.q_len.clamp(1, PROBES)[:, None, None]
        blocks = (grid.live > 0).sum(-1, keepdim=True)
        single = counted(torch.sort(mass / probes, dim=-1, descending=True).values)
        before = single.cumsum(-1) - single
        count = (before < self.enough).sum(-1) // grid.block + 1
        least = -(-self.min_budget // grid.block)
        count = torch.where(aware, least, count.clamp(min=least))
        most = share_of(blocks, *ratio(self.max_share)).clamp(min=least)
        edge = grid.nk * grid.block - grid.Sk
        pooled = torch.nn.functional.pad(mass, (0, edge)).unflatten(2, (grid.nk, -1)).sum(-1)
        pooled[..., 0] = torch.inf  # the row's first block, and the nearest distances
        best = torch.sort(pooled, dim=-1, descending=True, stable=True).indices
        return leading(best, torch.minimum(count, most)), torch.minimum(count, blocks) > most

    def _map(self, logits: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Pairs of blocks `[B, H, nq, nk]` with most of the estimated mass; what had no room."""
        seen = visible(grid)[0][:, None]
        mass = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, -1)
        order = torch.sort(mass.flatten(2), dim=-1, descending=True, stable=True).indices
        ranked = counted(mass.flatten(2).gather(2, order).clamp(min=0))
        before = ranked.cumsum(-1) - ranked
        pairs = seen.sum((2, 3))
        rows = (grid.q_rows > 0).sum(-1)[:, None, None]
        count = torch.minimum((before < self.enough * rows).sum(-1), pairs)
        most = share_of(pairs, *ratio(self.max_share))
        keep = leading(order, torch.minimum(count, most))
        return keep.view(mass.shape), count > most


def divergence(q: Tensor, keys: Tensor, by_key: Tensor, grid: Grid, scale: float) -> Tensor:
    """Root of the Jensen-Shannon divergence, in nats, of true and estimated attention `[B, H]`.

    Both are the last queries' over blocks: q `[B, H, Sq, D]`, mean keys `[B, Hkv, nk, D]`, sums of
    their attention by key `[B, H, Sk]`.
    """
    probes = grid.q_len.clamp(max=PROBES)[:, None]
    rows = grid.q_len[:, None] - PROBES + torch.arange(PROBES, device=q.device)
    at = rows.clamp(min=0)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1])
    last = q.gather(2, at).float().masked_fill((rows < 0)[:, None, :, None], 0)
    mean = last.sum(2, keepdim=True) / probes[..., None, None].clamp(min=1)
    seen = grid.live > 0
    if grid.window is not None:
        seen = seen & (grid.k_len[:, None] - probes - (grid.first + grid.live - 1) < grid.window)
    logits = products(mean, keys)[:, :, 0] * scale
    guess = torch.softmax(logits.masked_fill(~seen[:, None], -torch.inf), -1)
    edge = grid.nk * grid.block - grid.Sk
    true = torch.nn.functional.pad(by_key, (0, edge)).unflatten(2, (grid.nk, -1)).sum(-1)
    true = true / probes[..., None].clamp(min=1)
    half = ((true + guess) / 2).clamp(min=torch.finfo(torch.float32).tiny)
    both = torch.xlogy(true, true / half) + torch.xlogy(guess, guess / half)
    return (both.masked_fill(~seen[:, None], 0).sum(-1) / 2).clamp(min=0).sqrt()
