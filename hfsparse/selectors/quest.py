"""Quest: read the pages whose keys could score highest (arXiv 2406.10774).

A page's bound for a query is the dot product with, channel by channel, the page's smallest or
largest key value, whichever is larger. The q heads of a group vote with the softmax of their
bounds; the row's first and last pages are always read.

Smaller units than pages are ranked better, since fewer keys share a bound. A unit with several
bounds is worth its best one: pages of 64 with bounds over 16 are LServe's (arXiv 2502.14866).

`top_p` reads fewer where few pages have most of the votes (Twilight, arXiv 2502.02770): the best
ones, until they hold that share of all votes, which estimate the softmax's mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hfsparse.lists import PAGE, UNITS, PageLists
from hfsparse.precision import exact
from hfsparse.registry import later, require
from hfsparse.selectors.budget import Budget, best_of
from hfsparse.selectors.selector import register

BOUNDS = tuple(unit for unit in UNITS if unit >= 8)


@register("quest")
@dataclass(frozen=True)
class Quest:
    """Share of a row's units read by a decode step, never fewer than `min_pages` hold.

    unit: tokens that are read together. bound: tokens that a bound is over; as many as a unit's or
    more: one over each unit, and 64 is its name.
    refresh: a row's choice is read until it has grown by so many tokens; 0: each step chooses.
    top_p: pages are read until they hold this share of the votes, at most `share` of the pages; 0:
    always so many. means: as in `Budget`.
    """

    share: float = 0.06
    min_pages: int = 16
    refresh: int = 0
    top_p: float = 0.0
    unit: int = later(PAGE)
    bound: int = later(PAGE)
    means: bool = later(False)

    def __post_init__(self):
        _ = self.budget  # refuses numbers out of range
        for name in ("unit", "bound"):
            given = getattr(self, name)
            require(given in BOUNDS, f"{name} is {given}: give 8, 16, 32 or {PAGE} tokens")
        if self.bound >= self.unit:  # plans that mean the same are equal, and so are their hashes
            object.__setattr__(self, "bound", PAGE)

    @cached_property
    def budget(self) -> Budget:
        return Budget(self.share, self.min_pages, self.refresh, self.top_p, self.unit, self.means)

    @property
    def span(self) -> int:
        """Tokens that a bound is over."""
        return min(self.bound, self.unit)

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> Quest:
        """The same for all heads of all layers."""
        return self

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Smallest and largest key value a channel, `low` and `high` `[B, H, n, D]` of a page, or
        `[B, H, n, PAGE / span, D]` of smaller spans."""
        if self.span < PAGE:
            keys, real = (t.unflatten(3, (-1, self.span)) for t in (keys, real))
        none = ~real
        low, high = (keys.masked_fill(none, by) for by in (torch.inf, -torch.inf))
        return {"low": low.amin(-2), "high": high.amax(-2)}

    def scores(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> Tensor:
        """What each unit is worth to q `[B, Hq, Q, D]` in nats, `[B, Hq, Q, U]`: its best bound."""
        low, high = (t if t.ndim == 4 else t.flatten(2, 3) for t in (index["low"], index["high"]))
        return best_of(bounds(q, low, high) * scale, length, self.span, self.unit)

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        """Units read by new queries q `[B, Hq, Q, D]`, the last Q tokens of rows of `length` [B].

        index: `low`, `high`, as `summarise` has them, of P pages.
        """
        scores = self.scores(q, index, length, scale)
        return self.budget.choose(scores, length, index["low"].shape[1])


def bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Upper bounds of q · k over each span: q `[B, Hq, Q, D]` → `[B, Hq, Q, n]`."""
    B, Hq, Q, D = q.shape
    q = exact(q).reshape(B * low.shape[1], -1, D)  # a group's queries are one head's
    low, high = (exact(t).flatten(0, 1).mT for t in (low, high))
    up = torch.bmm(q.clamp(min=0), high)
    return torch.baddbmm(up, q.clamp(max=0), low).view(B, Hq, Q, -1).float()
