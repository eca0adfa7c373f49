"""Keys and values that lie in the host's memory, and what of them a GPU holds for its kernels.

A row's newest two pages lie on the GPU as steps write them. Of all other units (pages, or the parts
of pages that a selector names) it holds those that steps read last, each in a slot of its own: a
hot set. What a step names and no slot holds is fetched into the slots that were read least
recently; nothing is written back, since the host has every token as soon as it is stored. In fewer
bits it has every page as soon as that is full, and units are pages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.lists.grid import PAGE
from hfsparse.lists.packed import NEWEST, Packed
from hfsparse.lists.pages import PageLists


class Hot(NamedTuple):
    """Where a store that keeps every key has those of some kv heads.

    Token t of a row's newest two pages lies at t % NEWEST of `k` and `v`; slot s, which holds one
    unit, behind these: places of units, in units, are counted from the buffers' first token. In
    fewer bits `k` and `v` are the slots alone.
    """

    unit: int  # tokens
    below: int  # rows of fewer tokens read every unit
    k: Tensor  # [B, H, NEWEST + S * unit, D] on the GPU; packed [B, H, S, PAGE, D * width / 8]
    v: Tensor
    host_k: Tensor  # [B, H, N, D] every key, in memory that kernels reach; packed [B, H, P, …]
    host_v: Tensor
    table: Tensor  # [B, H, N / unit] int32: the slot that holds each unit, -1: none does
    owner: Tensor  # [B, H, S] int32: the unit that each slot holds, -1: none
    stamp: Tensor  # [B, H, S] int32: when each slot was read last
    clock: Tensor  # [B, H] int32: how many steps have read
    # In fewer bits: what the slots hold and what the host has, of which k and v are a part.
    packed: Packed | None = None
    pages: Packed | None = None

    @property
    def each(self) -> int:
        """Units of a page."""
        return PAGE // self.unit

    @property
    def lead(self) -> int:
        """Units of the newest pages, before the first slot."""
        return 0 if self.pages is not None else NEWEST // self.unit

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What is fetched together: each buffer of slots, and where every unit has the same."""
        if self.pages is None:
            return [(self.k, self.host_k), (self.v, self.host_v)]
        return [*zip(self.packed.pages, self.pages.pages, strict=True)]

    def tensors(self) -> tuple[Tensor, ...]:
        pairs = (t for pair in self.pairs for t in pair)
        return *pairs, self.table, self.owner, self.stamp, self.clock

    def newest(self, length: Tensor) -> Tensor:
        """The first page of rows of `length` [B] that no slot ever holds: it, and what follows,
        lie as they came."""
        return length // PAGE if self.pages is not None else (length - 1) // PAGE - 1

    def wanted(self, lists: PageLists | None, length: Tensor) -> PageLists:
        """What a step reads of rows of `length` [B]: their lists, or every unit of short rows.

        lists: None where all rows are short.
        """
        if not self.below:
            return lists
        B, H, U = self.table.shape
        width = min(-(-self.below // self.unit), U)
        every = torch.arange(width, device=length.device).expand(B, H, -1)
        total = (-(-length // self.unit)).clamp(max=width)[:, None].expand(B, H)
        if lists is None:
            return PageLists(every.contiguous(), total.contiguous(), self.unit)
        short, wide = (length < self.below)[:, None], max(width, lists.pages.shape[2])
        every, named = (pad(t, (0, wide - t.shape[2])) for t in (every, lists.pages))
        pages = torch.where(short[..., None], every, named)
        return PageLists(pages, torch.where(short, total, lists.count), self.unit)
