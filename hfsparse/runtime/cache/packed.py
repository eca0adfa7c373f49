"""Stores that keep keys and values in fewer bits, page by page (`hfsparse.lists.packed`).

A page is packed once, when it is full, from its keys and values as they came, so that what a store
holds of a row does not depend on how the row was read: at once, in chunks or token by token. The
newest two pages are held as they came, too: rows that lose up to `PAGE` tokens read what they would
read if these had never been. A row that goes back further, into a page that is held packed alone,
begins that page anew, when it goes, with what it unpacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfsparse.errors import CacheError
from hfsparse.kernels.positions import ring_positions
from hfsparse.lists import PAGE, Grid
from hfsparse.lists.lengths import Lengths, on_device
from hfsparse.lists.packed import NEWEST, UNPACKED, Packed, Past, pack, unpack, width_of
from hfsparse.lists.places import Place
from hfsparse.runtime.cache import buffers
from hfsparse.runtime.cache.buffers import (
    at_once,
    hold_newest,
    join_begun,
    lengthen,
    new_zeros,
    put,
)
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.ring import Ring
from hfsparse.runtime.cache.store import Store

BOUNDS = "low", "high"  # of keys, by page and channel
ENDS = "least", "most"  # of values, by token


class PackedStore(Store):
    """Packed pages of a store's slots; its k and v `[B, H, NEWEST, D]` are the newest tokens."""

    joins = True

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.bits = self.group.bits
        self.pages: dict[str, Tensor] = {}  # as `Packed` names them, [B, H, P, ...]
        # By row, the first page that is surely held as it came: of n tokens that of number
        # n // PAGE and the one before it are, unless the row went back further.
        self.exact: list[int] = []

    def create(self, k: Tensor, v: Tensor) -> None:
        shape, byte = (len(k), len(self.group.heads)), {"dtype": torch.uint8}
        self.hold(*(buffers.new_buffer(t, *shape, NEWEST, t.shape[-1]) for t in (k, v)))
        self.exact = [0] * len(k)
        for name, t in (("k", k), ("v", v)):
            width = t.shape[-1] * width_of(self.bits) // 8
            self.pages[name] = t.new_empty(*shape, 0, PAGE, width, **byte)
        for name in BOUNDS:
            self.pages[name] = k.new_empty(*shape, 0, k.shape[-1])
        for name in ENDS:
            self.pages[name] = v.new_empty(*shape, 0, PAGE)

    @property
    def fixed(self) -> int:
        return sum(t.nbytes for t in self.held())

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.pages.values()]

    def packed(self) -> Packed:
        """What it holds, as it is read."""
        return self._packed(self.pages)

    def _packed(self, pages: dict[str, Tensor]) -> Packed:
        """These pages beside the newest as they came."""
        return Packed(bits=self.bits, **pages, newest_k=self.k, newest_v=self.v)

    def brought(self, pages: slice) -> Packed:
        """These of its pages, where they can be unpacked."""
        return self.packed().some(pages)

    def place(self) -> Place:
        return super().place()._replace(packed=self.packed())

    def select(self, picked: list[int]) -> None:
        super().select(picked)
        self.pages = {name: t[picked] for name, t in self.pages.items()}
        self.exact = [self.exact[b] for b in picked]

    def snapshot(self) -> tuple:
        return super().snapshot(), [*self.exact]

    def restore(self, before: tuple) -> None:
        super().restore(before[0])
        self.exact = before[1]

    def state(self, rows: Sequence[int]) -> dict[str, Any]:
        self._pass(rows)
        return {**super().state(rows), "exact": [*self.exact]}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.pages, self.exact = state["pages"], state["exact"]

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        held = self.brought(slice(None))
        return held.read(on_device([*rows], self.k.device), self.positions(rows))

    def room(self, past: list[int], rows: list[int]) -> None:
        super().room(past, rows)
        self._pass(rows)

    def check_crop(self, now: list[int], rows: list[int]) -> None:
        self._pass(now)  # steps that were replayed have told nothing
        super().check_crop(now, rows)

    def _pass(self, rows: list[int]) -> None:
        """Rows have had so many tokens: pages before the newest two are held packed alone."""
        self.exact = [max(e, n // PAGE - 1) for e, n in zip(self.exact, rows, strict=True)]

    def append(self, k: Tensor, v: Tensor, lengths: Lengths) -> None:
        """As `Full.append`."""
        self.room(lengths.past, lengths.rows)
        for rows, p, n in lengths.runs:
            if n:
                self._append(rows, p, [t[rows, :, :n] for t in (k, v)])

    def _append(self, rows: slice, past: int, new: list[Tensor]) -> None:
        """Store new keys and values `[b, H, n, D]` of some rows."""
        first, end = past // PAGE, past + new[0].shape[2]
        last = -(-end // PAGE)
        new = join_begun(self.held(), new, rows, past)

        def tokens(t: Tensor, pages: range) -> Tensor:
            return t[:, :, (pages.start - first) * PAGE : (pages.stop - first) * PAGE]

        self._summarise_new(rows, range(first, last), new, end)
        for kept in self._kept(range(first, end // PAGE)):
            for pages in at_once(kept, self.k):
                self._pack(rows, pages, *(tokens(t, pages) for t in new))
        hold_newest(self.held(), new, rows, range(first, last))

    def _pack(self, rows: slice, pages: range, k: Tensor, v: Tensor) -> None:
        """Keep pages, which are full of these keys and values `[b, H, n * PAGE, D]`."""
        k, v = (t.unflatten(2, (-1, PAGE)) for t in (k, v))
        low, high, least, most = k.amin(3), k.amax(3), v.amin(4), v.amax(4)
        found = {"low": low, "high": high, "least": least, "most": most}
        found["k"] = pack(k, low[:, :, :, None], high[:, :, :, None], self.bits)
        found["v"] = pack(v, least[..., None], most[..., None], self.bits)
        self._put(rows, pages, found)

    def _put(self, rows: slice, pages: range, found: dict[str, Tensor]) -> None:
        """Keep these pages of some rows, which are packed."""
        at = torch.arange(pages.start, pages.stop, device=self.k.device) * PAGE
        for name, t in found.items():
            self.pages[name][rows, :, self.slots(at) // PAGE] = t

    def forget(self, rows: Sequence[int]) -> None:
        """Rows that went back into a page that is held packed alone unpack it."""
        super().forget(rows)
        for b, n in enumerate(rows):
            page = n // PAGE
            if page >= self.exact[b]:
                continue
            self.exact[b] = page
            if not n % PAGE:
                continue
            at = page * PAGE % NEWEST
            slot = int(self.slots(torch.tensor(page * PAGE))) // PAGE
            own = self.brought(slice(slot, slot + 1))
            code, *ends = (t[b, :, 0] for t in (own.k, own.low, own.high))
            self.k[b, :, at : at + PAGE] = unpack(code, *(t[:, None] for t in ends), self.bits)
            code, *ends = (t[b, :, 0] for t in (own.v, own.least, own.most))
            self.v[b, :, at : at + PAGE] = unpack(code, *(t[..., None] for t in ends), self.bits)


class PackedFull(PackedStore, Full):
    """Every key of its heads; `low` and `high` are the index of a selector that keeps the same."""

    remakes = True
    tiled = True

    def create(self, k: Tensor, v: Tensor) -> None:
        super().create(k, v)
        self._create_index(k, (*self.k.shape[:2], 0))
        self._share()

    def _share(self) -> None:
        """Keep the bounds of pages once, where the selector reads the same."""
        if self.shares_bounds:
            self.pages |= {name: self.index[name] for name in BOUNDS}

    @property
    def shares_bounds(self) -> bool:
        """Whether the selector keeps the same bounds of pages."""
        return all(name in self.index and self.index[name].ndim == 4 for name in BOUNDS)

    def tensors(self) -> list[Tensor]:
        return [*{id(t): t for t in super().tensors()}.values()]

    @property
    def capacity(self) -> int:
        return self.pages["k"].shape[2] * PAGE

    def select(self, picked: list[int]) -> None:
        super().select(picked)
        self._share()

    def state(self, rows: Sequence[int]) -> dict[str, Any]:
        pages = {name: self._filled(t, rows, PAGE) for name, t in self.lasting().items()}
        return {**super().state(rows), "pages": pages}

    def lasting(self) -> dict[str, Tensor]:
        """What is kept of pages beside the index."""
        return {name: t for name, t in self.pages.items() if t is not self.index.get(name)}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._share()

    def _filled(self, t: Tensor, rows: Sequence[int], unit: int = 1) -> Tensor:
        return super()._filled(t, rows, unit) if unit == PAGE else t  # not of the newest tokens

    def _grow(self, tokens: int) -> None:
        pages = -(-tokens // PAGE)
        self._grow_index(pages)
        self.pages = {name: lengthen(t, pages) for name, t in self.pages.items()}
        self._share()

    def positions(self, rows: Sequence[int]) -> Tensor:
        """[1, capacity] position of each slot."""
        return torch.arange(self.capacity, device=self.k.device)[None]

    def slots(self, position: Tensor) -> Tensor:
        """Where positions lie."""
        return position

    def _kept(self, full: range) -> list[range]:
        """Of pages that are full, runs of those that are kept: all."""
        return [full]

    def with_chunk(
        self, k: Tensor, v: Tensor, lengths: Lengths, grid: Grid
    ) -> tuple[Tensor, Tensor, None]:
        """What a chunk attends to before it is stored: its past, and itself as it comes."""
        past = on_device(lengths.past, k.device)
        read = [
            buffers.new_buffer(t, *t.shape[:2], lengths.longest, t.shape[3]) for t in self.held()
        ]
        pages = -(-max(lengths.past) // PAGE)
        step = max(1, UNPACKED // self.k[:, :, :PAGE].numel())
        for first in range(0, pages, step):
            own = slice(first, min(first + step, pages))
            at = torch.arange(own.start * PAGE, own.stop * PAGE, device=k.device)[None]
            for whole, t in zip(read, self.brought(own).read(past, at), strict=True):
                into = whole[:, :, own.start * PAGE : own.stop * PAGE]
                into.copy_(t[:, :, : into.shape[2]])
        for rows, p, n in lengths.runs:
            for whole, new in zip(read, (k, v), strict=True):
                put(whole, new, rows, p, n)
        return *read, None

    def with_pages(self, k: Tensor, v: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor, Past]:
        """As `with_chunk`, for kernels that read packed pages: keys and values `[B, H, n, D]` from
        each row's newest page on, which is not full, and the pages before that."""
        first = [p // PAGE for p in lengths.past]
        past = Past(self.brought(slice(max(first))), on_device(first, k.device) * PAGE)
        behind = [
            join_begun(self.held(), [t[rows, :, :n] for t in (k, v)], rows, p)
            for rows, p, n in lengths.runs
        ]
        if len(behind) == 1:
            return *behind[0], past
        made = [t.new_empty(*t.shape[:2], PAGE + t.shape[2], t.shape[3]) for t in (k, v)]
        for (rows, _, _), new in zip(lengths.runs, behind, strict=True):
            for into, t in zip(made, new, strict=True):
                into[rows, :, : t.shape[2]] = t
        return *made, past

    def part(self, heads: slice) -> PackedFull:
        part = super().part(heads)
        part.pages = {name: t[:, heads] for name, t in self.pages.items()}
        return part


class PackedRing(PackedStore, Ring):
    """Sink and recent keys of its heads, both in whole pages."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.sink = -(-self.band.sink // PAGE) * PAGE

    def create(self, k: Tensor, v: Tensor) -> None:
        super().create(k, v)
        self.low = [self.sink] * len(k)
        self._renew_pages()

    def _renew_pages(self) -> None:
        pages = (self.sink + self.size) // PAGE
        self.pages = {
            name: new_zeros(t, *t.shape[:2], pages, *t.shape[3:]) for name, t in self.pages.items()
        }

    def state(self, rows: Sequence[int]) -> dict[str, Any]:
        return {**super().state(rows), "pages": {**self.pages}}

    def most(self, tokens: int) -> int:
        return -(-(self.band.widest(tokens) + self.slack) // PAGE) * PAGE

    def check_crop(self, now: list[int], rows: list[int]) -> None:
        super().check_crop(now, rows)
        for b, (n, low) in enumerate(zip(rows, self.low, strict=True)):
            first = n // PAGE * PAGE
            if n % PAGE and first // PAGE < self.exact[b] and self.sink <= first < low:
                raise CacheError(
                    f"cannot go back to {n} tokens: the ring's page that they end in is gone. "
                    "Start again from the prompt, or use a plan whose cache is full"
                )

    def _kept(self, full: range) -> list[range]:
        """Those of the sink, and as many of the newest as there is room for."""
        sink, recent = self.sink // PAGE, full.stop - self.size // PAGE
        ends = (full.start, min(full.stop, sink)), (max(full.start, sink, recent), full.stop)
        return [range(*end) for end in ends]

    def _move(self, past: list[int], held: Tensor | None) -> None:
        old = self.pages
        self._renew_pages()
        if held is None:
            return
        # Of each slot's page, the newest that was full.
        full = torch.tensor([n // PAGE * PAGE for n in past], device=held.device)
        low = torch.full_like(full, self.sink)
        lay = ring_positions(full, low, self.sink, held.shape[1] - self.sink)[:, ::PAGE]
        for b, low in enumerate(self.low):
            source = (lay[b] >= 0) & ((lay[b] < self.sink) | (lay[b] + PAGE > low))
            slot = self.slots(lay[b, source]) // PAGE
            for name, t in old.items():
                self.pages[name][b, :, slot] = t[b, :, source]
