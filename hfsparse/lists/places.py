"""Where the kv heads of a layer have their keys and values: a table that decode kernels read.

With it one launch serves all heads of a layer, however each is kept: full, with pages that are
listed or without, or in rings of several sizes. A kernel looks up its kv head's row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfsparse.lists.grid import FULL, PAGE, Band, HeadIndex
from hfsparse.lists.hot import Hot
from hfsparse.lists.packed import NEWEST, Packed

COLUMNS = (
    *("k", "v"),  # where the head's keys and values begin, in units behind the layer's first
    *("low", "high"),  # its spans' minima and maxima, in units behind the layer's first key
    *("row", "slots"),  # slots from a batch row to the next; slots of the head itself
    *("span_row", "spans"),  # the same of minima and maxima; 0: none are kept
    # position p >= sink lies in slot sink + (p - sink) % size; where `Place.ends`, the newest do
    *("sink", "size"),
    *("recent", "rate"),  # beyond the sink a query reads its last recent + rate * position keys,
    "chunked",  # or, where this is set, those from the newest multiple of `recent` on;
    "below",  # in rows of fewer tokens all that is held
    "listed",  # which head of the page lists it is; -1: none, its pages are read in order
    "span",  # tokens that a minimum and maximum are over: a page, or a part of one
    "dropped",  # where the device has what each row lacks, [B] int64; 0: no row lacks any
)
EXTREMES = {"low", "high"}  # the index that kernels write: minima and maxima of pages or spans
WIDTH = 32  # cells of a head
NEVER = (1 << 31) - 1  # the size of no ring


class Place(NamedTuple):
    """kv heads whose keys and values lie in one pair of buffers, and what of them is read."""

    heads: tuple[int, ...]
    k: Tensor  # [B, H, N, D]
    v: Tensor  # [B, H, N, Dv]; of latents the first dims of k, where they lie
    band: Band = FULL
    size: int = 0  # slots of a ring, behind the band's sink; 0: each key lies at its position
    below: int = 0  # rows of fewer tokens read all that is held
    listed: bool = False  # whether a step's page lists say which pages are read
    # Minima and maxima, where any are kept: of pages [B, H, P, D], of spans [B, H, P, n, D].
    low: Tensor | None = None
    high: Tensor | None = None
    # Renews an index that no kernel writes, once the tokens at positions [B, Q] are stored.
    follow: Callable[[Tensor], None] | None = None
    append: Callable[..., None] | None = None  # (k, v, lengths): stores new tokens in PyTorch
    selector: Any = None  # whose index `follow` renews, and that index [B, H, P, ...] by name
    index: dict[str, Tensor] | None = None
    # [B] int64: how many keys each row has lost. It reads as a row that is so much shorter, whose
    # keys lie one after another.
    dropped: Tensor | None = None
    packed: Packed | None = None  # where keys lie in fewer bits; k and v are its newest tokens
    # Where keys lie in host memory: lists say where what they name lies in k and v, whose first
    # NEWEST slots are its newest tokens.
    hot: Hot | None = None
    # [B, P] the page that has each row's page p, where k and v `[1, Hkv, N, D]`, of all the layer's
    # heads, are a pool that rows share.
    pool: Tensor | None = None

    @property
    def ends(self) -> bool:
        """Whether k and v hold the newest tokens, at position % NEWEST."""
        return self.packed is not None or self.hot is not None

    @property
    def narrow(self) -> bool:
        """Whether a step reads a band of what is held: of a ring, or of a pool's whole rows."""
        return self.size > 0 or (self.pool is not None and self.band != FULL)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return (self.k, self.v) if self.low is None else (self.k, self.v, self.low, self.high)


class Places(NamedTuple):
    """All heads of a layer, as one launch takes them."""

    parts: Sequence[Place]
    cells: Tensor  # [Hkv, WIDTH] int64
    unit: int  # elements, at most 16: as many as are loaded at once
    at: HeadIndex  # for kernels that serve a part after another

    @property
    def k(self) -> Tensor:
        """What offsets of keys, minima and maxima count from."""
        return self.parts[0].k

    @property
    def v(self) -> Tensor:
        return self.parts[0].v

    @property
    def pool(self) -> Tensor | None:
        """Where rows' pages lie in a pool, the same of all parts."""
        return self.parts[0].pool

    @property
    def key_step(self) -> int:
        """Elements from one slot's key to the next's: in a pool a token's heads lie together."""
        return self.k.stride(2)

    @property
    def value_step(self) -> int:
        """Elements from one slot's value to the next's: of latents it is a key wide."""
        return self.v.stride(2)

    @property
    def rings(self) -> bool:
        return any(part.narrow for part in self.parts)

    @property
    def summaries(self) -> bool:
        return any(part.low is not None for part in self.parts)

    @property
    def drops(self) -> bool:
        return any(part.dropped is not None for part in self.parts)

    @property
    def packed(self) -> bool:
        """Whether some keys lie in fewer bits."""
        return any(part.packed is not None for part in self.parts)

    @property
    def hosted(self) -> bool:
        """Whether some keys lie in host memory."""
        return any(part.hot is not None for part in self.parts)

    def takes(self, tokens: int) -> bool:
        """Whether a kernel alone can store prompts of so many tokens: each of them has a slot that
        is its own, and no index but minima and maxima follows."""
        return not (self.packed or self.hosted or self.drops) and all(
            part.follow is None and (not part.size or tokens <= part.band.sink + part.size)
            for part in self.parts
        )

    @property
    def long(self) -> int:
        """Heads that may read many pages: those without a band, if there are any."""
        full = sum(len(part.heads) for part in self.parts if not part.narrow)
        return full or len(self.cells)


class Table:
    """The cells of a cache's layer: one tensor as long as it lives, since CUDA graphs read it.

    They are written anew when the buffers have moved.
    """

    def __init__(self, at: HeadIndex | None = None):
        self.cells: Tensor | None = None
        self.unit, self.written = 1, None
        self.at = HeadIndex() if at is None else at

    def places(self, parts: Sequence[Place]) -> Places:
        now = [
            (*part[:1], *part[3:7], _address(part.dropped), *map(_spot, part.buffers))
            for part in parts
        ]
        if now != self.written:
            self._write(parts)
            self.written = now
        return Places(parts, self.cells, self.unit, self.at)

    def _write(self, parts: Sequence[Place]) -> None:
        pooled = parts[0].pool is not None
        if not (pooled or all(map(_dense, (t for part in parts for t in part.buffers)))):
            raise ValueError("the cache's buffers must be contiguous")
        lines: dict[int, list[int]] = {}  # by head
        first, listed = parts[0], 0
        for part in parts:
            starts = [_behind(part.k, first.k), _behind(part.v, first.v), 0, 0]
            steps, spans, span = [part.k.stride(1), part.v.stride(1), 0, 0], 0, PAGE
            if part.low is not None:
                starts[2:] = _behind(part.low, first.k), _behind(part.high, first.k)
                steps[2:] = [prod(part.low.shape[2:])] * 2
                each = part.low.shape[3] if part.low.ndim == 5 else 1
                spans, span = part.low.shape[2] * each, PAGE // each
            band, H, N = part.band, len(part.heads), part.k.shape[2]
            turn = (0, NEWEST) if part.ends else (band.sink, part.size or NEVER)
            held = 0 if pooled else H * N, N, H * spans, spans, *turn
            held = *held, band.recent, band.rate, int(band.chunked), part.below
            ends = span, _address(part.dropped)
            for i, head in zip(part.heads if pooled else range(H), part.heads, strict=True):
                at = [start + i * step for start, step in zip(starts, steps, strict=True)]
                lines[head] = [*at, *held, listed if part.listed else -1, *ends]
                listed += part.listed
        rows = np.zeros((len(lines), WIDTH), np.int64)  # torch takes lists many times as slowly
        rows[:, : len(COLUMNS)] = [lines[head] for head in range(len(lines))]
        self.unit = gcd(16, *rows[:, :4].ravel().tolist())
        rows[:, :4] //= self.unit
        with torch.inference_mode(False):
            cells = torch.from_numpy(rows)
            if self.cells is None or self.cells.device != first.k.device:
                self.cells = cells.to(first.k.device, non_blocking=True)
            else:
                self.cells.copy_(cells, non_blocking=True)


def _spot(t: Tensor) -> tuple[int, torch.Size]:
    return t.data_ptr(), t.shape


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dense(t: Tensor) -> bool:
    """Whether rows, heads and slots follow one another; slots may be wider than what is read."""
    step = t.stride(2)
    heads = t.shape[2] * step
    return t.is_contiguous() or t.stride() == (t.shape[1] * heads, heads, step, 1)


def _behind(t: Tensor, first: Tensor) -> int:
    """Elements from one buffer's beginning to another's."""
    return (t.data_ptr() - first.data_ptr()) // t.element_size()
