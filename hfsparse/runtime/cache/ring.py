"""A store that keeps sink and recent keys of its kv heads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hfsparse.errors import CacheError
from hfsparse.kernels.positions import ring_positions
from hfsparse.lists import PAGE, Band, Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import Place
from hfsparse.runtime.cache.buffers import new_zeros, no_slots, put
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.store import Store

SLACK = 32  # tokens a ring keeps beyond its window, at least: newest ones can be taken back


def ring_size(band: Band, tokens: int, slack: int = SLACK) -> int:
    """Slots that a ring has behind its sink for rows of so many tokens; it grows by pages."""
    size = band.widest(tokens) + slack
    return -(-size // PAGE) * PAGE if band.rate else size


class Ring(Store):
    """The first `sink` keys of its heads and the recent ones, in buffers `[B, H, sink + size, D]`.

    Position p beyond the sink lies in slot `sink + (p - sink) % size`, so a slot's position follows
    from its row's length alone. Rows under `below` tokens drop nothing.
    """

    drops = joins = True
    choice = capacity = None

    def __init__(self, group: Group, below: int):
        super().__init__(group)
        self.band, self.below = group.band, below
        self.sink = self.band.sink  # slots that keep their token
        self.size, self.slack = 0, SLACK
        # First position beyond the sink that each row still held when `room` was last asked.
        self.low: list[int] = []

    def create(self, k: Tensor, v: Tensor) -> None:
        shape = (k.shape[0], len(self.group.heads), 0)
        self.hold(*(no_slots(t.dtype, t.device, *shape, t.shape[-1]) for t in (k, v)))
        self.low = [self.sink] * k.shape[0]

    def tensors(self) -> list[Tensor]:
        return self.held()

    def place(self) -> Place:
        own = self.band, self.size, self.below
        return Place(self.group.heads, self.k, self.v, *own, append=self.append)

    def select(self, picked: list[int]) -> None:
        self.change(lambda t: t[picked])
        self.low = [self.low[i] for i in picked]

    def snapshot(self) -> list[int]:
        """What a step changes on the host: which positions are still held."""
        return self.low

    def restore(self, before: list[int]) -> None:
        """Take back what a step changed on the host."""
        self.low = before

    def state(self, rows: Sequence[int]) -> dict[str, Any]:
        own = {"size": self.size, "slack": self.slack, "low": [*self.low]}
        return {**super().state(rows), **own}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.size, self.slack, self.low = state["size"], state["slack"], state["low"]

    def oldest(self, position: int, total: int) -> int:
        """First key beyond the sink read by a query at `position`; its call ends at `total`."""
        if total < self.below:
            return self.sink
        return max(self.sink, position - self.band.span(position) + 1)

    def check_crop(self, now: list[int], rows: list[int]) -> None:
        """CacheError unless rows that have `now` tokens can go back to `rows`."""
        self._forget(now)
        for n, low in zip(rows, self.low, strict=True):
            if self.oldest(n, n + 1) < min(n, low):
                raise CacheError(
                    f"cannot go back to {n} tokens: a ring keeps {self.slack} tokens beyond its "
                    "window and the rest is gone. Start again from the prompt, or use a plan whose "
                    "cache is full"
                )

    def slots(self, position: Tensor) -> Tensor:
        """Where positions lie in the buffers."""
        sink = self.sink
        return torch.where(position < sink, position, sink + (position - sink) % max(self.size, 1))

    def positions(self, rows: Sequence[int]) -> Tensor:
        """[B, sink + size] position held by each slot for rows of these lengths, -1 for none."""
        length, low = (torch.tensor(t, device=self.k.device) for t in (rows, self.low))
        return ring_positions(length, low, self.sink, self.size)

    def room(self, past: list[int], rows: list[int]) -> None:
        """Make room for rows that grow from `past` to `rows` tokens; forget what they pass."""
        self._resize(past, rows)
        sink = self.sink
        self.low = [
            max(min(low, max(p, sink)), n - self.size, sink)
            for low, p, n in zip(self.low, past, rows, strict=True)
        ]

    def append(self, k: Tensor, v: Tensor, lengths: Lengths) -> None:
        """As `Full.append`; of more tokens than fit, the newest."""
        self.room(lengths.past, lengths.rows)
        sink = self.sink
        for rows, p, n in lengths.runs:
            first = p if p < sink else sink + (p - sink) % max(self.size, 1)
            if first + n <= sink + self.size:  # they lie one after another
                for held, new in self.beside(k, v):
                    put(held, new, rows, first, n)
                continue
            at_sink = max(p, min(p + n, sink))
            ends = (p, at_sink), (max(at_sink, p + n - self.size), p + n)
            kept = torch.cat([torch.arange(*end, device=k.device) for end in ends])
            slot = self.slots(kept)
            for held, new_ones in self.beside(k, v):
                held[rows, :, slot] = new_ones[rows, :, kept - p]

    def until(self, rows: list[int]) -> int:
        """Tokens up to which rows may grow and no buffer moves, as far as it looks."""
        later = max(rows) + PAGE
        settled = min(rows) >= self.below + self.slack and self._fits([later])[0]
        return later if settled else max(rows)

    def most(self, tokens: int) -> int:
        """The slots that rows of so many tokens may have behind the sink."""
        return ring_size(self.band, tokens, self.slack)

    def _fits(self, rows: list[int]) -> tuple[bool, int, int, bool]:
        """Whether the buffers fit rows of these lengths; the size that they need and, once none
        is short, may have; whether one is short: a crop could lead back under `below`."""
        spans = [self.band.widest(n) + self.slack for n in rows]
        lengths = [max(n - self.sink, 1) for n in rows]
        short = [n < self.below + self.slack for n in rows] if self.below else [False] * len(rows)
        need = max(
            n if keep else min(n, s) for n, s, keep in zip(lengths, spans, short, strict=True)
        )
        most = self.most(max(rows))
        fits = need <= self.size and (any(short) or self.size <= most)
        return fits, need, most, any(short)

    def _forget(self, now: list[int]) -> None:
        """Rows of `now` tokens hold no more than the buffers do."""
        self.low = [max(low, n - self.size) for low, n in zip(self.low, now, strict=True)]

    def _resize(self, past: list[int], rows: list[int]) -> None:
        """Make room for rows of these lengths; trim once a crop can't lead back under `below`."""
        fits, need, most, short = self._fits(rows)
        if fits:
            return
        size = -(-max(need, self.size * 17 // 16) // PAGE) * PAGE
        size = size if short else min(size, most)
        held = self.positions(past) if any(past) else None
        self._forget(past)
        self.size = size
        self._forget(past)
        self._move(past, held)

    def _move(self, past: list[int], held: Tensor | None) -> None:
        """New buffers, with what is still held of the old ones, whose slots `held` tells."""
        old, shape = self.held(), (*self.k.shape[:2], self.sink + self.size)
        self.change(lambda t: new_zeros(t, *shape, t.shape[-1]))
        for b, low in enumerate(self.low):
            if not past[b]:
                continue
            source = ((held[b] >= 0) & (held[b] < self.sink)) | (held[b] >= low)
            slot = self.slots(held[b, source])
            for now, before in zip(self.held(), old, strict=True):
                now[b, :, slot] = before[b, :, source]

    def with_chunk(
        self, k: Tensor, v: Tensor, lengths: Lengths, grid: Grid
    ) -> tuple[Tensor, Tensor, Grid]:
        """What a chunk attends to before it is stored (sink, window, itself), and its grid."""
        sink, block, device = self.sink, grid.block, k.device
        past, total, before = lengths.past, lengths.rows, self.read(lengths.past)
        held = [min(at, max(p, sink)) for p, at in zip(past, self.low, strict=True)]  # after a crop
        low = [max(self.oldest(p, t), at) for p, t, at in zip(past, total, held, strict=True)]
        # Beyond the sink blocks begin at multiples, so that `extend` cuts none in two; but those of
        # the model's own chunks at the first key, since pieces of a layout follow one another.
        edge = 1 if self.band.chunked else block
        starts = [at // edge * edge for at in low]
        longest = max(max(t - at, 0) for t, at in zip(total, starts, strict=True))
        given = total, low, past, starts
        total, low, past, starts = (torch.tensor(t, device=device)[:, None] for t in given)
        blocks = -(-longest // block)
        head = torch.arange(-(-sink // block), device=device) * block
        tail = starts + torch.arange(blocks, device=device) * block
        first = torch.cat([head.expand(len(total), -1), torch.maximum(tail, low)], 1)
        last = torch.minimum(tail + block, total)
        ends = torch.cat([total.clamp(max=sink).expand(-1, len(head)), last], 1)
        live = (ends - first).clamp(0, block)
        grid = replace(grid, Sk=first.shape[1] * block, key_first=first, key_live=live)
        at = grid.key_pos
        source = torch.where(at < past, self.slots(at), before[0].shape[2] + at - past).clamp(min=0)
        source = source.masked_fill(at < 0, 0)[:, None, :, None]

        def gather(held: Tensor, chunk: Tensor) -> Tensor:
            both = torch.cat([held, chunk], 2)
            return both.gather(2, source.expand(-1, both.shape[1], -1, both.shape[3]))

        if rank := self.group.rank:
            made = gather(before[0], k)
            return made, made[..., :rank], grid
        return gather(before[0], k), gather(before[1], v), grid
