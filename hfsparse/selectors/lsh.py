"""Hashing: read the tokens whose keys collide with queries most likely (MagicPIG, 2410.16179).

SimHash: a bit says on which side of a random plane a vector lies, and two vectors at an angle a
agree in it with probability p = 1 - a / pi. In a table of K bits they collide with probability
p^K; a token that collides in two or more of L tables is one of MagicPIG's candidates. Here p is
estimated by the share of all K L bits that agree, a token's score is the logarithm of the
probability that it is a candidate, and a unit's that of its best token; the q heads of a group vote
with the softmax over units. Keys are taken less their mean, which the profiler measures.

MagicPIG reads what happens to collide, and divides each weight of the softmax by the probability of
that, so that the sample stands for all keys. That correction is not made: what is chosen here are
the likeliest tokens, within a budget, and kernels read them as they are. It is a ranking, not an
estimate of what is left out, so the paper's accuracy is not to be expected at the same budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import comb
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from hfsparse.lists import PageLists
from hfsparse.precision import exact
from hfsparse.registry import later, require
from hfsparse.selectors.budget import Budget, best_of
from hfsparse.selectors.selector import register
from hfsparse.selectors.table import DeviceTensor, layer_of

MOST_BITS, MOST_TABLES = 32, 256


@register("lsh")
@dataclass(frozen=True)
class Lsh:
    """Share of a row's units read by a decode step, never fewer than `min_pages` pages hold.

    refresh, top_p, unit, means: as in `Budget`. bits: of a table. tables: how many; a key takes an
    eighth of bits times tables in bytes. seed: of the planes. data: the plan's table, with the
    `mean` `[layers, kv heads, D]` of the keys.
    """

    share: float = 0.06
    min_pages: int = 16
    refresh: int = 0
    top_p: float = 0.0
    unit: int = 16
    bits: int = 8
    tables: int = 16
    seed: int = 0
    data: str = "lsh"
    means: bool = later(False)
    planes: DeviceTensor | None = field(default=None, compare=False, repr=False)  # [H, D, planes]
    side: DeviceTensor | None = field(default=None, compare=False, repr=False)  # [H, planes]
    worth: DeviceTensor | None = field(default=None, compare=False, repr=False)  # [planes + 1]

    def __post_init__(self):
        _ = self.budget  # refuses numbers out of range
        require(1 <= self.bits <= MOST_BITS, f"bits is {self.bits}: give 1 to {MOST_BITS}")
        most = f"give 2 to {MOST_TABLES}"
        require(2 <= self.tables <= MOST_TABLES, f"tables is {self.tables}: {most}")
        total = self.bits * self.tables
        require(total % 8 == 0, f"bits times tables is {total}: give a multiple of 8")

    @cached_property
    def budget(self) -> Budget:
        return Budget(self.share, self.min_pages, self.refresh, self.top_p, self.unit, self.means)

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> Lsh:
        """With planes of these heads, and on which side of each a key at the mean lies."""
        mean = layer_of(self.kind, data, "mean", layer)[list(heads)].float()
        planes = shared_planes(self.seed, tuple(heads), mean.shape[1], self.total)
        side = torch.einsum("hd,hdt->ht", mean, planes.tensor)
        worth = torch.tensor(log_probabilities(self.bits, self.tables), dtype=torch.float32)
        return replace(self, planes=planes, side=DeviceTensor(side), worth=DeviceTensor(worth))

    @property
    def total(self) -> int:
        """Bits of a key."""
        return self.bits * self.tables

    def calibrate(self, seen: Any) -> dict[str, Tensor]:
        """The `mean` `[H, D]` of a prompt's keys."""
        return {"mean": seen.k[0].float().mean(1)}

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        """`hash` `[B, H, n, PAGE, bits * tables / 8]` uint8 of keys `[B, H, n, PAGE, D]`: bit i of
        a byte is set on the positive side of plane i of its eight."""
        planes, side = self._bound(keys)[:2]
        at = torch.einsum("bhptd,hdr->bhptr", exact(keys.masked_fill(~real, 0)), exact(planes))
        return {"hash": packed(at > side[:, None, None])}

    def scores(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> Tensor:
        """What each unit is worth to q `[B, Hq, Q, D]` in nats, `[B, Hq, Q, U]`: its best token."""
        planes, _, worth = self._bound(q)
        theirs = index["hash"].flatten(2, 3)  # [B, H, tokens, bytes]
        B, Hq, Q, D = q.shape
        mine = exact(q).reshape(B, theirs.shape[1], -1, D)
        mine = packed(torch.einsum("bhqd,hdr->bhqr", mine, exact(planes)) > 0)
        apart = ones_in(mine[:, :, :, None] ^ theirs[:, :, None])  # [B, H, group * Q, tokens]
        score = worth[self.total - apart].view(B, Hq, Q, -1)
        return best_of(score, length, 1, self.unit)

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        """Units read by queries q `[B, Hq, Q, D]`, the last Q tokens of rows of `length` [B]."""
        scores = self.scores(q, index, length, scale)
        return self.budget.choose(scores, length, index["hash"].shape[1])

    def _bound(self, beside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        require(self.planes is not None, f"{self.kind} is bound to no table")
        return tuple(t.on(beside.device) for t in (self.planes, self.side, self.worth))


# By seed, kv heads, channels and bits: layers draw alike, so they share one tensor, as long as one
# of them is bound to it.
_PLANES: WeakValueDictionary[tuple, DeviceTensor] = WeakValueDictionary()


def shared_planes(seed: int, heads: tuple[int, ...], dim: int, count: int) -> DeviceTensor:
    """Planes `[heads, dim, count]` of these kv heads."""
    key = seed, heads, dim, count
    found = _PLANES.get(key)
    if found is None:
        planes = torch.stack([drawn_planes(seed, head, dim, count) for head in heads])
        found = _PLANES.setdefault(key, DeviceTensor(planes))
    return found


def drawn_planes(seed: int, head: int, dim: int, count: int) -> Tensor:
    """Normals `[dim, count]` of a kv head's planes, the same in all layers."""
    made = torch.Generator().manual_seed(seed * 4096 + head)
    return torch.randn(dim, count, generator=made, dtype=torch.float32)


@cache
def log_probabilities(bits: int, tables: int) -> tuple[float, ...]:
    """Of two vectors that agree in 0, 1, ... of all bits: the logarithm of the probability that
    they collide in two tables or more; where they can't, of the least that they could."""
    total, number = bits * tables, np.arange(2, tables + 1)
    ways = np.array([comb(tables, n) for n in number.tolist()], dtype=float)
    one = (np.arange(total + 1).clip(min=0.5)[:, None] / total) ** bits  # of one table
    each = ways * one**number * (1 - one) ** (tables - number)
    return tuple(np.log(each.sum(1).clip(min=1e-300)).tolist())


def packed(bits: Tensor) -> Tensor:
    """bool `[..., n]` as uint8 `[..., n / 8]`, the lowest bit first."""
    worth = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unflatten(-1, (-1, 8)) * worth).sum(-1, dtype=torch.uint8)


def ones_in(packs: Tensor) -> Tensor:
    """Bits that are set in uint8 `[..., n]`, counted `[...]`."""
    pairs = packs - (packs >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(-1)
