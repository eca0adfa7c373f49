"""What a layer of the cache takes, told without it: when statistics are asked it may be gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hfsparse.lists import FAR, PAGE
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.group import Group
from hfsparse.stats import Work


@dataclass(frozen=True)
class Held:
    """What a layer's cache takes, to be told later without it: no buffer moves until it is noted
    again, and rows grow into the room that there is."""

    # kv heads, bytes, tokens that there is room for (None: a ring, whose slots serve again), how
    # many every row lacks, the bytes that are there for any number of them, and those in the host's
    # memory, which are in no other number
    stores: list[tuple[tuple[int, ...], int, int | None, int, int, int]]
    column: int  # bytes of one column of the stock cache, over all rows and heads
    window: int | None

    @classmethod
    def together(cls, parts: Sequence[Held | Later]) -> Held:
        """Of a layer that runs several times a call, each time with a cache of its own."""
        told = [part.told() if isinstance(part, Later) else part for part in parts]
        if len(told) < 2:
            return told[0] if told else NOTHING
        stores = [store for part in told for store in part.stores]
        return cls(stores, sum(part.column for part in told), told[0].window)

    def bytes(self, kv_heads: int) -> list[int]:
        """By kv head, as allocated."""
        return self._each(kv_heads, lambda size, *room: size)

    def outside(self, kv_heads: int) -> list[int]:
        """Bytes in host memory by kv head, as allocated."""
        return self._each(kv_heads, lambda *of: of[-1])

    def work(self, kv_heads: int, seen: int) -> Work:
        """By kv head, of `seen` columns: bytes of the pages that hold some, indexes and rings
        included; and of the stock cache, which keeps all, or as many as the model's window."""

        def part(size: int, room: int | None, lacks: int, fixed: int, outside: int) -> int:
            pages = -(-max(seen - lacks, 0) // PAGE) * PAGE
            return fixed + (size - fixed) * min(pages, room) // room if room else size

        used = self._each(kv_heads, part)
        return Work(used, [self.column * min(seen, self.window or FAR) // kv_heads] * kv_heads)

    def _each(self, kv_heads: int, part: Callable[..., int]) -> list[int]:
        found = [0] * kv_heads
        for heads, *held in self.stores:
            for head in heads:
                found[head] += part(*held) // len(heads)
        return found


NOTHING = Held([], 0, None)  # of a layer that reads another's, or before any is there


class Later(NamedTuple):
    """As `Held`, of a layer that has not stored its prompt yet: what it takes once it has."""

    kind: Callable[..., Any]  # of layer, and what it is made with
    groups: tuple[Group, ...]
    sizes: tuple[int, int, int]
    window: int | None
    shapes: tuple[torch.Size, torch.Size]  # of keys and values
    types: tuple[torch.dtype, ...]
    lengths: Lengths

    def told(self) -> Held:
        """Worked out without data."""
        below, reserve, read_below = self.sizes
        layer = self.kind("", self.groups, below, reserve, 0, self.window, read_below)
        like = zip(self.shapes, self.types, strict=True)
        layer.lazy_initialization(*(torch.empty(n, dtype=t, device="meta") for n, t in like))
        for store in layer.stores:
            store.room(self.lengths.past, self.lengths.rows)
        return layer.held()
