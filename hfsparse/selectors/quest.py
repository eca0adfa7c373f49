"""Quest: read the pages whose keys could score highest (arXiv 2406.10774).

A page's bound for a query is the dot product with, channel by channel, the page's smallest or
largest key value, whichever is larger. The q heads of a group vote with the softmax of their
bounds; the row's first and last pages are always read.

`top_p` reads fewer where few pages have most of the votes (Twilight, arXiv 2502.02770): the best
ones, until they hold that share of all votes, which estimate the softmax's mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hfsparse.lists import PageLists
from hfsparse.precision import exact
from hfsparse.selectors.budget import Budget, votes
from hfsparse.selectors.selector import register


@register("quest")
@dataclass(frozen=True)
class Quest:
    """Share of a row's pages read by a decode step, never fewer than `min_pages`.

    refresh: a row's choice is read until it has grown by so many tokens; 0: each step chooses.
    top_p: pages are read until they hold this share of the votes, at most `share` of the pages; 0:
    always so many.
    """

    share: float = 0.06
    min_pages: int = 16
    refresh: int = 0
    top_p: float = 0.0

    def __post_init__(self):
        _ = self.budget  # refuses numbers out of range

    @cached_property
    def budget(self) -> Budget:
        return Budget(self.share, self.min_pages, self.refresh, self.top_p)

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> Quest:
        """The same for all heads of all layers."""
        return self

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Each page's smallest and largest key value a channel, `low` and `high` `[B, H, n, D]`."""
        empty = ~real
        return {
            "low": keys.masked_fill(empty, torch.inf).amin(3),
            "high": keys.masked_fill(empty, -torch.inf).amax(3),
        }

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        """Pages read by new queries q `[B, Hq, Q, D]`, the last Q tokens of rows of `length` [B].

        index: `low`, `high` `[B, Hkv, P, D]`.
        """
        bound = page_bounds(q, index["low"], index["high"]) * scale
        vote = votes(bound, length, index["low"].shape[1])
        return self.budget.best(vote, length, q.shape[2])


def page_bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Upper bounds of q · k over each page: q `[B, Hq, Q, D]` → `[B, Hq, Q, P]`."""
    B, Hq, Q, D = q.shape
    q = exact(q).view(B, low.shape[1], -1, Q, D)
    up = torch.einsum("bkgqd,bkpd->bkgqp", q.clamp(min=0), exact(high))
    down = torch.einsum("bkgqd,bkpd->bkgqp", q.clamp(max=0), exact(low))
    return (up + down).reshape(B, Hq, Q, -1).float()
