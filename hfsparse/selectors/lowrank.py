"""Low rank: read the tokens whose keys score highest in few dimensions (Loki, arXiv 2406.02542).

The keys of a head, after RoPE, lie near a space of few dimensions: the principal ones of their
covariance, which the profiler measures. Both sides of q · k are projected onto those (`by: keys`);
what is kept of keys and how it is scored, `labels` says. Loki ranks tokens for each q head and
reads those alone; here the q heads of a group read alike, and the first and the newest page always.

What tells keys best need not tell scores best. `by: scores` knows the queries, too: with second
moments Cq of the group's queries and Ck of the keys, and Cq^½ Ck^½ = U S Vᵀ, keys are kept as
Uᵀ Cq^½ k and asked by Uᵀ Cq^-½ q, the nearest to q · k that rank numbers can be. In the end both
are turned alike, which changes no product, so that all numbers of a label are of a size and few
bits tell them.

Keys have their mean taken off: what the mean adds to scores is the same for all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfsparse.registry import require
from hfsparse.selectors.labels import Labelled
from hfsparse.selectors.selector import register
from hfsparse.selectors.table import DeviceTensor, layer_of


@register("lowrank")
@dataclass(frozen=True)
class LowRank(Labelled):
    """Share of a row's units read by a decode step, never fewer than `min_pages` pages hold.

    rank: numbers that are kept of a key. by: `scores`, those that tell the products with queries
    best; `keys`, those that tell keys best, as Loki has it. data: the plan's table, with second
    moments `[layers, kv heads, D, D]` of `keys` and `queries`. The others: `Labelled`.
    """

    rank: int = 32
    by: str = "scores"
    data: str = "lowrank"

    def __post_init__(self):
        super().__post_init__()
        self._check_size("rank")
        require(self.by in WAYS, f"by is {self.by}: give {' or '.join(WAYS)}")

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> LowRank:
        """With the projections of these heads."""
        keys, queries = (
            layer_of(self.kind, data, name, layer, 2)[list(heads)].double()
            for name in ("keys", "queries")
        )
        dim = keys.shape[-1]
        require(self.rank <= dim, f"rank is {self.rank}: keys have {dim} channels, give no more")
        kept, asked = WAYS[self.by](keys, queries, self.rank)
        turn = waves(self.rank)
        made = (DeviceTensor((t @ turn).float().contiguous()) for t in (kept, asked))
        return replace(self, **dict(zip(("kept", "asked"), made, strict=True)))

    def calibrate(self, seen: Any) -> dict[str, Tensor]:
        """Second moments `[H, D, D]` of a prompt's `keys`, less their mean, and of the `queries` of
        each kv head's group."""
        keys = seen.k[0].float()
        queries = seen.q[0].float().unflatten(0, (len(keys), -1)).flatten(1, 2)
        both = {"keys": keys - keys.mean(1, keepdim=True), "queries": queries}
        return {name: t.mT @ t / t.shape[1] for name, t in both.items()}


def by_keys(keys: Tensor, queries: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The principal dimensions of the keys `[H, D, rank]`, of moments `[H, D, D]`, for both."""
    best = principal(keys, rank)
    return best, best


def by_scores(keys: Tensor, queries: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Projections of keys and of queries whose products are nearest to all q · k, in squares."""
    values, vectors = torch.linalg.eigh(queries)
    least = values.amax(-1, keepdim=True) * 1e-9
    values = values.maximum(least).clamp(min=1e-12).sqrt()[:, None]
    root, inverse = ((vectors * each) @ vectors.mT for each in (values, 1 / values))
    best = principal(root @ keys @ root, rank)
    return root @ best, inverse @ best


WAYS = {"scores": by_scores, "keys": by_keys}


def principal(moments: Tensor, rank: int) -> Tensor:
    """The orthonormal dimensions of largest moment, `[H, D, rank]` of `[H, D, D]`.

    The largest entry of each is positive, so that they are the same wherever they are worked out.
    """
    vectors = torch.linalg.eigh(moments).eigenvectors.flip(-1)[..., :rank]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def waves(n: int) -> Tensor:
    """An orthonormal matrix `[n, n]` that spreads each number over all: the cosine transform's."""
    at = torch.arange(n, dtype=torch.float64)
    found = torch.cos(torch.pi / n * (at + 0.5) * at[:, None]) * (2 / n) ** 0.5
    found[0] /= 2**0.5
    return found
