"""A store that keeps every key of its kv heads, in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.lists import PAGE
from hfsparse.lists.choice import Choice
from hfsparse.lists.places import Place
from hfsparse.runtime.cache.buffers import _alike, _longer
from hfsparse.runtime.cache.group import Group


class Full:
    """Every key of its heads, in buffers `[B, H, capacity, D]` that grow by a sixteenth."""

    def __init__(self, group: Group, reserve: int, below: int = 0):
        self.group, self.reserve, self.below = group, reserve, below
        self.k = self.v = self.low = self.high = None
        self.choice: Choice | None = None  # the last one, where steps read it again

    def create(self, k: Tensor, v: Tensor) -> None:
        shape = (len(k), len(self.group.heads), 0)
        self.k, self.v = k.new_empty(*shape, k.shape[-1]), v.new_empty(*shape, v.shape[-1])
        if self.group.selector:
            self.low = self.high = self.k
        if self.group.selector and self.group.selector.refresh:
            self.choice = Choice.none(*shape, k.device)

    def tensors(self) -> list[Tensor]:
        own = (self.k, self.v, self.low, self.high) if self.group.selector else (self.k, self.v)
        last = () if self.choice is None else self.choice.tensors()
        return [t for t in (*own, *last) if t is not None]

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.k.shape[2]

    def place(self) -> Place:
        group, more = self.group, {"below": self.below}
        if group.selector:
            more |= {"low": self.low, "high": self.high}
        return Place(group.heads, self.k, self.v, listed=group.chosen, **more)

    def check_crop(self, now: list[int], rows: list[int]) -> None:
        """Any prefix of a full row is held."""

    def select(self, picked: list[int]) -> None:
        for name in ("k", "v", "low", "high") if self.group.selector else ("k", "v"):
            setattr(self, name, getattr(self, name)[picked])
        if self.choice is not None:
            wanted = len(picked), *self.choice.pages.shape[1:]
            self.choice = Choice.none(*wanted, self.k.device)

    def until(self, rows: list[int]) -> int:
        """Tokens up to which rows may grow and no buffer moves."""
        return self.k.shape[2]

    def room(self, past: list[int], rows: list[int]) -> None:
        """Make room for rows that grow from `past` to `rows` tokens."""
        if (need := max(rows)) > self.k.shape[2]:
            self._grow(max(need, self.reserve, self.k.shape[2] * 17 // 16))

    def append(self, k: Tensor, v: Tensor, past: list[int], new: list[int]) -> None:
        """Store the first `new[b]` tokens of k, v `[B, H, Q, D]` behind row b's `past[b]`."""
        self.room(past, [p + n for p, n in zip(past, new, strict=True)])
        for rows, p, n in _alike(past, new):
            self.k[rows, :, p : p + n] = k[rows, :, :n]
            self.v[rows, :, p : p + n] = v[rows, :, :n]
            if self.group.selector and n:
                self._summarise(rows, p // PAGE, p + n)

    def _grow(self, tokens: int) -> None:
        capacity = -(-tokens // PAGE) * PAGE
        self.k, self.v = _longer(self.k, capacity), _longer(self.v, capacity)
        if self.group.selector:
            self.low, self.high = (_longer(t, capacity // PAGE) for t in (self.low, self.high))
        if self.choice is not None:
            self.choice = self.choice.longer(self.group.selector.width(capacity // PAGE, PAGE))

    def _summarise(self, rows: slice, page: int, length: int) -> None:
        """Minima and maxima of the pages from `page` to the end of rows of `length` tokens."""
        last = -(-length // PAGE)
        keys = self.k[rows, :, page * PAGE : last * PAGE].unflatten(2, (-1, PAGE))
        at = torch.arange(page * PAGE, last * PAGE, device=keys.device).view(-1, PAGE)
        empty = (at >= length)[..., None]
        self.low[rows, :, page:last] = keys.masked_fill(empty, torch.inf).amin(3)
        self.high[rows, :, page:last] = keys.masked_fill(empty, -torch.inf).amax(3)

    def view(self, length: int | None) -> tuple[Tensor, Tensor]:
        """The first `length` tokens of every row; None: all that there is room for."""
        return self.k[:, :, :length], self.v[:, :, :length]

    def summaries(self, length: int | None) -> tuple[Tensor, Tensor]:
        """Minima and maxima of the pages of the first `length` tokens; None: of all."""
        pages = None if length is None else -(-length // PAGE)
        return self.low[:, :, :pages], self.high[:, :, :pages]
