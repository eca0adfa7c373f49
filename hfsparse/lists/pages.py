"""Which pages of a cache each kv head reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.lists.grid import PAGE, HeadIndex


@dataclass(frozen=True)
class PageLists:
    """Which pages of a kv head's cache a decode step reads; ties went to the lower page."""

    pages: Tensor  # [B, Hkv, width] int64, ascending
    count: Tensor  # [B, Hkv]

    @classmethod
    def cat(cls, parts: Sequence[PageLists]) -> PageLists:
        """Those of some heads, then those of others."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.pages.shape[2] for part in parts)
        pages = [pad(part.pages, (0, width - part.pages.shape[2])) for part in parts]
        return cls(torch.cat(pages, 1), torch.cat([part.count for part in parts], 1))

    def of(self, heads: Sequence[int], device: torch.device, index: HeadIndex) -> PageLists:
        """Those of some kv heads, on a device."""
        if len(heads) == self.pages.shape[1] and device == self.pages.device:
            return self
        at = index(heads, self.pages.device)
        return PageLists(self.pages[:, at].to(device), self.count[:, at].to(device))

    def keys(self, length: Tensor) -> Tensor:
        """[B, Hkv] keys in the pages, for rows of `length` [B] whose last page is read, if any."""
        return (self.count * PAGE - (-length % PAGE)[:, None]).clamp(min=0)
