"""What every store of the cache has: the keys and values of a group of kv heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

from torch import Tensor

from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.group import Group

TOGETHER = 1 << 27  # numbers of keys and values that a chunk finds in buffers made for it at a time


class Store:
    """Keys `[B, H, N, D]` and values `[B, H, N, Dv]`.

    Values that are the first dims of their keys (latents, `group.rank`) lie there alone.
    """

    drops = False  # whether it may drop keys
    joins = False  # whether it is read, with what a chunk brings, before it stores that
    lacks = 0  # keys that every row lacks, at least
    fixed = 0  # bytes that it takes however many tokens it has room for
    remakes = False  # whether a chunk finds what came before in buffers that are made for it
    tiled = False  # whether kernels can read, in their place, the pages that it has (`with_pages`)

    def __init__(self, group: Group):
        self.group = group
        self.k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def v(self) -> Tensor | None:
        return self.k[..., : self.group.rank] if self.group.rank else self._v

    def prepare(self) -> None:
        """Behind `create`: make all the room that is known to be needed."""

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots `[B, H, N, D]`, as rows of so many tokens read them."""
        return self.k, self.v

    def held(self) -> list[Tensor]:
        """Its keys and values, each buffer once."""
        return [t for t in (self.k, self._v) if t is not None]

    def hold(self, k: Tensor, v: Tensor | None = None) -> None:
        """From now on these; v of latents is no more than a view of k, if it is given."""
        self.k, self._v = k, None if self.group.rank else v

    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        """Hold what `make` makes of each buffer."""
        self.hold(*map(make, self.held()))

    def forget(self, rows: Sequence[int]) -> None:
        """Rows have so many tokens now, perhaps fewer: what was made of others is let go."""

    def settle(self, rows: Sequence[int]) -> None:
        """Behind a prompt or a chunk: make what the next call needs made of rows of so many
        tokens, so that no step waits for it."""

    def _summarise_new(self, rows: slice, pages: range, new: list[Tensor], length: int) -> None:
        """Have what is kept beside pages follow their tokens, in rows of so many."""

    def outside(self) -> list[Tensor]:
        """What lies in host memory."""
        return []

    def parts(self, lengths: Lengths, tiled: bool = False) -> Iterator[tuple[slice, Store]]:
        """Which of its heads are read together with a chunk, and a store of these alone, where it
        is read before it stores the chunk: as many heads as have `TOGETHER` numbers in buffers that
        are made for that; one in any case. tiled: its pages are read where they lie."""
        heads = step = len(self.group.heads)
        if self.remakes and not (tiled and not self.outside()):
            each = len(self.k) * lengths.longest * sum(t.shape[3] for t in self.held())
            step = max(1, TOGETHER // each)
        if step >= heads:
            yield slice(None), self
            return
        for first in range(0, heads, step):
            yield (some := slice(first, first + step)), self.part(some)

    def part(self, heads: slice) -> Store:
        """A store of these heads alone, over the same buffers, to be read."""
        part = copy(self)
        part.hold(*(t[:, heads] for t in self.held()))
        return part

    def beside(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each buffer and what is to be written into it."""
        return zip(self.held(), (k, v), strict=False)

    def state(self, rows: Sequence[int]) -> dict[str, Any]:
        """What it holds of rows of so many tokens, as a file keeps it: tensors, and the host's
        numbers, in dicts and lists. A new store of the same group goes on from it by `load`.

        Each kind says it for itself: one that inherits this may hold more, and is not saved.
        """
        return {"held": [self._filled(t, rows) for t in self.held()]}

    def load(self, state: dict[str, Any]) -> None:
        """Hold what `state` told, on the device where its tensors are now."""
        self.hold(*state["held"])

    def _filled(self, t: Tensor, rows: Sequence[int], unit: int = 1) -> Tensor:
        """Of a buffer whose slots have `unit` tokens each, what such rows may have there: all."""
        return t
