"""How much a decode step reads, the same for every selector that ranks units by a vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hfsparse.lists import PAGE, UNITS, PageLists
from hfsparse.precision import exact
from hfsparse.registry import require, require_shares
from hfsparse.shares import counted, ratio, share_of

Whole = TypeVar("Whole", np.integer, np.ndarray, Tensor)  # whole numbers, of rows or of one


@dataclass(frozen=True)
class Budget:
    """Share of a row's units read by a decode step, never fewer than `min_pages` pages hold.

    unit: tokens that are chosen together, a page or a part of one. The row's first page and those
    of the new queries are always read. refresh: a row's choice is read until it has grown by so
    many tokens; 0: each step chooses. top_p: units are read until they hold this share of the
    votes, at most `share` of them; 0: always so many. means: the others enter the softmax by their
    means (`kernels.means`), which are kept beside the index.
    """

    share: float
    min_pages: int
    refresh: int = 0
    top_p: float = 0.0
    unit: int = PAGE
    means: bool = False

    def __post_init__(self):
        require_shares(self, "share")
        require(self.min_pages >= 2, f"min_pages is {self.min_pages}: give 2 or more")
        require(self.refresh >= 0, f"refresh is {self.refresh}: give tokens, 0 or more")
        require(0 <= self.top_p < 1, f"top_p is {self.top_p}: give less than 1; 0 is off")
        given = ", ".join(map(str, UNITS[:-1])) + f" or {PAGE}"
        require(self.unit in UNITS, f"unit is {self.unit}: give {given} tokens")
        require(
            self.unit > 1 or not self.means,
            f"means is {self.means}: give false, or a unit of 8 tokens or more",
        )

    @property
    def counted(self) -> bool:
        """Whether only the device knows how much a step reads."""
        return bool(self.refresh or self.top_p)

    @property
    def per_page(self) -> int:
        """Units in a page."""
        return PAGE // self.unit

    @property
    def fewest(self) -> int:
        """Units that are always read, where there are as many."""
        return self.min_pages * self.per_page

    def width(self, pages: int, queries: int) -> int:
        """The most units that are read of a buffer of so many pages; `queries` are new."""
        each = self.per_page
        most = max(self.fewest, share_of(pages * each, *ratio(self.share)))
        most += (2 + -(-queries // PAGE)) * each + -(-self.refresh // self.unit)
        return min(pages * each, most)

    def reading(self, length: Whole, new: Whole) -> tuple[Whole, Whole, Whole]:
        """Of rows of `length` tokens, the last `new` of them new: how many units there are, from
        which one on pages hold new ones, and how many are read (of top_p: at most).

        Those of the first page and of pages that hold new ones are always among these.
        """
        total, each = -(-length // self.unit), self.per_page
        newest = (length - new).clip(min=0) // PAGE * each
        forced = total - newest + newest.clip(max=each)
        count = share_of(total, *ratio(self.share)).clip(min=self.fewest)
        return total, newest, count.clip(min=forced).clip(max=total)

    def choose(self, scores: Tensor, length: Tensor, heads: int) -> PageLists:
        """The units that are worth most to the last Q tokens of rows of `length` [B].

        scores: `[B, Hq, Q, U]` in nats, whatever they are beyond a row; the q heads of each of
        `heads` kv heads vote together.
        """
        vote = votes(scores, length, heads, self.unit)
        return self.best(vote, length, scores.shape[2])

    def best(self, vote: Tensor, length: Tensor, queries: int) -> PageLists:
        """The units of the largest votes `[B, H, U]`, of rows of `length` [B], the last `queries`
        of them new.

        U: units of all pages that there is room for. Votes are parts of 1 in a row's units, 0
        beyond them.
        """
        B, H, U = vote.shape
        unit, weight, each = torch.arange(U, device=vote.device), vote, self.per_page
        total, newest, count = (t[:, None] for t in self.reading(length, queries))
        forced = ((unit < each) | (unit >= newest)) & (unit < total)
        vote = vote.masked_fill(forced[:, None], torch.inf)
        vote = vote.masked_fill((unit >= total)[:, None], -torch.inf)
        best = torch.sort(vote, dim=-1, descending=True, stable=True).indices
        count = count.expand(B, H)
        if self.top_p:
            mass = counted(weight.gather(-1, best))
            before = mass.cumsum(-1) - mass
            needed = share_of(mass.sum(-1, keepdim=True), *ratio(self.top_p))
            enough = (before < needed).sum(-1).clip(min=self.fewest)
            count = torch.minimum(count, enough.maximum(forced.sum(1)[:, None]))
        width = self.width(U // each, queries)
        used = torch.arange(width, device=vote.device) < count[..., None]
        units = torch.where(used, best[..., :width], U).sort(-1).values
        return PageLists(units.clamp(max=U - 1), count, self.unit)

    def reads(self, length: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Keys that the newest query reads in rows of these lengths, the `new` ones included.

        Not of a budget that is `counted`.
        """
        _, _, count = self.reading(length, new)
        return count * self.unit - -length % self.unit


def votes(scores: Tensor, length: Tensor, heads: int, unit: int = PAGE) -> Tensor:
    """Each kv head's votes `[B, heads, U]` for units, of scores `[B, Hq, Q, U]` in nats.

    A vote is the largest that a query of the group gives: the softmax of its scores over the units
    of a row of `length` [B]; 0 beyond them, whatever the scores are there.
    """
    B, _, _, U = scores.shape
    past = beyond(length, unit, U)[:, None, None]
    vote = torch.softmax(scores.masked_fill(past, -torch.inf), -1)
    return vote.view(B, heads, -1, U).amax(2)


def best_of(scores: Tensor, length: Tensor, span: int, unit: int) -> Tensor:
    """Each unit's best score `[..., U]`, of scores `[B, Hq, Q, n]` of spans of so many tokens.

    Spans that begin beyond a row of `length` [B] count for nothing, whatever their scores are.
    """
    if span == unit:
        return scores
    past = beyond(length, span, scores.shape[3])[:, None, None]
    scores = scores.masked_fill(past, -torch.inf)
    return scores.unflatten(3, (-1, unit // span)).amax(4)


def beyond(length: Tensor, span: int, spans: int) -> Tensor:
    """bool `[B, spans]`: which spans of so many tokens begin beyond rows of `length` [B]."""
    return torch.arange(spans, device=length.device) * span >= length[:, None]


def products(q: Tensor, keys: Tensor) -> Tensor:
    """q · k `[B, Hq, Q, n]` float32: q `[B, Hq, Q, D]`, what stands for keys `[B, H, n, D]`."""
    B, Hq, Q, D = q.shape
    q = exact(q).view(B, keys.shape[1], -1, Q, D)
    return torch.einsum("bhgqd,bhnd->bhgqn", q, exact(keys)).reshape(B, Hq, Q, -1).float()
