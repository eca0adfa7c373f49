"""A store that keeps those keys of its kv heads that an eviction chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hfsparse.errors import CacheError
from hfsparse.evictions.eviction import best_keys
from hfsparse.lists import PAGE, Grid
from hfsparse.lists.lengths import Lengths, on_device
from hfsparse.lists.places import Place
from hfsparse.runtime.cache.buffers import lengthen
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group


class Evicting(Full):
    """What a row's heads kept, one key after another in the row's order, and all later keys.

    Each head of a row keeps as many, if others. So the row reads as one that is `dropped` tokens
    shorter: a new token at position p lies in slot `p - dropped`, behind all that is held. Rows
    under `least` tokens evict nothing. `reserve` is of tokens, the evicted ones included.
    """

    drops = joins = True

    def __init__(self, group: Group, reserve: int, least: int):
        super().__init__(group, 0 if group.eviction.adds_up else reserve)
        self.eviction, self.least = group.eviction, least
        self.dropped: list[int] = []  # keys that each row lacks
        self.settled: list[int] = []  # tokens that each row had when it lost the last
        self.gone: Tensor | None = None  # [B] int64: `dropped`, where kernels read it
        self.score: Tensor | None = None  # [B, H, capacity], where scores of calls add up

    def create(self, k: Tensor, v: Tensor) -> None:
        super().create(k, v)
        self.dropped, self.settled = [0] * len(k), [0] * len(k)
        with torch.inference_mode(False):
            self.gone = torch.zeros(len(k), dtype=torch.int64, device=k.device)
        if self.eviction.adds_up:
            self.score = k.new_empty(*self.k.shape[:3], dtype=torch.float32)

    def tensors(self) -> list[Tensor]:
        return [*self._parts(), *(() if self.gone is None else (self.gone,))]

    @property
    def lacks(self) -> int:
        return min(self.dropped)

    def place(self) -> Place:
        return super().place()._replace(dropped=self.gone)

    def check_crop(self, now: list[int], rows: list[int]) -> None:
        """CacheError unless rows can go back to so many tokens: not past the last eviction."""
        for n, settled in zip(rows, self.settled, strict=True):
            if 0 < n < settled:
                raise CacheError(
                    f"cannot go back to {n} tokens: at {settled} tokens {self.eviction.kind} chose "
                    "what to keep, and the rest is gone. Start again from the prompt, or use a "
                    "plan whose cache is full"
                )

    def select(self, picked: list[int]) -> None:
        self._renew([t[picked] for t in self._parts()])
        self.dropped = [self.dropped[i] for i in picked]
        self.settled = [self.settled[i] for i in picked]
        self.gone = self.gone[picked]

    def state(self, rows: Sequence[int]) -> dict[str, Any]:
        held = [n - lost for n, lost in zip(rows, self.dropped, strict=True)]
        score = [] if self.score is None else [self._filled(self.score, held)]
        own = {"score": score, "dropped": [*self.dropped], "settled": [*self.settled]}
        return {**super().state(held), **own}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.dropped, self.settled = state["dropped"], state["settled"]
        self.gone = torch.tensor(self.dropped, device=self.k.device)
        self.score = next(iter(state["score"]), None)

    def until(self, rows: list[int]) -> int:
        return self.capacity + self.lacks

    def room(self, past: list[int], rows: list[int]) -> None:
        self._begin(past)
        need = max(n - lost for n, lost in zip(rows, self.dropped, strict=True))
        if need > self.capacity:
            self._grow(max(need, self.reserve - self.lacks, self.capacity * 17 // 16))

    def append(self, k: Tensor, v: Tensor, lengths: Lengths) -> None:
        """Store a step's tokens behind what is held: nothing is evicted."""
        self.room(lengths.past, lengths.rows)
        self.write(k, v, self._inside(lengths))

    def take(self, k: Tensor, v: Tensor, lengths: Lengths, q: Tensor, **logits: Any) -> None:
        """Keep the best of what is held and of a prompt's, or a chunk's, keys `[B, H, Q, D]`.

        q `[B, Hq, n, D]`: of each row's new queries the last n, or all that it has. logits: how
        products become such, as `Eviction.scores` takes them.
        """
        self._begin(lengths.past)
        inner = self._inside(lengths)
        if self._left(inner.rows, lengths.rows) == inner.rows:
            self.append(k, v, lengths)
            if self.eviction.adds_up:
                self.observe(q, lengths, **logits)
            return
        if inner.behind:
            k, v = self._joined(k, v, inner)
        kept = self._evict(k, v, inner, lengths.rows, q, logits)
        room = max(kept[0].shape[2], self.reserve - self.lacks)
        self._renew([lengthen(t, -(-room // PAGE) * PAGE) for t in kept])

    def observe(self, q: Tensor, lengths: Lengths, **logits: Any) -> None:
        """Behind a step: its queries `[B, Hq, Q, D]` add to scores, and the lowest keys go."""
        inner = self._inside(lengths)
        kept = self._evict(*self.view(inner.longest), inner, lengths.rows, q, logits)
        for held, new in zip(self._parts(), kept, strict=True):
            held[:, :, : new.shape[2]] = new

    def with_chunk(
        self, k: Tensor, v: Tensor, lengths: Lengths, grid: Grid
    ) -> tuple[Tensor, Tensor, Grid]:
        """What a chunk attends to before it is stored (all that is held, and itself), and its grid.

        There a row's keys have the last positions: those that it lacks seem to be its first.
        """
        self._begin(lengths.past)
        inner, block = self._inside(lengths), grid.block
        k, v = self._joined(k, v, inner)
        lost, total = (on_device(t, k.device)[:, None] for t in (self.dropped, lengths.rows))
        first = lost + torch.arange(-(-k.shape[2] // block), device=k.device) * block
        live = (total - first).clamp(0, block)
        return k, v, replace(grid, Sk=k.shape[2], key_first=first, key_live=live)

    def _grow(self, tokens: int) -> None:
        capacity = -(-tokens // PAGE) * PAGE
        self._renew([lengthen(t, capacity) for t in self._parts()])

    def _parts(self) -> list[Tensor]:
        """What it holds of each key."""
        return [*self.held(), *(() if self.score is None else (self.score,))]

    def _renew(self, parts: list[Tensor]) -> None:
        """Hold these, which are as `_parts`."""
        *key_values, score = [*parts, None] if self.score is None else parts
        self.hold(*key_values)
        self.score = score

    def _begin(self, past: list[int]) -> None:
        """Rows without a past lack nothing."""
        if any(lost and not p for lost, p in zip(self.dropped, past, strict=True)):
            self._lose([lost if p else 0 for lost, p in zip(self.dropped, past, strict=True)])
        self.settled = [n if p else 0 for n, p in zip(self.settled, past, strict=True)]

    def _lose(self, dropped: list[int]) -> None:
        self.dropped = dropped
        self.gone.copy_(on_device(dropped, self.gone.device))

    def _inside(self, lengths: Lengths) -> Lengths:
        """The same of what is held."""
        past, rows = (
            [n - lost for n, lost in zip(t, self.dropped, strict=True)]
            for t in (lengths.past, lengths.rows)
        )
        return Lengths.between(past, rows, lengths.columns)

    def _left(self, held: list[int], rows: list[int]) -> list[int]:
        """How many of the keys that are held stay, in rows of so many tokens."""
        size = self.eviction.size
        return [n if t < self.least else min(n, size) for n, t in zip(held, rows, strict=True)]

    def _joined(self, k: Tensor, v: Tensor, inner: Lengths) -> tuple[Tensor, Tensor]:
        """What rows hold, and new keys and values behind it, `[B, H, longest, D]`."""
        most, device = max(inner.past), k.device
        made = [torch.cat([held[:, :, :most], new], 2) for held, new in self.beside(k, v)]
        if min(inner.past) < most:
            past = on_device(inner.past, device)[:, None]
            at = torch.arange(inner.longest, device=device).expand(len(past), -1)
            at = torch.where(at < past, at, most + at - past).clamp(max=made[0].shape[2] - 1)
            made = [_gather(t, at[:, None].expand(-1, t.shape[1], -1)) for t in made]
        return made[0], made[0][..., : self.group.rank] if self.group.rank else made[1]

    def _evict(
        self,
        k: Tensor,
        v: Tensor,
        inner: Lengths,
        rows: list[int],
        q: Tensor,
        logits: dict[str, Any],
    ) -> list[Tensor]:
        """What stays of k and v `[B, H, S, D]`, of which `inner` says how many are real.

        In the order of `_parts`.
        """
        device, made = k.device, [k] if self.group.rank else [k, v]
        held, past = (on_device(t, device) for t in (inner.rows, inner.past))
        watched = on_device([min(n, q.shape[2]) for n in inner.new], device)
        grid = Grid(watched, held, q.shape[2], k.shape[2])
        score = self.eviction.scores(q.detach(), k.detach(), grid, **logits)
        if self.score is not None:
            n = min(k.shape[2], self.capacity)
            before = torch.arange(n, device=device) < past[:, None, None]
            still = self.eviction.decay ** on_device(inner.new, device)[:, None, None]
            score[:, :, :n] += still * self.score[:, :, :n].masked_fill(~before, 0)
            made.append(score)
        left = self._left(inner.rows, rows)
        lost = [n - kept for n, kept in zip(inner.rows, left, strict=True)]
        # Sums of scores can't be taken back, nor can what is evicted.
        ends = zip(lost, rows, self.settled, strict=True)
        self.settled = [n if gone or self.eviction.adds_up else old for gone, n, old in ends]
        if any(lost):
            best = best_keys(self.eviction, score, held, on_device(left, device), max(left))
            made = [_gather(t, best) for t in made]
            self._lose([a + b for a, b in zip(self.dropped, lost, strict=True)])
        return made


def _gather(t: Tensor, slots: Tensor) -> Tensor:
    """t `[B, H, S, ...]` at slots `[B, H, n]` of each head."""
    if t.ndim == 4:
        slots = slots[..., None].expand(-1, -1, -1, t.shape[3])
    return t.gather(2, slots)
