"""The KV cache of a patched model: per-layer stores that keep whole rows or only sink + recent.

`Layer` is what transformers sees in `cache.layers`; `update` hands the new keys straight through
and the attention function appends and reads the stores. Rows are stored row-relative, so left
padding takes no room, and a row's history never depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hfsparse import kernels
from hfsparse.call import Call, running
from hfsparse.kernels.places import Place, Places, Table
from hfsparse.lists import FAR, FULL, PAGE, Band, Grid, HeadIndex
from hfsparse.precision import casts
from hfsparse.selectors.choice import Choice
from hfsparse.stats import Work

SLACK = 32  # tokens a ring keeps beyond its window, at least: newest ones can be taken back


class CacheError(ValueError):
    """A cache is used in a way that would give wrong answers."""


@dataclass(frozen=True)
class Group:
    """The kv heads of a layer that share one way of being kept and read."""

    heads: tuple[int, ...]
    band: Band = FULL  # FULL: every key is kept
    selector: Any = None  # chooses pages for decode; its store keeps each page's minima and maxima
    reuses: tuple[int, ...] = ()  # whose choice these heads read, in the last group that chose

    @property
    def chosen(self) -> bool:
        """Whether a step reads pages that were chosen for these heads."""
        return bool(self.selector or self.reuses)


@dataclass(frozen=True)
class Held:
    """What a layer's cache takes, to be told later without it: no buffer moves until it is noted
    again, and rows grow into the room that there is."""

    # kv heads, bytes, and tokens that there is room for (None: a ring, whose slots serve again)
    stores: list[tuple[tuple[int, ...], int, int | None]]
    column: int  # bytes of one column of the stock cache, over all rows and heads
    window: int | None

    @classmethod
    def together(cls, parts: Sequence[Held]) -> Held:
        """Of a layer that runs several times a call, each time with a cache of its own."""
        stores = [store for part in parts for store in part.stores]
        return cls(stores, sum(part.column for part in parts), parts[0].window)

    def bytes(self, kv_heads: int) -> list[int]:
        """By kv head, as allocated."""
        return self._each(kv_heads, lambda size, room: size)

    def work(self, kv_heads: int, seen: int) -> Work:
        """By kv head, of `seen` columns: bytes of the pages that hold some, of rings and of page
        summaries; and of the stock cache, which keeps all, or as many as the model's window."""
        pages = -(-seen // PAGE) * PAGE
        used = self._each(
            kv_heads, lambda size, room: size * min(pages, room) // room if room else size
        )
        return Work(used, [self.column * min(seen, self.window or FAR) // kv_heads] * kv_heads)

    def _each(self, kv_heads: int, part: Callable[[int, int | None], int]) -> list[int]:
        found = [0] * kv_heads
        for heads, size, room in self.stores:
            for head in heads:
                found[head] += part(size, room) // len(heads)
        return found


def take_layer(call: Call) -> Layer | None:
    """The layer that the call's last `update` went to, once; None when there is no cache."""
    layer, call.layer = call.layer, None
    if layer is None and call.updates:
        raise CacheError(
            "attention was called twice for one cache update: this model calls it in a way that "
            "hfsparse can't follow. Call handle.undo() and run it as it is"
        )
    return layer


class Layer(CacheLayerMixin):
    """One decoder layer's cache: a store a group of kv heads, and how long each row is."""

    is_sliding = False  # also for rings: mask code takes a True as the model's own window
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        owner: str,
        groups: tuple[Group, ...],
        below: int = 0,
        reserve: int = 0,
        expected: int = 0,
        window: int | None = None,
        read_below: int = 0,  # rows of fewer tokens read every page
        index: int = 0,  # of the decoder layer that it serves; copies serve the same, in loops
        at: HeadIndex | None = None,
    ):
        self.owner, self.index = owner, index
        self.window = window  # the model's own sliding window
        self.expected = expected  # columns of the whole prompt, when it comes in chunks
        self.stores = [
            Full(g, reserve, read_below) if g.band == FULL else Ring(g, below) for g in groups
        ]
        self.table, self.at = Table(), HeadIndex() if at is None else at
        self.seen = 0  # columns, padding included
        self.stored = 0  # of these, how many the attention function has put away
        self.rows: list[int] = []  # tokens in each row
        self.is_initialized = False

    # -- what transformers calls ----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.rows = [0] * len(key_states)
        for store in self.stores:
            store.create(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Note the new columns and return them untouched; history stays in the stores."""
        call = running()
        if call is None or call.owner != self.owner:
            raise CacheError(
                "this cache was filled under an hfsparse patch that is no longer on the model "
                "(undone, replaced, or switched off by set_attn_implementation). It holds only "
                "what that plan kept: start again from the prompt with a new cache."
            )
        if call.layer is not None:
            raise CacheError(
                "hfsparse's cache is filled, but another attention function reads it: a forward "
                "was interrupted, or part of the model was switched back. Start again from the "
                "prompt with a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(*autocast(key_states, value_states))
        if len(key_states) != len(self.rows):
            raise CacheError(
                f"the cache holds {len(self.rows)} rows and the input has {len(key_states)}: "
                "pass a batch of the same size, or a new cache"
            )
        self.seen += key_states.shape[-2]
        call.layer = self
        call.updates += 1
        return key_states, value_states

    def get_seq_length(self, *args) -> int:
        """Tokens seen, dropped ones included."""
        return self.seen

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @property
    def keys(self) -> Tensor | None:
        """As in the stock cache, `[B, Hkv, S, D]`; CacheError unless every key is held."""
        return self._history("k")

    @property
    def values(self) -> Tensor | None:
        return self._history("v")

    def _history(self, name: str) -> Tensor | None:
        if not self.is_initialized:
            return None
        if any(isinstance(store, Ring) for store in self.stores) or {*self.rows} != {self.seen}:
            raise CacheError(
                "this cache can't be read or rebuilt as transformers' own: heads of this layer "
                "keep only their newest keys, rows are padded, or a forward is under way. Go on "
                "with it as it is (copy.deepcopy copies it), or read the prompt again after "
                "handle.undo()"
            )
        parts = [getattr(store, name)[:, :, : self.seen] for store in self.stores]
        if len(parts) == 1:
            return parts[0]
        heads = [head for store in self.stores for head in store.group.heads]
        return torch.cat(parts, 1)[:, sorted(range(len(heads)), key=heads.__getitem__)]

    def crop(self, length) -> None:
        """Take back the newest tokens, as many as transformers' own layer would."""
        if self.is_initialized:
            self.take_back(self.seen - _cropped(self.seen, int(length)))

    def take_back(self, drop: int) -> None:
        """Forget the newest `drop` tokens, and what was chosen with them."""
        rows = [max(n - drop, 0) for n in self.rows]
        for store in self.stores:
            store.check_crop(self.rows, rows)
        self.seen = self.stored = self.seen - drop
        self.expected = min(self.expected, self.seen)  # what follows is no part of that prompt
        self.rows = rows
        self._forget_choices()

    def keep(self, tokens: int) -> None:
        """From now on at least so many of the newest tokens can be taken back."""
        for store in self.stores:
            if isinstance(store, Ring):
                store.slack = max(store.slack, tokens)

    def reset(self) -> None:
        self.seen = self.stored = self.expected = 0
        self.rows = [0] * len(self.rows)
        self._forget_choices()

    def _forget_choices(self) -> None:
        for store in self.stores:
            if store.choice is not None:
                store.choice.forget(self.rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.rows), device="cpu")
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        picked = torch.arange(len(self.rows), device="cpu")[indices.cpu()].tolist()
        self.rows = [self.rows[i] for i in picked]
        with torch.inference_mode(False):  # buffers are written in any mode
            for store in self.stores:
                store.select(picked)

    def offload(self) -> None:
        raise CacheError("offloaded caches are not supported under hfsparse: use the default cache")

    # -- what the attention function calls -------------------------------------------------------

    def append(
        self, k: Tensor, v: Tensor, past: list[int], new: list[int], position: Tensor
    ) -> None:
        """Store a step's new tokens: of k, v `[B, Hkv, Q, D]` the first `new[b]` behind `past[b]`.

        position [B, Q]: theirs, -1 where a row has none; a kernel follows it, where one can.
        """
        rows = [p + n for p, n in zip(past, new, strict=True)]
        for store in self.stores:
            store.room(past, rows)
        if not kernels.append(k, v, self.places(), position):
            for store in self.stores:
                heads = self.at(store.group.heads, k.device)
                store.append(k[:, heads], v[:, heads], past, new)

    def places(self) -> Places:
        """Where each kv head has its keys, for kernels."""
        return self.table.places([store.place() for store in self.stores])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the first store, as they lie: shape, type and device of all."""
        return self.stores[0].k, self.stores[0].v

    @property
    def device(self) -> torch.device:
        return self.stores[0].k.device

    def bytes(self) -> int:
        """Bytes allocated for keys, values and summaries."""
        return sum(t.nbytes for store in self.stores for t in store.tensors())

    def held(self) -> Held:
        """What its buffers take."""
        own = [(s.group.heads, sum(t.nbytes for t in s.tensors()), s.capacity) for s in self.stores]
        return Held(own, self.column_bytes(), self.window)

    def column_bytes(self) -> int:
        """Bytes of one column of the stock cache, over all rows and heads."""
        heads = sum(len(store.group.heads) for store in self.stores)
        k, v = self.tensors()
        return len(self.rows) * heads * (k.shape[3] + v.shape[3]) * k.element_size()

    def dense_bytes(self) -> int:
        """Bytes of the stock cache: every column, or the model's window, of every row and head."""
        return self.column_bytes() * min(self.seen, self.window or FAR)

    def lengths(
        self, starts: list[int] | None, before: int, new_columns: int
    ) -> tuple[list[int], list[int]]:
        """Past and new tokens of each row when columns follow `before` others.

        starts: the first real column of each row (None: all 0).
        """
        starts = starts or [0] * len(self.rows)
        past = [max(before - s, 0) for s in starts]
        if past != self.rows:
            raise CacheError(
                f"the cached rows hold {self.rows} tokens, but by this attention_mask they should "
                f"hold {past}: pass the mask of the whole conversation, earlier padding included"
            )
        return past, [before + new_columns - max(before, s) for s in starts]

    def advance(self, starts: list[int] | None, new_columns: int) -> tuple[list[int], list[int]]:
        """As `lengths`, of columns that `update` has seen; the rows are longer by them now."""
        past, new = self.lengths(starts, self.seen - new_columns, new_columns)
        self.rows = [p + n for p, n in zip(past, new, strict=True)]
        return past, new


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


def _cropped(seen: int, length: int) -> int:
    """Tokens that transformers' layer holds after `crop(length)`: its meaning changed twice."""
    layer = DynamicLayer()
    layer.keys = layer.values = torch.empty(1, 1, seen, 1, device="meta")
    layer.is_initialized = True
    layer.crop(length)
    return layer.keys.shape[2]


def ring_size(band: Band, tokens: int, slack: int = SLACK) -> int:
    """Slots that a ring has behind its sink for rows of so many tokens; it grows by pages."""
    size = band.span(tokens) + slack
    return -(-size // PAGE) * PAGE if band.rate else size


class Ring:
    """The first `sink` keys of its heads and the recent ones, in buffers `[B, H, sink + size, D]`.

    Position p beyond the sink lies in slot `sink + (p - sink) % size`, so a slot's position follows
    from its row's length alone. Rows under `below` tokens drop nothing.
    """

    choice = capacity = None

    def __init__(self, group: Group, below: int):
        self.group, self.band, self.below = group, group.band, below
        self.k = self.v = None
        self.size, self.slack = 0, SLACK
        # First position beyond the sink that each row still held when `room` was last asked.
        self.low: list[int] = []

    def create(self, k: Tensor, v: Tensor) -> None:
        shape = (len(k), len(self.group.heads), self.band.sink)
        self.k, self.v = k.new_zeros(*shape, k.shape[-1]), v.new_zeros(*shape, v.shape[-1])
        self.low = [self.band.sink] * len(k)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.k, self.v) if t is not None]

    def place(self) -> Place:
        return Place(self.group.heads, self.k, self.v, self.band, self.size, self.below)

    def select(self, picked: list[int]) -> None:
        self.k, self.v = self.k[picked], self.v[picked]
        self.low = [self.low[i] for i in picked]

    def oldest(self, position: int, total: int) -> int:
        """First key beyond the sink read by a query at `position`; its call ends at `total`."""
        if total < self.below:
            return self.band.sink
        return max(self.band.sink, position - self.band.span(position) + 1)

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
        sink = self.band.sink
        return torch.where(position < sink, position, sink + (position - sink) % max(self.size, 1))

    def positions(self, rows: Sequence[int]) -> Tensor:
        """[B, sink + size] position held by each slot for rows of these lengths, -1 for none."""
        length, low = (torch.tensor(t, device=self.k.device) for t in (rows, self.low))
        return ring_positions(length, low, self.band.sink, self.size)

    def room(self, past: list[int], rows: list[int]) -> None:
        """Make room for rows that grow from `past` to `rows` tokens; forget what they pass."""
        self._resize(past, rows)
        sink = self.band.sink
        self.low = [
            max(min(low, max(p, sink)), n - self.size, sink)
            for low, p, n in zip(self.low, past, rows, strict=True)
        ]

    def append(self, k: Tensor, v: Tensor, past: list[int], new: list[int]) -> None:
        """As `Full.append`; of more tokens than fit, the newest."""
        self.room(past, [p + n for p, n in zip(past, new, strict=True)])
        sink = self.band.sink
        for rows, p, n in _alike(past, new):
            at_sink = max(p, min(p + n, sink))
            ends = (p, at_sink), (max(at_sink, p + n - self.size), p + n)
            kept = torch.cat([torch.arange(*end, device=k.device) for end in ends])
            slot = self.slots(kept)
            self.k[rows, :, slot], self.v[rows, :, slot] = (
                k[rows, :, kept - p],
                v[rows, :, kept - p],
            )

    def until(self, rows: list[int]) -> int:
        """Tokens up to which rows may grow and no buffer moves, as far as it looks."""
        later = max(rows) + PAGE
        settled = min(rows) >= self.below + self.slack and self._fits([later])[0]
        return later if settled else max(rows)

    def _fits(self, rows: list[int]) -> tuple[bool, int, int, bool]:
        """Whether the buffers fit rows of these lengths; the size that they need and, once none
        is short, may have; whether one is short: a crop could lead back under `below`."""
        spans = [self.band.span(n) + self.slack for n in rows]
        lengths = [max(n - self.band.sink, 1) for n in rows]
        short = [n < self.below + self.slack for n in rows] if self.below else [False] * len(rows)
        need = max(
            n if keep else min(n, s) for n, s, keep in zip(lengths, spans, short, strict=True)
        )
        most = ring_size(self.band, max(rows), self.slack)
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
        old_k, old_v = self.k, self.v
        self._forget(past)
        self.size = size
        self._forget(past)
        shape = (*old_k.shape[:2], self.band.sink + size)
        self.k, self.v = (_buffer(t, *shape, t.shape[-1]).zero_() for t in (old_k, old_v))
        for b, low in enumerate(self.low):
            if not past[b]:
                continue
            source = ((held[b] >= 0) & (held[b] < self.band.sink)) | (held[b] >= low)
            slot = self.slots(held[b, source])
            self.k[b, :, slot], self.v[b, :, slot] = old_k[b, :, source], old_v[b, :, source]

    def with_chunk(
        self, k: Tensor, v: Tensor, past: list[int], new: list[int], grid: Grid
    ) -> tuple[Tensor, Tensor, Grid]:
        """What a chunk attends to before it is stored (sink, window, itself), and its grid."""
        sink, block, device = self.band.sink, grid.block, k.device
        total = [p + n for p, n in zip(past, new, strict=True)]
        held = [min(at, max(p, sink)) for p, at in zip(past, self.low, strict=True)]  # after a crop
        low = [max(self.oldest(p, t), at) for p, t, at in zip(past, total, held, strict=True)]
        longest = max(max(t - at, 0) for t, at in zip(total, low, strict=True))
        total, low, past = (torch.tensor(t, device=device)[:, None] for t in (total, low, past))
        blocks = -(-longest // block)
        head = torch.arange(-(-sink // block), device=device) * block
        tail = low + torch.arange(blocks, device=device) * block
        first = torch.cat([head.expand(len(total), -1), tail], 1)
        ends = torch.cat([total.clamp(max=sink).expand(-1, len(head)), total.expand(-1, blocks)], 1)
        live = (ends - first).clamp(0, block)
        grid = replace(grid, Sk=first.shape[1] * block, key_first=first, key_live=live)
        at = grid.key_pos
        source = torch.where(at < past, self.slots(at), self.k.shape[2] + at - past).clamp(min=0)
        source = source.masked_fill(at < 0, 0)[:, None, :, None]

        def gather(held: Tensor, chunk: Tensor) -> Tensor:
            both = torch.cat([held, chunk], 2)
            return both.gather(2, source.expand(-1, both.shape[1], -1, both.shape[3]))

        return gather(self.k, k), gather(self.v, v), grid


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the type that autocast gives to attention, where it is on."""
    kind = tensors[0].device.type
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors) if casts(kind) else tensors


def ring_positions(length: Tensor, low: Tensor, sink: int, size: int) -> Tensor:
    """[B, sink + size] position that each slot of a ring holds, -1 for none.

    length [B]: tokens in the row; low [B]: beyond the sink, keys before it are not held.
    """
    length, low = length[:, None], low[:, None]
    slot = torch.arange(sink + size, device=length.device)
    newest = length - 1 - sink  # counted, like the slots, from the sink's end
    rest = sink + newest - (newest - (slot - sink)) % max(size, 1)
    at = torch.where(slot < sink, slot, torch.where(rest >= low, rest, -1))
    return torch.where(at < length, at, -1)


def _alike(past: list[int], new: list[int]):
    """Runs of rows that can be stored in one copy: (slice of rows, past, new)."""
    if len(set(past)) == len(set(new)) == 1:
        yield slice(None), past[0], new[0]
        return
    for b, (p, n) in enumerate(zip(past, new, strict=True)):
        yield slice(b, b + 1), p, n


def _longer(t: Tensor, size: int) -> Tensor:
    """t `[B, H, n, D]` copied into a buffer of `size` slots."""
    out = _buffer(t, *t.shape[:2], size, t.shape[3])
    if t.shape[2]:
        out[:, :, : t.shape[2]] = t
    return out


def _buffer(t: Tensor, *shape: int) -> Tensor:
    """As `t.new_empty`, and writable later also where this call runs under inference_mode."""
    if not torch.is_inference_mode_enabled():
        return t.new_empty(shape)
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=t.dtype, device=t.device)
