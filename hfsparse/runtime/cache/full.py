"""A store that keeps every key of its kv heads, in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfsparse.lists import PAGE
from hfsparse.lists.choice import Choice
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import EXTREMES, Place
from hfsparse.runtime.cache.buffers import at_once, filled, lengthen, no_slots, put
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.store import Store
from hfsparse.selectors import part_of, segment_of, tokens_built

PAIRS = 1 << 26  # tokens, times those of a segment, whose index is made together at a time


class Full(Store):
    """Every key of its heads, in buffers `[B, H, capacity, D]` that grow by a sixteenth."""

    spare = 16  # it grows by one of so many parts

    def __init__(self, group: Group, reserve: int, below: int = 0):
        super().__init__(group)
        self.reserve, self.below = reserve, below
        # What is kept of each page, [B, H, P, ...]: by the selector, and means where it wants them.
        self.index: dict[str, Tensor] = {}
        self.choice: Choice | None = None  # the last one, where steps read it again
        # Tokens of whose pages the index is made together, and for how many tokens of each row it
        # was: what `tokens_built` says of its length, until a call has more.
        self.segment = segment_of(group.selector)
        self.built: list[int] = []

    def create(self, k: Tensor, v: Tensor) -> None:
        shape = (k.shape[0], len(self.group.heads), 0)
        self.hold(*(no_slots(t.dtype, t.device, *shape, t.shape[-1]) for t in (k, v)))
        self._create_index(k, shape)

    def _create_index(self, k: Tensor, shape: tuple[int, int, int]) -> None:
        """Of no page yet."""
        self.built = [0] * k.shape[0]
        if (selector := self.group.selector) is None:
            return
        for name, (sizes, dtype) in self._index_shapes().items():
            self.index[name] = no_slots(dtype, k.device, *shape, *sizes)
        if selector.budget.refresh:
            self.choice = Choice.none(*shape, k.device)

    def _index_shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Of each part of the index: what a page of a head has there."""
        known, asked = self.group.index_shapes, (self.k.shape[-1], self.v.shape[-1], self.k.dtype)
        if asked not in known:  # pages of no row tell it, and cost the device nothing
            H = len(self.group.heads)
            pages = (t.new_empty(0, H, 1, PAGE, t.shape[-1]) for t in (self.k, self.v))
            real = self.k.new_empty(0, H, 1, PAGE, 1, dtype=torch.bool)
            made = self.group.index_of(*pages, real).items()
            known[asked] = {name: (t.shape[3:], t.dtype) for name, t in made}
        return known[asked]

    def prepare(self) -> None:
        if self.reserve > self.capacity:
            self._grow(self.reserve)

    def tensors(self) -> list[Tensor]:
        last = () if self.choice is None else self.choice.tensors()
        return [*self.held(), *self.index.values(), *last]

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.k.shape[2]

    def place(self) -> Place:
        group, more = self.group, {"below": self.below, "append": self.append}
        if self.index:
            own = {"follow": self.follow, "selector": group.selector, "index": self.index}
            more |= self.index if {*self.index} == EXTREMES else own
        return Place(group.heads, self.k, self.v, listed=group.chosen, **more)

    def check_crop(self, now: list[int], rows: list[int]) -> None:
        """Any prefix of a full row is held."""

    def select(self, picked: list[int]) -> None:
        self.change(lambda t: t[picked])
        self.index = {name: t[picked] for name, t in self.index.items()}
        self.built = [self.built[i] for i in picked]
        if self.choice is not None:
            wanted = len(picked), *self.choice.pages.shape[1:]
            self.choice = Choice.none(*wanted, self.k.device)

    def snapshot(self) -> None:
        """What a step changes on the host: nothing."""

    def restore(self, before: None) -> None:
        """Take back what a step changed on the host."""

    def until(self, rows: list[int]) -> int:
        """Tokens up to which the longest row may grow while no buffer moves and `room` has no
        index to make."""
        if self.segment == PAGE:
            return self.capacity
        left = min(-n % part_of(self.segment) for n in rows)
        return min(self.capacity, max(rows) + left)

    def room(self, past: list[int], rows: list[int]) -> None:
        """Make room for rows that grow from `past` to `rows` tokens, and the index of `past`."""
        if (need := max(rows)) > self.capacity:
            before = {**vars(self)}
            try:
                self._grow(max(need, self.reserve, self.capacity + self.capacity // self.spare))
            except BaseException:  # memory was refused: no buffer may be longer than another
                vars(self).update(before)
                raise
        self.settle(past)

    def settle(self, rows: Sequence[int]) -> None:
        if self.segment > PAGE:
            self._build(rows)

    def forget(self, rows: Sequence[int]) -> None:
        """Let go of choices and segments that hold tokens which rows of so many have no more."""
        if self.choice is not None:
            self.choice.forget(rows)
        if self.segment == PAGE:
            return
        for row, (n, built) in enumerate(zip(rows, self.built, strict=True)):
            if n < built:
                self.built[row] = left = n // self.segment * self.segment
                if left < n:
                    self._summarise_held(slice(row, row + 1), left, n)

    def append(self, k: Tensor, v: Tensor, lengths: Lengths) -> None:
        """Store each row's new tokens, the first of k, v `[B, H, Q, D]`, behind its past."""
        self.room(lengths.past, lengths.rows)
        self.write(k, v, lengths)

    def write(self, k: Tensor, v: Tensor, lengths: Lengths) -> None:
        """As `append`, where there is room."""
        for rows, p, n in lengths.runs:
            for held, new in self.beside(k, v):
                put(held, new, rows, p, n)
            if self.index and n:
                self._summarise_held(rows, p, p + n)

    def _build(self, past: Sequence[int]) -> None:
        """Make the index of segments that have grown by a part or more since it was made last."""
        ends = [tokens_built(self.segment, n) for n in past]
        ends = [max(pair) for pair in zip(ends, self.built, strict=True)]
        starts = [
            end if end == built else built // self.segment * self.segment
            for end, built in zip(ends, self.built, strict=True)
        ]
        step = max(PAIRS // self.segment**2, 1) * self.segment
        for rows, first, n in Lengths.between(starts, ends, 0).runs:
            for at in range(first, first + n, step):
                end = min(at + step, first + n)
                keys = self.k[rows, :, at:end].unflatten(2, (-1, PAGE))
                for name, found in self.group.selector.build(keys).items():
                    self.index[name][rows, :, at // PAGE : end // PAGE] = found
        self.built = ends

    def _summarise_held(self, rows: slice, first: int, length: int) -> None:
        """Renew the index from the page of token `first` on, in rows of so many tokens."""
        for pages in at_once(range(first // PAGE, -(-length // PAGE)), self.k):
            own = slice(pages.start * PAGE, pages.stop * PAGE)
            both = (t[rows, :, own] for t in (self.k, self.v))
            self._summarise(rows, pages, *both, length)

    def _summarise(
        self, rows: slice, pages: range, keys: Tensor, values: Tensor, length: int
    ) -> None:
        """Renew the index of a run of pages, whose tokens these are, in rows of so many."""
        first, last = pages.start, pages.stop
        keys, values = (t.unflatten(2, (-1, PAGE)) for t in (keys, values))
        at = torch.arange(first * PAGE, last * PAGE, device=keys.device)
        real = (at < length).view(1, 1, -1, PAGE, 1)
        for name, found in self.group.index_of(keys, values, real).items():
            self.index[name][rows, :, first:last] = found

    def _summarise_new(self, rows: slice, pages: range, new: list[Tensor], length: int) -> None:
        """As `_summarise_held`, of pages whose tokens are these, the last perhaps not whole."""
        for part in at_once(pages, self.k) if self.index else ():
            at = slice((part.start - pages.start) * PAGE, (part.stop - pages.start) * PAGE)
            own = [t[:, :, at] for t in new]
            short = len(part) * PAGE - own[0].shape[2]
            own = (torch.nn.functional.pad(t, (0, 0, 0, short)) for t in own)
            self._summarise(rows, part, *own, length)

    def follow(self, position: Tensor) -> None:
        """Renew the index of the pages that hold a step's tokens, which a kernel has stored.

        position [B, Q]: theirs, rising by one; -1, behind the others, where a row has none. What
        is renewed is read on the device: a step can be recorded.
        """
        B, Q = position.shape
        both, device = [t.unflatten(2, (-1, PAGE)) for t in (self.k, self.v)], position.device
        first, last = position[:, :1], position.amax(1, keepdim=True)
        spanned = torch.arange((Q + PAGE - 2) // PAGE + 1, device=device)
        page = (first // PAGE + spanned).clamp(0, self.capacity // PAGE - 1)  # [B, n]
        new = (page * PAGE <= last) & (page >= first // PAGE) & (first >= 0)
        row, at = torch.arange(B, device=device)[:, None], torch.arange(PAGE, device=device)
        real = (page[..., None] * PAGE + at <= last[..., None])[:, None, ..., None]
        both = (t[row, :, self._where(page)].transpose(1, 2) for t in both)  # [B, H, n, PAGE, D]
        for name, found in self.group.index_of(*both, real).items():
            held, found = self.index[name], found.transpose(1, 2)  # [B, n, H, ...]
            kept = new.view(B, -1, *[1] * (found.ndim - 2))
            # A page that is named twice gets what it is given twice.
            held[row, :, page] = torch.where(kept, found, held[row, :, page]).to(held.dtype)

    def _where(self, page: Tensor) -> Tensor:
        """Where the newest pages lie in the buffers, in pages: of packed keys these alone do."""
        return page % (self.k.shape[2] // PAGE)

    def _grow(self, tokens: int) -> None:
        pages = -(-tokens // PAGE)
        self.change(lambda t: lengthen(t, pages * PAGE))
        self._grow_index(pages)

    def _grow_index(self, pages: int) -> None:
        self.index = {name: lengthen(t, pages) for name, t in self.index.items()}
        if self.choice is not None:
            width = self.group.selector.budget.width(pages, PAGE)
            self.choice = self.choice.longer(width)

    def view(self, length: int | None) -> tuple[Tensor, Tensor]:
        """The first `length` tokens of every row; None: all that there is room for."""
        return self.k[:, :, :length], self.v[:, :, :length]

    def indexed(self, length: int | None) -> dict[str, Tensor]:
        """The index of the pages of the first `length` tokens; None: of all there is room for."""
        if length is None:
            return self.index
        pages = -(-length // PAGE)
        return {name: t[:, :, :pages] for name, t in self.index.items()}

    def state(self, rows: Sequence[int]) -> dict[str, Any]:
        choice = []
        if self.choice is not None:
            width = self.group.selector.budget.width(-(-max(rows) // PAGE), PAGE)
            pages, *rest = self.choice.tensors()
            choice = [pages[..., :width], *rest]
        index = {name: self._filled(t, rows, PAGE) for name, t in self.index.items()}
        return {**super().state(rows), "index": index, "choice": choice, "built": [*self.built]}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.index, self.built = state["index"], state["built"]
        self.choice = Choice(*state["choice"]) if state["choice"] else None

    def _filled(self, t: Tensor, rows: Sequence[int], unit: int = 1) -> Tensor:
        return filled(t, rows, unit)
