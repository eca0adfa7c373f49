"""A layer's keys and values in transformers' paged cache, which continuous batching keeps.

Every key lies there, in blocks of pages that requests hold; a plan's rings read the sink and the
window of what is held. Beside it lies what selectors keep of each page of the pool, so that a page
that requests share is known once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hfsparse.kernels.per_store import whole_rows
from hfsparse.lists import FULL, PAGE, HeadIndex
from hfsparse.lists.places import Place, Places, Table
from hfsparse.runtime.cache.buffers import at_once
from hfsparse.runtime.cache.group import Group


class Rows:
    """Where some requests' rows lie in a pool, the same for every layer.

    pool `[B, P]`: the page of the pool's keys that has each row's page p; index `[B, P]`: the page
    of what selectors keep; both name any page beyond a row's end.
    """

    def __init__(self, pool: Tensor, index: Tensor):
        self.pool, self.index = pool, index
        self._lanes: dict[tuple[int, int], Tensor] = {}
        self._last: Last | None = None

    @property
    def tokens(self) -> int:
        """That there is room for."""
        return self.pool.shape[1] * PAGE

    def lanes(self, heads: int, pages: int) -> Tensor:
        """[B, heads, P] places in an index of so many pages a head, its heads one by one."""
        if (heads, pages) not in self._lanes:
            head = torch.arange(heads, device=self.index.device)[:, None] * pages
            self._lanes[heads, pages] = self.index[:, None] + head
        return self._lanes[heads, pages]

    def last(self, length: Tensor) -> Last:
        """The last pages of the rows, which are of `length` [B]."""
        if self._last is None:
            page = (length - 1).clamp(min=0)[:, None] // PAGE
            token = torch.arange(PAGE, device=length.device)
            places = self.pool.gather(1, page) * PAGE + token
            real = (page * PAGE + token < length[:, None])[:, None, None, :, None]
            self._last = Last(places[..., None], real, self.index.gather(1, page))
        return self._last


class Last(NamedTuple):
    """The last page of each row: where its tokens lie in the pool `[B, PAGE, 1]`, which of them
    there are `[B, 1, 1, PAGE, 1]`, and which page of what selectors keep it is `[B, 1]`."""

    places: Tensor
    real: Tensor
    index: Tensor


class PagedStore:
    """Some kv heads of a layer in the pool, and what a selector keeps of each of its pages.

    It is read as a full store; of a ring's heads, those pages that hold some key of its band.
    """

    choice = None

    def __init__(self, group: Group, below: int, k: Tensor, v: Tensor, pages: int, at: HeadIndex):
        self.group, self.below, self.k, self.v, self.at = group, below, k, v, at
        self.rows: Rows | None = None  # of the call that runs
        self.index: dict[str, Tensor] = {}  # [H, pages, ...]
        if group.selector is not None:
            shape = 0, len(group.heads), 1, PAGE
            none = (t.new_empty(*shape, t.shape[-1]) for t in (k, v))
            made = self.group.index_of(*none, k.new_empty(*shape, 1, dtype=torch.bool))
            with torch.inference_mode(False):
                for name, t in made.items():
                    shape = len(group.heads), pages, *t.shape[3:]
                    self.index[name] = torch.zeros(shape, dtype=t.dtype, device=t.device)

    @property
    def capacity(self) -> int:
        """Tokens that the call's rows have room for."""
        return self.rows.tokens

    def place(self) -> Place:
        more = {"listed": self.group.chosen, "pool": self.rows.pool}
        return Place(self.group.heads, self.k, self.v, self.group.reads, 0, self.below, **more)

    def indexed(self, length: int | None) -> dict[str, Tensor]:
        """The index of the pages of the rows' first `length` tokens `[B, H, P, ...]`; None: of all
        there is room for."""
        found, pages = {}, None if length is None else -(-length // PAGE)
        for name, t in self.index.items():
            at = self.rows.lanes(*t.shape[:2])[:, :, :pages]
            found[name] = t.flatten(0, 1)[at]
        return found

    def follow(self, length: Tensor) -> None:
        """Renew the index of the last page of rows of `length` [B], which a step has written."""
        if not self.index:
            return
        last, heads = self.rows.last(length), self.at.tensor(self.group.heads, length.device)
        # Token by token in the pool `[N, Hkv, D]`, of the last page `[B, PAGE, H, D]`.
        keys, values = (
            t[0].transpose(0, 1)[last.places, heads].transpose(1, 2).unsqueeze(2)
            for t in (self.k, self.v if self.group.means else self.k)
        )
        self._put(last.index, self.group.index_of(keys, values, last.real))

    def summarise(self, k: Tensor, v: Tensor, row: int) -> None:
        """Renew the index of a row's pages, of which k, v `[1, Hkv, S, D]` are all the tokens: of
        a fork, whose blocks are copies, none is known."""
        tokens, heads = k.shape[2], self.at(self.group.heads, k.device)
        for pages in at_once(range(-(-tokens // PAGE)), self.k) if self.index else ():
            own = slice(pages.start * PAGE, pages.stop * PAGE)
            parts = [t[:, :, own][:, heads] for t in (k, v)]
            short = len(pages) * PAGE - parts[0].shape[2]
            parts = [torch.nn.functional.pad(t, (0, 0, 0, short)) for t in parts]
            parts = [t.unflatten(2, (-1, PAGE)) for t in parts]
            token = torch.arange(own.start, own.stop, device=k.device)
            real = (token < tokens).view(1, 1, -1, PAGE, 1)
            at = self.rows.index[row : row + 1, pages.start : pages.stop]
            self._put(at, self.group.index_of(*parts, real))

    def _put(self, at: Tensor, found: dict[str, Tensor]) -> None:
        """What is kept of the pages `at` [B, n]: `[B, H, n, ...]` by name. A page that is named
        twice is nobody's."""
        for name, t in found.items():
            self.index[name][:, at] = t.transpose(0, 1)


class PagedLayer:
    """One layer's keys `[N, Hkv, D]` and values in the pool, by groups of its heads."""

    rank = 0

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        groups: tuple[Group, ...],
        below: tuple[int, int],
        pages: int,
        at: HeadIndex,
    ):
        """below: rows of fewer tokens read every page, and all that a ring would drop; pages: of
        which selectors keep something."""
        self.tokens = k, v
        self.k, self.v = (t.transpose(0, 1)[None] for t in (k, v))  # [1, Hkv, N, D]
        self.table = Table(at)
        self.stores = [
            PagedStore(group, below[group.reads != FULL], self.k, self.v, pages, at)
            for group in groups
        ]

    def take(self, rows: Rows) -> Places:
        """Where the rows of a call have their keys, for kernels."""
        for store in self.stores:
            store.rows = rows
        return self.table.places([store.place() for store in self.stores])

    def write(self, k: Tensor, v: Tensor, at: Tensor) -> None:
        """Store new tokens k, v `[1, Hkv, T, D]` at places `at` [T] of the pool."""
        for held, new in zip(self.tokens, (k, v), strict=True):
            held.index_copy_(0, at, new[0].transpose(0, 1).to(held.dtype))

    def read(self, row: int, tokens: int) -> Iterator[Tensor]:
        """Keys and values `[1, Hkv, S, D]` of the first so many tokens of a row of the call."""
        pool = self.stores[0].rows.pool[row : row + 1]
        return (whole_rows(t, pool, tokens).contiguous() for t in (self.k, self.v))
