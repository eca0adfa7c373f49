"""Quest: read the pages whose keys could score highest (arXiv 2406.10774).

A page's bound for a query is the dot product with, channel by channel, the page's smallest or
largest key value, whichever is larger. The q heads of a group vote with the softmax of their
bounds; the row's first and last pages are always read.

`top_p` reads fewer where few pages have most of the votes (Twilight, arXiv 2502.02770): the best
ones, until they hold that share of all votes, which estimate the softmax's mass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hfsparse.lists import PAGE, PageLists
from hfsparse.precision import exact
from hfsparse.registry import require
from hfsparse.selectors import register
from hfsparse.shares import counted, ratio, share_of


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
        require(0 < self.share <= 1, f"share is {self.share}: give more than 0 and at most 1")
        require(self.min_pages >= 2, f"min_pages is {self.min_pages}: give 2 or more")
        require(self.refresh >= 0, f"refresh is {self.refresh}: give tokens, 0 or more")
        require(0 <= self.top_p < 1, f"top_p is {self.top_p}: give less than 1; 0 is off")

    @property
    def counted(self) -> bool:
        """Whether only the device knows how many pages a step reads."""
        return bool(self.refresh or self.top_p)

    def width(self, pages: int, queries: int) -> int:
        """The most pages that are read of a buffer of so many; `queries` are new."""
        most = max(self.min_pages, share_of(pages, *ratio(self.share))) + 2 + -(-queries // PAGE)
        return min(pages, most + -(-self.refresh // PAGE))

    def pages(
        self, q: Tensor, low: Tensor, high: Tensor, length: Tensor, scale: float
    ) -> PageLists:
        """Pages read by new queries q `[B, Hq, Q, D]`, the last Q tokens of rows of `length` [B].

        low, high `[B, Hkv, P, D]`: each page's smallest and largest key value a channel.
        """
        B, _, Q, _ = q.shape
        Hkv, P = low.shape[1:3]
        page = torch.arange(P, device=q.device)
        total = -(-length // PAGE)  # [B] pages in the row
        bound = page_bounds(q, low, high) * scale
        beyond = (page >= total[:, None])[:, None, None]
        vote = torch.softmax(bound.masked_fill(beyond, -torch.inf), -1)
        vote = weight = vote.view(B, Hkv, -1, P).amax(2)
        newest = (length - Q).clamp(min=0)[:, None] // PAGE  # pages that hold the new queries
        forced = (page == 0) | ((page >= newest) & (page < total[:, None]))
        vote = vote.masked_fill(forced[:, None], torch.inf)
        vote = vote.masked_fill((page >= total[:, None])[:, None], -torch.inf)
        budget = share_of(total, *ratio(self.share)).clamp(min=self.min_pages)
        best = torch.sort(vote, dim=-1, descending=True, stable=True).indices
        budget = budget[:, None].expand(B, Hkv)
        if self.top_p:
            mass = counted(weight.gather(-1, best))
            before = mass.cumsum(-1) - mass
            needed = share_of(mass.sum(-1, keepdim=True), *ratio(self.top_p))
            enough = (before < needed).sum(-1)
            budget = torch.minimum(budget, enough.clamp(min=self.min_pages))
        count = torch.maximum(budget, forced.sum(1)[:, None]).clamp(max=total[:, None])
        width = self.width(P, Q)
        used = torch.arange(width, device=q.device) < count[..., None]
        pages = torch.where(used, best[..., :width], P).sort(-1).values
        return PageLists(pages.clamp(max=P - 1), count)

    def reads(self, length: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Keys that the newest query reads in rows of these lengths, the `new` ones included.

        Not of a selector that is `counted`.
        """
        total = -(-length // PAGE)
        newest = np.maximum(length - new, 0) // PAGE
        forced = total - newest + (newest > 0)
        budget = share_of(total, *ratio(self.share))
        count = np.minimum(np.maximum(np.maximum(budget, self.min_pages), forced), total)
        return count * PAGE - -length % PAGE


def page_bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Upper bounds of q · k over each page: q `[B, Hq, Q, D]` → `[B, Hq, Q, P]`."""
    B, Hq, Q, D = q.shape
    q = exact(q).view(B, low.shape[1], -1, Q, D)
    up = torch.einsum("bkgqd,bkpd->bkgqp", q.clamp(min=0), exact(high))
    down = torch.einsum("bkgqd,bkpd->bkgqp", q.clamp(max=0), exact(low))
    return (up + down).reshape(B, Hq, Q, -1).float()
