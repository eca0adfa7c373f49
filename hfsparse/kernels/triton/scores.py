"""What kernels that score a cache's units share: what they are asked, and how they answer.

Each writes the scores of tiles of units, in base 2, and the logarithm of what a tile's powers of 2
sum up to, so that `choose.py` can make votes of them. Lengths are read on the device, and nothing
depends on the room that there is for more pages. A row whose last choice is young (`refresh`), or
that is too short for one, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import LOG2E, await_previous, chained
from hfsparse.lists.choice import Choice
from hfsparse.precision import without_autocast
from hfsparse.selectors.budget import Budget

TILE = 64  # units that one program scores, or
TOKENS = 512  # as many as have so many tokens


@dataclass(frozen=True)
class Asked:
    """A call of SELECT, as kernels take it."""

    budget: Budget
    q: Tensor  # [B, *, Q, D]
    heads: Tensor | None  # of q, those that are meant; None: all
    length: Tensor  # [B]
    kv_heads: int
    pages: int  # that there is room for
    below: int
    choice: Choice | None

    @property
    def programs(self) -> int:
        return len(self.q) * self.kv_heads

    @property
    def units(self) -> int:
        return self.pages * self.budget.per_page

    @property
    def queries(self) -> int:
        """New queries of a kv head: those of each q head of its group."""
        heads = self.q.shape[1] if self.heads is None else len(self.heads)
        return heads // self.kv_heads * self.q.shape[2]

    @property
    def tile(self) -> int:
        return max(TILE, TOKENS // self.budget.unit)

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.units, self.tile)

    @cached_property
    def scores(self) -> Tensor:
        """[B * Hkv, queries, tiles * tile], to be written."""
        shape = self.programs, self.queries, self.tiles * self.tile
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    @cached_property
    def totals(self) -> Tensor:
        """[B * Hkv, queries, tiles], to be written."""
        shape = self.programs, self.queries, self.tiles
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    @property
    def made(self) -> Tensor:
        """When the last choice was made; a stand-in that is not read."""
        return self.length if self.choice is None else self.choice.length

    def tensors(self) -> tuple[Tensor, ...]:
        heads = self.length if self.heads is None else self.heads
        return self.scores, self.totals, self.length, self.made, heads

    def numbers(self) -> tuple[int, ...]:
        Q, refresh = self.q.shape[2], self.budget.refresh
        return self.kv_heads, Q, self.queries, self.units, self.below, refresh

    def settings(self) -> dict[str, int | bool]:
        more = {"SOME": self.heads is not None, "KEEPS": self.choice is not None}
        return {"TILE": self.tile, "UNIT": self.budget.unit, **more}


def score(selector, index: dict[str, Tensor], asked: Asked, scale: float) -> None:
    """Write what `selector.scores` says, which PyTorch works out."""
    q = asked.q if asked.heads is None else asked.q[:, asked.heads]
    found = without_autocast(selector.scores)(q, index, asked.length, scale)
    found = found.float().contiguous()
    rows = min(16, triton.next_power_of_2(asked.queries))
    _copy[(asked.tiles, asked.programs, triton.cdiv(asked.queries, rows))](
        *(found, *asked.tensors()),
        *(*asked.numbers(), LOG2E.value),
        ROWS=rows,
        **asked.settings(),
        num_warps=4,
        **chained(str(q.device)),
    )


@triton.jit
def is_young(length, MADE, head, refresh):
    """Whether a row's last choice is read on, and how long the row was then."""
    made = tl.load(MADE + head).to(tl.int32)
    return (made > 0) & (length >= made) & (length - made < refresh), made


@triton.jit
def units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT: tl.constexpr, KEEPS: tl.constexpr):
    """A row's tokens and its units; 0 units, where none need be scored."""
    length = tl.load(LENGTH + head // Hkv).to(tl.int32)
    total = tl.where(length < below, 0, tl.minimum(tl.cdiv(length, UNIT), U))
    if KEEPS:
        young, _ = is_young(length, MADE, head, refresh)
        total = tl.where(young, 0, total)
    return length, total


@triton.jit
def store_scores(SCORES, TOTALS, score, head, queries, row, tile, alive, TILE: tl.constexpr):
    """Of rows `[ROWS, TILE]` of a tile: base 2, -inf beyond the row's end."""
    at = (head * queries + row) * tl.num_programs(0) + tile
    place = SCORES + at[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(place, score, mask=alive[:, None])
    top = tl.max(score, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.sum(tl.exp2(score - base[:, None]), 1)
    tl.store(TOTALS + at, base + tl.log2(mass), mask=alive)


@triton.jit(do_not_specialize="Hkv Q queries U below refresh".split())
def _copy(
    FOUND, SCORES, TOTALS, LENGTH, MADE, HEADS,
    Hkv, Q, queries, U, below: tl.int64, refresh, times,
    ROWS: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
    SOME: tl.constexpr, KEEPS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, total = units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    if tile * TILE >= total:
        return
    unit, row = tile * TILE + tl.arange(0, TILE), tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    alive = row < queries
    inside = alive[:, None] & (unit < total)[None, :]
    at = FOUND + (head * queries + row)[:, None] * U + unit[None, :]
    score = tl.load(at, mask=inside, other=float("-inf")) * times
    store_scores(SCORES, TOTALS, score, head, queries, row, tile, alive, TILE)
