"""The last choice of pages, read again while a row grows by fewer than `refresh` tokens.

A choice holds the row's first page and those of its newest tokens; pages that the row has grown by
since are read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfsparse.lists.pages import PageLists


@dataclass
class Choice:
    """What each row of a cache chose last."""

    pages: Tensor  # [B, Hkv, width] int64
    count: Tensor  # [B, Hkv] of them
    length: Tensor  # [B, Hkv] tokens in the row then; 0: nothing is chosen

    @classmethod
    def none(cls, rows: int, heads: int, width: int, device: torch.device) -> Choice:
        with torch.inference_mode(False):  # written in any mode
            sizes = (rows, heads, width), (rows, heads), (rows, heads)
            return cls(*(torch.zeros(size, dtype=torch.int64, device=device) for size in sizes))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.pages, self.count, self.length

    def longer(self, width: int) -> Choice:
        """The same with room for lists of `width` pages."""
        wide = Choice.none(*self.count.shape, width, self.count.device)
        wide.pages[..., : self.pages.shape[2]] = self.pages
        return Choice(wide.pages, self.count, self.length)

    def forget(self, rows: Sequence[int]) -> None:
        """Let go of what was chosen in rows of more tokens than they have now."""
        now = torch.tensor(rows, device=self.length.device)
        self.length.masked_fill_(self.length > now[:, None], 0)

    def renew(self, fresh: PageLists, length: Tensor, refresh: int) -> PageLists:
        """What rows of `length` [B] read; `fresh`, which is kept, where the last choice is old.

        An empty list of `fresh` is none: the row reads no page, and chooses anew when it is next
        asked.
        """
        length = length[:, None].expand_as(self.length)
        age, width = length - self.length, fresh.pages.shape[2]
        young = (self.length > 0) & (age >= 0) & (age < refresh)
        pages = self.pages[..., :width]
        pages.copy_(torch.where(young[..., None], pages, fresh.pages))
        self.count.copy_(torch.where(young, self.count, fresh.count))
        self.length.copy_(torch.where(young, self.length, length * (fresh.count > 0)))
        total, then = -(-length // fresh.unit), -(-self.length // fresh.unit)
        beyond = torch.arange(width, device=pages.device) - self.count[..., None]
        grown = torch.minimum(then[..., None] + beyond, (total[..., None] - 1).clamp(min=0))
        count = torch.where(self.length > 0, self.count + total - then, 0)
        return replace(fresh, pages=torch.where(beyond < 0, pages, grown), count=count)
