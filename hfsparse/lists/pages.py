"""Which pages of a cache, or smaller units of them, each kv head reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.lists.grid import PAGE, Band, HeadIndex

UNITS = (1, 8, 16, 32, PAGE)  # tokens that a list may name together: parts of pages, or pages


@dataclass(frozen=True)
class PageLists:
    """Which pages of a kv head's cache a decode step reads; ties went to the lower page.

    Lists of smaller units than pages name unit u for the tokens from u * unit on.
    """

    pages: Tensor  # [B, Hkv, width] int64, ascending
    count: Tensor  # [B, Hkv]
    unit: int = PAGE  # tokens in each, one of UNITS
    # [B, Hkv, width] where each lies in the store's buffers, in units; None: in order, as named.
    lies: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[PageLists]) -> PageLists:
        """Those of some heads, then those of others."""
        if len(parts) == 1:
            return parts[0]
        unit = min(part.unit for part in parts)
        parts = [part._split(unit) for part in parts]
        width = max(part.pages.shape[2] for part in parts)
        pages = [pad(part.pages, (0, width - part.pages.shape[2])) for part in parts]
        return cls(torch.cat(pages, 1), torch.cat([part.count for part in parts], 1), unit)

    @classmethod
    def around(cls, band: Band, length: Tensor, heads: int, tokens: int) -> PageLists:
        """The pages that hold some key which the last token of rows of `length` [B] reads in a
        band, the same for each of `heads` kv heads. tokens: that there may be in a row."""
        sink, pages = -(-band.sink // PAGE), -(-tokens // PAGE)
        width = min(pages, sink + -(-band.widest(tokens) // PAGE) + 1)
        page, passed = torch.arange(width, device=length.device), passed_pages(band, length)
        page = torch.where(page < sink, page, page + passed[:, None]).clamp(max=pages - 1)
        count = -(-length // PAGE) - passed
        return cls(*(t[:, None].expand(-1, heads, *t.shape[1:]) for t in (page, count)))

    def _split(self, unit: int) -> PageLists:
        """The same tokens in smaller units; beyond a row's end there may be some of no token."""
        if (each := self.unit // unit) == 1:
            return self
        within = torch.arange(each, device=self.pages.device)
        return PageLists(
            (self.pages[..., None] * each + within).flatten(2), self.count * each, unit
        )

    def of(self, heads: Sequence[int], device: torch.device, index: HeadIndex) -> PageLists:
        """Those of some kv heads, on a device."""
        if len(heads) == self.pages.shape[1] and device == self.pages.device:
            return self
        at = index(heads, self.pages.device)
        return replace(self, pages=self.pages[:, at].to(device), count=self.count[:, at].to(device))

    def within(self, low: int, high: int) -> PageLists:
        """Those of the pages that hold positions from `low` on and before `high`, counted from
        there; both are multiples of a page."""
        kept = torch.arange(self.pages.shape[2], device=self.pages.device) < self.count[..., None]
        kept &= (self.pages * self.unit >= low) & (self.pages * self.unit < high)
        order = torch.sort(~kept, dim=-1, stable=True).indices
        pages = (self.pages - low // self.unit).masked_fill(~kept, 0).gather(2, order)
        return replace(self, pages=pages, count=kept.sum(-1))

    def keys(self, length: Tensor) -> Tensor:
        """[B, Hkv] keys in the pages, for rows of `length` [B] whose last page is read, if any."""
        return (self.count * self.unit - (-length % self.unit)[:, None]).clamp(min=0)


def passed_pages(band: Band, length):
    """How many pages of rows of `length` (an array or a tensor) lie between a band's sink and the
    window of the last token."""
    first = (length - band.span(length - 1)) // PAGE
    return (first - -(-band.sink // PAGE)).clip(min=0)
