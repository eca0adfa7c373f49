"""Where the queries and keys of a call lie, and what a band of them keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

PAGE = 64  # tokens in a decode page
RATE_ONE = 1 << 16  # `recent_per_token` is held as a fraction of this, so that spans are exact
ANY = 1 << 40  # a recent window that never ends
FAR = 1 << 40  # the position of a column slot that holds no column


def at_heads(heads: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index for heads: a view where they stand side by side, else a tensor on the device."""
    first, end = heads[0], heads[-1] + 1
    return slice(first, end) if list(heads) == [*range(first, end)] else _tensor(heads, device)


def _tensor(heads: Sequence[int], device: torch.device) -> Tensor:
    """Complete when this returns: other streams may read it."""
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)


class HeadIndex:
    """Indices for heads, each made once and owned here.

    A plain list would be copied to the device by each use, and the host would wait for that. CUDA
    graphs read an index where it lies: it stays there as long as its owner lives.
    """

    def __init__(self):
        self._made: dict[tuple, slice | Tensor] = {}

    def __reduce__(self):
        return HeadIndex, ()  # a copy makes its own

    def __call__(self, heads: Sequence[int], device: torch.device) -> slice | Tensor:
        """As `at_heads`."""
        return self._once(at_heads, tuple(heads), device)

    def tensor(self, heads: Sequence[int], device: torch.device) -> Tensor:
        """The index as a tensor in any case."""
        return self._once(_tensor, tuple(heads), device)

    def _once(self, *key) -> slice | Tensor:
        if key not in self._made:  # two threads both get the first one's
            self._made.setdefault(key, key[0](*key[1:]))
        return self._made[key]


def default_block(tokens: int, device: torch.device | None = None) -> int:
    """Block edge: 128 as GPU kernels like it; 32 on a CPU for short rows, where that keeps less."""
    on_cpu = device is None or device.type == "cpu"
    return 32 if tokens < 4096 and on_cpu else 128


@dataclass(frozen=True)
class Band:
    """Keys a streaming head reads: the first `sink` and the last `recent + rate * position`.

    chunked: of a cache alone; the last ones are those from the newest multiple of `recent` on.
    """

    sink: int = 0
    recent: int = ANY
    rate: int = 0  # in 1/65536 tokens of window per token of position
    chunked: bool = False

    def start(self, position: Tensor) -> Tensor:
        """First key of the recent window of queries at `position`; never decreases."""
        return position - self.span(position) + 1

    def span(self, position):
        """Length of the recent window, the query included. Takes ints and integer tensors."""
        if self.chunked:
            return position % self.recent + 1
        return self.widest(position)

    def widest(self, position):
        """The longest window of queries up to `position`."""
        return self.recent + position * self.rate // RATE_ONE


FULL = Band()


@dataclass(frozen=True, eq=False)  # a grid is itself alone: what lies over it is kept by it
class Grid:
    """Where the queries and keys of a batch stand.

    Query i of row b is at position `k_len[b] - q_len[b] + i`; rows are padded to `Sq` and `Sk`.
    Key slots come in blocks: block j of row b holds positions `first[b, j] ..` in its leading
    `live[b, j]` slots. By default block j begins at position `j * block`; a ring that has dropped
    keys says otherwise.
    """

    q_len: Tensor  # [B] new queries
    k_len: Tensor  # [B] tokens in the row, the new ones included
    Sq: int
    Sk: int
    block: int = 32
    window: int | None = None  # the model's own sliding window, in tokens
    key_first: Tensor | None = None  # [B, nk]
    key_live: Tensor | None = None  # [B, nk]
    # Known without asking the device; True: perhaps.
    padded: bool = True  # rows of other lengths
    past: bool = True  # tokens before the queries

    @classmethod
    def causal(cls, B: int, S: int, block: int = 32, device="cpu", window: int | None = None):
        """The grid of prompts of S tokens without padding or past."""
        length = torch.full((B,), S, device=device)
        return cls(length, length, S, S, block, window)

    @property
    def nq(self) -> int:
        return -(-self.Sq // self.block)

    @property
    def nk(self) -> int:
        return -(-self.Sk // self.block)

    @cached_property
    def offset(self) -> Tensor:
        """[B] position of each row's first new query."""
        return self.k_len - self.q_len

    @cached_property
    def first(self) -> Tensor:
        """[B, nk] position of each key block's first slot."""
        if self.key_first is not None:
            return self.key_first
        starts = torch.arange(self.nk, device=self.k_len.device) * self.block
        return starts.expand(len(self.k_len), -1)

    @cached_property
    def live(self) -> Tensor:
        """[B, nk] keys held by each block."""
        if self.key_live is not None:
            return self.key_live
        return (self.k_len[:, None] - self.first).clamp(0, self.block)

    @cached_property
    def q_rows(self) -> Tensor:
        """[B, nq] queries in each query block."""
        starts = torch.arange(self.nq, device=self.q_len.device) * self.block
        return (self.q_len[:, None] - starts).clamp(0, self.block)

    @cached_property
    def q_first(self) -> Tensor:
        """[B, nq] position of each query block's first query."""
        starts = torch.arange(self.nq, device=self.q_len.device) * self.block
        return self.offset[:, None] + starts

    @property
    def q_last(self) -> Tensor:
        """[B, nq] position of each query block's last query."""
        return self.q_first + self.q_rows - 1

    @cached_property
    def key_pos(self) -> Tensor:
        """[B, nk * block] position of each key slot, -1 where it holds none."""
        lane = torch.arange(self.block, device=self.first.device)
        pos = self.first[..., None] + lane
        return torch.where(lane < self.live[..., None], pos, -1).flatten(1)

    def query_pos(self, rows: Tensor | None = None) -> Tensor:
        """[B, R] positions of the queries `rows` (all), -1 past the row's end."""
        rows = torch.arange(self.Sq, device=self.q_len.device) if rows is None else rows
        return torch.where(rows < self.q_len[:, None], self.offset[:, None] + rows, -1)

    def reach(self, band: Band = FULL) -> tuple[Tensor, Tensor]:
        """Block maps [B, nq, nk]: causality, window and band keep some pair, and every pair."""
        q0, q1 = self.q_first[..., None], self.q_last[..., None]
        k0, k1 = self.first[:, None], (self.first + self.live - 1)[:, None]
        some = (k0 <= q1) & (self.q_rows[..., None] > 0) & (self.live[:, None] > 0)
        some &= (k0 < band.sink) | (k1 >= band.start(q0))
        every = (k1 <= q0) & (self.live[:, None] == self.block)
        every &= (k1 < band.sink) | (k0 >= band.start(q1))
        if self.window is not None:
            some &= q0 - k1 < self.window
            every &= q1 - k0 < self.window
        return some, some & every

    def take(self, rows: Tensor) -> Grid:
        """The grid of some of the batch's rows."""
        some = [None if t is None else t[rows] for t in (self.key_first, self.key_live)]
        q_len, k_len = self.q_len[rows], self.k_len[rows]
        return replace(self, q_len=q_len, k_len=k_len, key_first=some[0], key_live=some[1])

    def pairs(self) -> Tensor:
        """[B] query-key pairs of dense attention, dropped keys included."""
        seen = self.query_pos() + 1
        return (seen if self.window is None else seen.clamp(max=self.window)).sum(1)

    def blocks(self) -> Tensor:
        """[B] blocks of dense attention, dropped keys included."""
        if self.key_first is None:
            return self.reach()[0].sum((1, 2))
        whole = int(self.k_len.max())
        return replace(self, Sk=whole, key_first=None, key_live=None).blocks()
