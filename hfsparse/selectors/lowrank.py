"""Low rank: read the tokens whose keys score highest in few dimensions (Loki, arXiv 2406.02542).

The keys of a head, after RoPE, lie near a space of few dimensions: the principal ones of their
covariance, which the profiler measures. Both sides of q · k are projected onto those; keys are
kept so in few bits (`labels`). A unit is worth what its best token is, and the q heads of a group
vote with the softmax over units. Loki ranks for each q head by itself; here a group reads alike.

Loki takes the principal dimensions of the keys alone (`by: keys`). `by: scores` takes those in
which the products with the head's queries vary most, which is the best approximation of the scores
of that rank: of Cq^½ Ck^½ = U S Vᵀ, for second moments Cq of the queries and Ck of the keys, keys
are kept as Uᵀ Cq^½ k and asked by Uᵀ Cq^-½ q. Both are rotated alike, which changes no product, so
that all numbers of a label are of a size and few bits tell them.

Keys have their mean taken off: what the mean adds to scores is the same for all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hfsparse.lists import PageLists
from hfsparse.registry import require
from hfsparse.selectors import labels
from hfsparse.selectors.budget import Budget, best_of
from hfsparse.selectors.selector import register
from hfsparse.selectors.table import DeviceTensor, layer_of


@register("lowrank")
@dataclass(frozen=True)
class LowRank:
    """Share of a row's units read by a decode step, never fewer than `min_pages` pages hold.

    refresh, top_p, unit: as in `Budget`. rank: dimensions that keys are projected onto. bits: 4, 8
    or 16, of each number that is kept. data: the plan's table, with `covariance`
    `[layers, kv heads, D, D]` of the keys.
    """

    share: float = 0.06
    min_pages: int = 16
    refresh: int = 0
    top_p: float = 0.0
    unit: int = 16
    rank: int = 16
    bits: int = 8
    by: str = "scores"
    data: str = "lowrank"
    # Projections of queries and of keys, [H, D, rank]
    asked: DeviceTensor | None = field(default=None, compare=False, repr=False)
    kept: DeviceTensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        _ = self.budget  # refuses numbers out of range
        labels.check("rank", self.rank, self.bits)
        require(self.by in ("keys", "scores"), f"by is {self.by}: give keys or scores")

    @cached_property
    def budget(self) -> Budget:
        return Budget(self.share, self.min_pages, self.refresh, self.top_p, self.unit)

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> LowRank:
        """With the principal dimensions of these heads' keys."""
        keys, queries = (
            layer_of(self.kind, data, name, layer)[list(heads)].double()
            for name in ("keys", "queries")
        )
        dim = keys.shape[-1]
        require(self.rank <= dim, f"rank is {self.rank}: keys have {dim} channels, give no more")
        if self.by == "keys":
            both = DeviceTensor(principal(keys, self.rank).float().contiguous())
            return replace(self, asked=both, kept=both)
        asked, kept = of_scores(queries, keys, self.rank)
        return replace(self, asked=DeviceTensor(asked), kept=DeviceTensor(kept))

    def calibrate(self, seen: Any) -> dict[str, Tensor]:
        """Second moments `[H, D, D]` of a prompt's `keys`, less their mean, and of the `queries` of
        each kv head's group."""
        keys = seen.k[0].double()
        keys = keys - keys.mean(1, keepdim=True)
        queries = seen.q[0].double().reshape(len(keys), -1, keys.shape[2])
        pairs = {"keys": keys, "queries": queries}
        return {name: t.mT @ t / t.shape[1] for name, t in pairs.items()}

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Labels, as `selectors.labels` describes them."""
        return labels.labels(keys, real, self._on(self.kept, keys), self.bits)

    def scores(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> Tensor:
        """What each unit is worth to q `[B, Hq, Q, D]` in nats, `[B, Hq, Q, U]`: its best token."""
        score = labels.token_scores(q, index, self._on(self.asked, q), self.bits) * scale
        return best_of(score, length, 1, self.unit)

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        """Units read by queries q `[B, Hq, Q, D]`, the last Q tokens of rows of `length` [B]."""
        scores = self.scores(q, index, length, scale)
        return self.budget.choose(scores, length, index["label"].shape[1])

    def _on(self, projection: DeviceTensor | None, beside: Tensor) -> Tensor:
        require(projection is not None, f"{self.kind} is bound to no table")
        return projection.on(beside.device)


def principal(moments: Tensor, rank: int) -> Tensor:
    """The orthonormal dimensions of largest moment, `[H, D, rank]` of `[H, D, D]`.

    The largest entry of each is positive, so that they are the same wherever they are worked out.
    """
    vectors = torch.linalg.eigh(moments).eigenvectors.flip(-1)[..., :rank]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def of_scores(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Projections of queries and keys `[H, D, rank]` float32, of moments `[H, D, D]`, float64."""
    values, vectors = torch.linalg.eigh(queries)
    values = values.clamp(min=1e-12).maximum(values.amax(-1, keepdim=True) * 1e-9).sqrt()[:, None]
    root, inverse = ((vectors * t) @ vectors.mT for t in (values, 1 / values))
    best = principal(root @ keys @ root, rank) @ cosines(rank)  # U of the singular values
    return (inverse @ best).float().contiguous(), (root @ best).float().contiguous()


def cosines(n: int) -> Tensor:
    """An orthonormal matrix `[n, n]` that spreads each entry over all: of the cosine transform."""
    at = torch.arange(n, dtype=torch.float64)
    waves = torch.cos(torch.pi / n * (at + 0.5) * at[:, None]) * (2 / n) ** 0.5
    waves[0] /= 2**0.5
    return waves
