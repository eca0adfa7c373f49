"""A store that keeps every key of its kv heads in the host's memory, and few on the GPU.

The host has every token as soon as it is stored. The GPU has what a selector keeps of each page,
the newest two pages and a hot set (`hfsparse.lists.hot`), of which `kernels.fetch` sees to it that
it holds what a step reads. A prompt is read as it comes, and goes out behind that; a chunk has its
past copied back, a layer's at a time.
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
from hfsparse.lists.packed import NEWEST
from hfsparse.lists.places import Place
from hfsparse.runtime.cache.buffers import (
    hold_newest,
    join_begun,
    lengthen,
    new_buffer,
    runs_of_rows,
)
from hfsparse.runtime.cache.full import Full
from hfsparse.shares import ratio, share_of


def why_not(device: torch.device) -> str | None:
    """Why none can serve a model there; None: one can. On torch's meta device it shows its size."""
    return None if device.type in ("cuda", "meta") else f"a host without a GPU: it lies on {device}"


class HostFull(Full):
    """Every key, in `host`; its k and v `[B, H, NEWEST + S * unit, D]` are the newest pages and a
    hot set of S slots."""

    joins = True
    spare = 2  # pinned memory is slow to get, and there is much

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.unit = self.group.selector.budget.unit
        self.host: list[Tensor] = []  # keys and values [B, H, capacity, D]
        # What `Hot` says of slots: table, owner, stamp and clock.
        self.slots: dict[str, Tensor] = {}

    def create(self, k: Tensor, v: Tensor) -> None:
        if (why := why_not(k.device)) is not None:
            raise CacheError(
                f"the plan keeps keys in host memory, which a GPU reads, and this is {why}. Move "
                "the model to a GPU before its first token, or use a plan without host"
            )
        shape = len(k), len(self.group.heads)
        self.hold(*(new_buffer(t, *shape, NEWEST, t.shape[-1]) for t in (k, v)))
        self.host = [_in_host_memory(t, *shape, 0, t.shape[-1]) for t in (k, v)]
        self.slots = {name: _numbers(k, *shape, 0) for name in ("table", "owner", "stamp")}
        self.slots["clock"] = _numbers(k, *shape)
        self._create_index(k, (*shape, 0))

    @property
    def capacity(self) -> int:
        return self.host[0].shape[2]

    @property
    def fixed(self) -> int:
        return sum(t[:, :, :NEWEST].nbytes for t in self.held())

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.slots.values()]

    def outside(self) -> list[Tensor]:
        return self.host

    def place(self) -> Place:
        host_k, host_v = self.host
        hot = Hot(self.unit, self.below, self.k, self.v, host_k, host_v, **self.slots)
        return super().place()._replace(below=0, hot=hot)

    def select(self, picked: list[int]) -> None:
        same = picked == [*range(len(self.k))]
        super().select(picked)
        self.slots = {name: t[picked] for name, t in self.slots.items()}
        if not same:
            self._hold_outside([t[picked] for t in self._settled()], self.capacity)

    def __deepcopy__(self, memo: dict) -> HostFull:
        memo[id(self)] = twin = copy.copy(self)
        for name, value in vars(self).items():
            if name != "host":  # a copy of pinned memory would not be pinned
                setattr(twin, name, copy.deepcopy(value, memo))
        if self.host:
            twin._hold_outside(self._settled(), self.capacity)
        return twin

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._copied_back(max(rows, default=0), max(rows, default=0))

    def with_chunk(
        self, k: Tensor, v: Tensor, lengths: Lengths, grid: Grid
    ) -> tuple[Tensor, Tensor, None]:
        """What a chunk attends to before it is stored: its past, and itself as it comes."""
        made = self._copied_back(max(lengths.past), lengths.longest)
        for rows, p, n in runs_of_rows(lengths):
            for held, new in zip(made, (k, v), strict=True):
                held[rows, :, p : p + n] = new[rows, :, :n]
        return *made, None

    def _copied_back(self, tokens: int, room: int) -> tuple[Tensor, Tensor]:
        """The first so many tokens of every row, in new buffers that have room for more."""
        made = [new_buffer(t, *t.shape[:2], room, t.shape[-1]) for t in self.held()]
        for into, host in zip(made, self.host, strict=True):
            _move(into[:, :, :tokens], host[:, :, :tokens])
        return tuple(made)

    def write(self, k: Tensor, v: Tensor, lengths: Lengths) -> None:
        """As `Full.write`: into host memory, and the newest pages."""
        for rows, past, n in runs_of_rows(lengths):
            if not n:
                continue
            new, end = [t[rows, :, :n] for t in (k, v)], past + n
            for host, t in zip(self.host, new, strict=True):
                _move(host[rows, :, past:end], t)
            pages = range(past // PAGE, -(-end // PAGE))
            new = join_begun(self.held(), new, rows, past)
            self._summarise_new(rows, pages, new, end)
            hold_newest(self.held(), new, rows, pages)

    def forget(self, rows: Sequence[int]) -> None:
        """As `Full.forget`; the newest pages are those of rows that are as long as that."""
        super().forget(rows)
        for row, n in enumerate(rows):
            pages = range(max(-(-n // PAGE) - 2, 0), -(-n // PAGE))
            first = pages.start * PAGE // self.unit
            self.slots["table"][row, :, first:] = -1
            owner = self.slots["owner"][row]
            owner.masked_fill_(owner >= first, -1)
            for page in pages:
                of, at = slice(page * PAGE, (page + 1) * PAGE), page * PAGE % NEWEST
                for held, host in zip(self.held(), self.host, strict=True):
                    _move(held[row : row + 1, :, at : at + PAGE], host[row : row + 1, :, of])

    def _where(self, page: Tensor) -> Tensor:
        return page % (NEWEST // PAGE)

    def _grow(self, tokens: int) -> None:
        pages = -(-tokens // PAGE)
        slots, units = self._slots(pages), pages * PAGE // self.unit
        self._hold_outside(self._settled(), pages * PAGE)
        self.change(lambda t: lengthen(t, NEWEST + slots * self.unit))
        for name, size, empty in (("table", units, -1), ("owner", slots, -1), ("stamp", slots, 0)):
            held = self.slots[name]
            self.slots[name] = longer = lengthen(held, size)
            longer[:, :, held.shape[2] :] = empty
        self._grow_index(pages)

    def _slots(self, pages: int) -> int:
        """Units that the hot set holds of so many pages: its share, and what a step may read."""
        budget, each = self.group.selector.budget, PAGE // self.unit
        share = share_of(pages * each, *ratio(self.group.hot))
        most = max(share, budget.width(pages, PAGE), -(-self.below // self.unit))
        return min(-(-most // each), pages) * each

    def _settled(self) -> list[Tensor]:
        """`host`, once the device has written what it was told to."""
        if self.k.is_cuda:
            torch.cuda.synchronize(self.k.device)
        return self.host

    def _hold_outside(self, given: list[Tensor], tokens: int) -> None:
        """From now on `host` has room for so many tokens, and these in it."""
        made = []
        for held, t in zip(self.held(), given, strict=True):
            made.append(_in_host_memory(held, *t.shape[:2], tokens, t.shape[3]))
            made[-1][:, :, : t.shape[2]] = t
        self.host = made


def _in_host_memory(t: Tensor, *shape: int) -> Tensor:
    """A buffer of t's type in memory that its device reaches: pinned, where that is a GPU."""
    device = "meta" if t.is_meta else "cpu"
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=t.dtype, device=device, pin_memory=t.is_cuda)


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
