"""How many pages a decode step reads, the same for every selector that ranks pages by a vote."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hfsparse.lists import PAGE, PageLists
from hfsparse.registry import require
from hfsparse.shares import counted, ratio, share_of


@dataclass(frozen=True)
class Budget:
    """Share of a row's pages read by a decode step, never fewer than `min_pages`.

    The row's first page and those of the new queries are always read. refresh: a row's choice is
    read until it has grown by so many tokens; 0: each step chooses. top_p: pages are read until
    they hold this share of the votes, at most `share` of the pages; 0: always so many.
    """

    share: float
    min_pages: int
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

    def best(self, vote: Tensor, length: Tensor, queries: int) -> PageLists:
        """The pages of the largest votes `[B, H, P]`, of rows of `length` [B], the last `queries`
        of them new.

        Votes are parts of 1 in a row's pages, 0 beyond them.
        """
        B, H, P = vote.shape
        page, weight = torch.arange(P, device=vote.device), vote
        total = -(-length // PAGE)  # [B] pages in the row
        newest = (length - queries).clamp(min=0)[:, None] // PAGE  # pages that hold new queries
        forced = (page == 0) | ((page >= newest) & (page < total[:, None]))
        vote = vote.masked_fill(forced[:, None], torch.inf)
        vote = vote.masked_fill((page >= total[:, None])[:, None], -torch.inf)
        budget = share_of(total, *ratio(self.share)).clamp(min=self.min_pages)
        best = torch.sort(vote, dim=-1, descending=True, stable=True).indices
        budget = budget[:, None].expand(B, H)
        if self.top_p:
            mass = counted(weight.gather(-1, best))
            before = mass.cumsum(-1) - mass
            needed = share_of(mass.sum(-1, keepdim=True), *ratio(self.top_p))
            enough = (before < needed).sum(-1)
            budget = torch.minimum(budget, enough.clamp(min=self.min_pages))
        count = torch.maximum(budget, forced.sum(1)[:, None]).clamp(max=total[:, None])
        width = self.width(P, queries)
        used = torch.arange(width, device=vote.device) < count[..., None]
        pages = torch.where(used, best[..., :width], P).sort(-1).values
        return PageLists(pages.clamp(max=P - 1), count)

    def reads(self, length: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Keys that the newest query reads in rows of these lengths, the `new` ones included.

        Not of a budget that is `counted`.
        """
        total = -(-length // PAGE)
        newest = np.maximum(length - new, 0) // PAGE
        forced = total - newest + (newest > 0)
        budget = share_of(total, *ratio(self.share))
        count = np.minimum(np.maximum(np.maximum(budget, self.min_pages), forced), total)
        return count * PAGE - -length % PAGE


def votes(scores: Tensor, length: Tensor, heads: int) -> Tensor:
    """Each kv head's votes `[B, heads, P]` for pages, of scores `[B, Hq, Q, P]` in nats.

    A vote is the largest that a query of the group gives: the softmax of its scores over the pages
    of a row of `length` [B]; 0 beyond them, whatever the scores are there.
    """
    B, _, _, P = scores.shape
    beyond = torch.arange(P, device=scores.device) >= -(-length // PAGE)[:, None]
    vote = torch.softmax(scores.masked_fill(beyond[:, None, None], -torch.inf), -1)
    return vote.view(B, heads, -1, P).amax(2)
