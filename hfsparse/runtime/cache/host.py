"""Stores that keep every key of their kv heads in the host's memory, and few on the GPU.

The host has every token as soon as it is stored, or in fewer bits every page as soon as it is full.
The GPU has what a selector keeps of each page, the newest two pages and a hot set
(`hfsparse.lists.hot`), of which `kernels.fetch` sees to it that it holds what a step reads. A
prompt is read as it comes, and goes out behind that; a chunk has its past copied back, of a few
heads at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfsparse.errors import CacheError
from hfsparse.lists import PAGE, Grid
from hfsparse.lists.hot import Hot
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.packed import NEWEST, Packed
from hfsparse.lists.places import Place
from hfsparse.runtime.cache.buffers import (
    filled,
    hold_newest,
    join_begun,
    lengthen,
    new_buffer,
    put,
)
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.packed import BOUNDS, PackedFull
from hfsparse.shares import ratio, share_of


def why_not(device: torch.device) -> str | None:
    """Why none can serve a model there; None: one can. On torch's meta device it shows its size."""
    return None if device.type in ("cuda", "meta") else f"a host without a GPU: it lies on {device}"


class HostStore(Full):
    """What lies in host memory, `host`, and what says which of it the GPU holds, `hot`."""

    joins = remakes = True
    spare = 2  # pinned memory is slow to get, and there is much

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.unit = self.group.selector.budget.unit
        # Keys and values [B, H, capacity, D], or pages as `Packed` names them, [B, H, P, ...].
        self.host: dict[str, Tensor] = {}
        # What `Hot` says of slots: table, owner, stamp and clock.
        self.hot: dict[str, Tensor] = {}

    def create(self, k: Tensor, v: Tensor) -> None:
        if (why := why_not(k.device)) is not None:
            raise CacheError(
                f"the plan keeps keys in host memory, which a GPU reads, and this is {why}. Move "
                "the model to a GPU before its first token, or use a plan without host"
            )
        super().create(k, v)
        self._create_slots()

    def _create_slots(self) -> None:
        """None yet."""
        shape = self.k.shape[:2]
        self.hot = {name: _numbers(self.k, *shape, 0) for name in ("table", "owner", "stamp")}
        self.hot["clock"] = _numbers(self.k, *shape)

    @property
    def fixed(self) -> int:
        return sum(t[:, :, :NEWEST].nbytes for t in self.held())

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.hot.values()]

    def outside(self) -> list[Tensor]:
        return [*self.host.values()]

    def part(self, heads: slice) -> HostStore:
        part = super().part(heads)
        part.host = {name: t[:, heads] for name, t in self.host.items()}
        return part

    def select(self, picked: list[int]) -> None:
        same = picked == [*range(len(self.k))]
        super().select(picked)
        self.hot = {name: t[picked] for name, t in self.hot.items()}
        if not same:
            self._hold_outside({name: t[picked] for name, t in self._settled().items()})

    def __deepcopy__(self, memo: dict) -> HostStore:
        memo[id(self)] = twin = copy.copy(self)
        for name, value in vars(self).items():
            if name != "host":  # a copy of pinned memory would not be pinned
                setattr(twin, name, copy.deepcopy(value, memo))
        twin._hold_outside(self._settled())
        return twin

    def forget(self, rows: Sequence[int]) -> None:
        """As `Full.forget`; no slot holds what may be written anew."""
        super().forget(rows)
        for row, n in enumerate(rows):
            first = max(-(-n // PAGE) - 2, 0) * PAGE // self.unit
            self.hot["table"][row, :, first:] = -1
            owner = self.hot["owner"][row]
            owner.masked_fill_(owner >= first, -1)

    def _grow_slots(self, pages: int) -> int:
        """Note the units of so many pages, and how many of these the hot set holds."""
        budget, each = self.group.selector.budget, PAGE // self.unit
        share = share_of(pages * each, *ratio(self.group.hot))
        most = max(share, budget.width(pages, PAGE), -(-self.below // self.unit))
        slots = min(-(-most // each), pages) * each
        sizes, grown = {"table": pages * each, "owner": slots, "stamp": slots}, {}
        for name, size in sizes.items():
            held = self.hot[name]
            grown[name] = longer = lengthen(held, size)
            longer[:, :, held.shape[2] :] = 0 if name == "stamp" else -1
        self.hot = self.hot | grown
        return slots

    def _settled(self) -> dict[str, Tensor]:
        """`host`, once the device has written what it was told to."""
        if self.k is not None and self.k.is_cuda:
            torch.cuda.synchronize(self.k.device)
        return self.host

    def _hold_outside(self, given: dict[str, Tensor], size: int | None = None) -> None:
        """From now on `host` holds these, with room for so many tokens, or packed pages."""
        host = {}
        for name, t in given.items():
            room = t.shape[2] if size is None else size
            host[name] = made = _in_host_memory(t, self.k.device, *t.shape[:2], room, *t.shape[3:])
            made[:, :, : t.shape[2]] = t
        self.host = host


class HostFull(HostStore):
    """Every key, in `host`; its k and v `[B, H, NEWEST + S * unit, D]` are the newest pages and a
    hot set of S slots."""

    def create(self, k: Tensor, v: Tensor) -> None:
        super().create(k, v)
        self.host = dict(zip("kv", self.held(), strict=True))
        self._hold_outside(self.host)
        self.change(lambda t: new_buffer(t, *t.shape[:2], NEWEST, t.shape[3]))

    @property
    def capacity(self) -> int:
        return self.host["k"].shape[2]

    def place(self) -> Place:
        host_k, host_v = self.host.values()
        hot = Hot(self.unit, self.below, self.k, self.v, host_k, host_v, **self.hot)
        return super().place()._replace(below=0, hot=hot)

    def state(self, rows: Sequence[int]) -> dict[str, Any]:
        host = {name: filled(t, rows) for name, t in self._settled().items()}
        return {**super().state(rows), "host": host}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._hold_outside(state["host"])
        self._create_slots()
        slots = self._grow_slots(self.capacity // PAGE)
        self.change(lambda t: lengthen(t, NEWEST + slots * self.unit))

    def _filled(self, t: Tensor, rows: Sequence[int], unit: int = 1) -> Tensor:
        return super()._filled(t, rows, unit) if unit == PAGE else t[:, :, :NEWEST]

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._copied_back(max(rows, default=0), max(rows, default=0))

    def with_chunk(
        self, k: Tensor, v: Tensor, lengths: Lengths, grid: Grid
    ) -> tuple[Tensor, Tensor, None]:
        """What a chunk attends to before it is stored: its past, and itself as it comes."""
        made = self._copied_back(max(lengths.past), lengths.longest)
        for rows, p, n in lengths.runs:
            for held, new in zip(made, (k, v), strict=True):
                put(held, new, rows, p, n)
        return *made, None

    def _copied_back(self, tokens: int, room: int) -> tuple[Tensor, Tensor]:
        """The first so many tokens of every row, in new buffers that have room for more."""
        made = [new_buffer(t, *t.shape[:2], room, t.shape[-1]) for t in self.held()]
        for into, host in zip(made, self.host.values(), strict=True):
            _move(into[:, :, :tokens], host[:, :, :tokens])
        return tuple(made)

    def write(self, k: Tensor, v: Tensor, lengths: Lengths) -> None:
        """As `Full.write`: into host memory, and the newest pages."""
        for rows, past, n in lengths.runs:
            if not n:
                continue
            new, end = [t[rows, :, :n] for t in (k, v)], past + n
            for host, t in zip(self.host.values(), new, strict=True):
                _move(host[rows, :, past:end], t)
            pages = range(past // PAGE, -(-end // PAGE))
            new = join_begun(self.held(), new, rows, past)
            self._summarise_new(rows, pages, new, end)
            hold_newest(self.held(), new, rows, pages)

    def forget(self, rows: Sequence[int]) -> None:
        """As `HostStore.forget`; the newest pages are those of rows that are as long as that."""
        super().forget(rows)
        for row, n in enumerate(rows):
            for page in range(max(-(-n // PAGE) - 2, 0), -(-n // PAGE)):
                of, at = slice(page * PAGE, (page + 1) * PAGE), page * PAGE % NEWEST
                for held, host in zip(self.held(), self.host.values(), strict=True):
                    _move(held[row : row + 1, :, at : at + PAGE], host[row : row + 1, :, of])

    def _where(self, page: Tensor) -> Tensor:
        return page % (NEWEST // PAGE)

    def _grow(self, tokens: int) -> None:
        pages = -(-tokens // PAGE)
        self._hold_outside(self._settled(), pages * PAGE)
        slots = self._grow_slots(pages)
        self.change(lambda t: lengthen(t, NEWEST + slots * self.unit))
        self._grow_index(pages)


class HostPacked(HostStore, PackedFull):
    """Every key, in pages of fewer bits in `host`, but for bounds that are the index; its `pages`
    are the slots of a hot set."""

    def create(self, k: Tensor, v: Tensor) -> None:
        super().create(k, v)
        here = BOUNDS if self.shares_bounds else ()
        self._hold_outside({name: t for name, t in self.pages.items() if name not in here})

    def _share(self) -> None:
        """Slots have bounds of their own."""

    @property
    def capacity(self) -> int:
        return self.host["k"].shape[2] * PAGE

    def every(self) -> dict[str, Tensor]:
        """All pages, as `Packed` names them."""
        here = {name: self.index[name] for name in BOUNDS if name not in self.host}
        return {**self.host, **here}

    def place(self) -> Place:
        slots, pages = self.packed(), self._packed(self.every())
        both = slots.k, slots.v, pages.k, pages.v
        hot = Hot(PAGE, self.below, *both, **self.hot, packed=slots, pages=pages)
        return super().place()._replace(below=0, hot=hot)

    def part(self, heads: slice) -> HostPacked:
        part = super().part(heads)
        part.index = {name: t[:, heads] for name, t in self.index.items()}
        return part

    def brought(self, pages: slice) -> Packed:
        made = {}
        for name, t in self.every().items():
            made[name] = some = t[:, :, pages]
            if name in self.host:
                made[name] = torch.empty_like(some, device=self.k.device)
                _move(made[name], some)
        return self._packed(made)

    def _put(self, rows: slice, pages: range, found: dict[str, Tensor]) -> None:
        for name, t in self.every().items():
            _move(t[rows, :, pages.start : pages.stop], found[name])

    def lasting(self) -> dict[str, Tensor]:
        return self._settled()

    def state(self, rows: Sequence[int]) -> dict[str, Any]:
        return super().state(rows)  # by `lasting` all pages, and no slot

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._hold_outside(self.pages)
        self._create_slots()
        self.pages = {
            name: self.k.new_empty(*self.k.shape[:2], 0, *t.shape[3:], dtype=t.dtype)
            for name, t in self.every().items()
        }
        self._grow_pages(self._grow_slots(self.capacity // PAGE))

    def _grow(self, tokens: int) -> None:
        pages = -(-tokens // PAGE)
        self._hold_outside(self._settled(), pages)
        self._grow_index(pages)
        self._grow_pages(self._grow_slots(pages))

    def _grow_pages(self, slots: int) -> None:
        self.pages = {name: lengthen(t, slots) for name, t in self.pages.items()}


def _in_host_memory(t: Tensor, device: torch.device, *shape: int) -> Tensor:
    """A buffer of t's type in memory that the device reaches: pinned, where that is a GPU."""
    pinned, where = device.type == "cuda", "meta" if device.type == "meta" else "cpu"
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=t.dtype, device=where, pin_memory=pinned)


def _numbers(t: Tensor, *shape: int) -> Tensor:
    """Zeros on t's device."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=torch.int32, device=t.device)


def _move(into: Tensor, t: Tensor) -> None:
    """Copy t `[B, H, n, D]` between the memories; nobody waits for it.

    Head by head: what lies together on both sides goes over the bus as it is.
    """
    for row in range(len(t)):
        for head in range(t.shape[1]):
            given = t[row, head].contiguous() if t.is_cuda else t[row, head]
            into[row, head].copy_(given, non_blocking=True)
