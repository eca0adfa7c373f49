"""Positions of the keys in a cache, and of the new tokens behind them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hfsparse.lists import Band
from hfsparse.lists.lengths import Lengths, on_device

T = TypeVar("T")


def positions(key_pos: Tensor | None, length: Tensor, slots: int) -> Tensor:
    """[B, slots] position of each slot, -1 where it holds nothing."""
    slot = torch.arange(slots, device=length.device)
    return torch.where(slot < length[:, None], slot if key_pos is None else key_pos, -1)


def ring_positions(length: Tensor, low: Tensor, sink: int, size: int) -> Tensor:
    """[B, sink + size] position that each slot of a ring holds, -1 for none.

    length [B]: tokens in the row; low [B]: beyond the sink, keys before it are not held.
    """
    length, low = length[:, None], low[:, None]
    slot = torch.arange(sink + size, device=length.device)
    newest = length - 1 - sink  # counted, like the slots, from the sink's end
    rest = sink + newest - (newest - (slot - sink)) % max(size, 1)
    at = torch.where(slot < sink, slot, torch.where(rest >= low, rest, -1))
    return torch.where(at < length, at, -1)


class NewTokens:
    """A few new tokens in each row of a cache: where they stand, the same for every layer.

    On a device, for kernels that read lengths there, and on the host for those that can't.
    """

    def __init__(
        self,
        lengths: Lengths,
        length: Tensor,
        query_pos: Tensor,
        longest: int | None = None,
    ):
        self.lengths = lengths  # on the host
        self.length = length  # [B] tokens in each row, the new ones included
        self.query_pos = query_pos  # [B, Q] position of each new token, -1 where a row has none
        self.longest = longest  # keys to look at; None: all that there is room for
        self._made: dict[tuple, Any] = {}

    def once(self, make: Callable[..., T], *given: Hashable) -> T:
        """`make(self, *given)`, made for the first layer that asks."""
        key = make, *given
        if key not in self._made:
            self._made[key] = make(self, *given)
        return self._made[key]

    @property
    def prompt(self) -> bool:
        """Whether no row has a past."""
        return not self.lengths.behind

    @classmethod
    def of_prompt(cls, lengths: Lengths, device: torch.device) -> NewTokens:
        """Of rows without a past, on a device; made once for all layers."""
        if device not in lengths.prompts:
            length = on_device(lengths.rows, device)
            at = torch.arange(lengths.columns, device=device)
            query_pos = torch.where(at < length[:, None], at, -1)
            lengths.prompts[device] = cls(lengths, length, query_pos)
        return lengths.prompts[device]

    def ring(self, sink: int, size: int) -> Tensor:
        """[B, sink + size] position held by each slot of such a ring, -1 for none."""
        return self.once(_ring, sink, size)

    def start(self, band: Band) -> Tensor:
        """[B, Q] first key of the band's recent window, of each new token."""
        return self.once(_start, band)


def _ring(new: NewTokens, sink: int, size: int) -> Tensor:
    return ring_positions(new.length, torch.full_like(new.length, sink), sink, size)


def _start(new: NewTokens, band: Band) -> Tensor:
    return band.start(new.query_pos)
