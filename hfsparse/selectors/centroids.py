"""Centroids: read the tokens of the clusters of keys that score highest.

Keys are clustered by direction, as in Squeezed Attention (arXiv 2411.09688) and RetroInfer (arXiv
2505.02922): k-means on keys of length 1, centroids are means of the keys as they are. A token is
worth what its centroid is, a unit what its best token is, and the q heads of a group vote with the
softmax over units.

Both papers cluster a prompt once, RetroInfer in segments of 8,192 tokens, and keep newer tokens
apart. Here a `segment` of the row is clustered, and clustered again with each eighth that it grows
by while it is the last; tokens behind that lie in clusters of their own page. So an index depends
on a row's keys and length alone, and can grow, shrink and be moved. A segment of one page, the
default, needs more centroids for as good clusters, and never clusters many keys. Neither the
threshold of the one paper (a share takes its place) nor the other's estimate of what is not read is
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hfsparse.lists import PAGE, PageLists
from hfsparse.precision import exact
from hfsparse.registry import later, require
from hfsparse.selectors.budget import Budget, best_of, products
from hfsparse.selectors.selector import register

PAGE_ROUNDS, ROUNDS = 4, 10  # of k-means, on a page and on a segment of several
SEGMENTS = tuple(PAGE << n for n in range(8))  # tokens


@register("centroids")
@dataclass(frozen=True)
class Centroids:
    """Share of a row's units read by a decode step, never fewer than `min_pages` pages hold.

    refresh, top_p, unit, means: as in `Budget`. clusters: for each 64 keys. segment: tokens of the
    row that are clustered together, one of SEGMENTS.
    """

    share: float = 0.06
    min_pages: int = 16
    refresh: int = 0
    top_p: float = 0.0
    unit: int = 1
    clusters: int = 8
    means: bool = later(False)
    segment: int = later(PAGE)

    def __post_init__(self):
        _ = self.budget  # refuses numbers out of range
        require(
            1 <= self.clusters <= PAGE, f"clusters is {self.clusters}: give 1 to {PAGE} of a page"
        )
        sizes = ", ".join(map(str, SEGMENTS[:-1]))
        require(
            self.segment in SEGMENTS,
            f"segment is {self.segment}: give {sizes} or {SEGMENTS[-1]} tokens",
        )

    @cached_property
    def budget(self) -> Budget:
        return Budget(self.share, self.min_pages, self.refresh, self.top_p, self.unit, self.means)

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> Centroids:
        """The same for all heads of all layers."""
        return self

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Of pages of keys `[B, H, n, PAGE, D]`: `centroid` `[B, H, n, clusters, D]`, and `cluster`
        `[B, H, n, PAGE]`, each token's, counted from its page's first."""
        centroid, cluster = cluster_keys(keys, real, self.clusters, PAGE_ROUNDS)
        return {"centroid": centroid.to(keys.dtype), "cluster": cluster.to(self._index_dtype)}

    def build(self, keys: Tensor) -> dict[str, Tensor]:
        """The same of whole segments, the last one perhaps shorter: a token's cluster may be
        counted among those of other pages."""
        n, each = keys.shape[2], self.segment // PAGE
        parts = keys[:, :, : n - n % each], keys[:, :, n - n % each :]
        sizes = each, n % each
        made = [self._together(*it) for it in zip(parts, sizes, strict=True) if it[0].shape[2]]
        return {name: torch.cat([part[name] for part in made], 2) for name in made[0]}

    def _together(self, keys: Tensor, each: int) -> dict[str, Tensor]:
        """Of segments of `each` pages, `[B, H, n, PAGE, D]`."""
        parts = keys.unflatten(2, (-1, each)).flatten(3, 4)
        real = torch.ones(1, 1, 1, each * PAGE, 1, dtype=torch.bool, device=keys.device)
        centroid, cluster = cluster_keys(parts, real, self.clusters * each, ROUNDS)
        centroid = centroid.unflatten(3, (each, -1)).flatten(2, 3)
        first = torch.arange(each, device=keys.device) * self.clusters
        cluster = (cluster.unflatten(3, (each, PAGE)) - first[:, None]).flatten(2, 3)
        return {"centroid": centroid.to(keys.dtype), "cluster": cluster.to(self._index_dtype)}

    @property
    def _index_dtype(self) -> torch.dtype:
        return torch.uint8 if self.segment == PAGE else torch.int16

    def scores(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> Tensor:
        """What each unit is worth to q `[B, Hq, Q, D]` in nats, `[B, Hq, Q, U]`: its best token."""
        score = products(q, index["centroid"].flatten(2, 3)) * scale  # [B, Hq, Q, P * clusters]
        cluster, n = index["cluster"], score.shape[3]
        first = torch.arange(0, n, self.clusters, device=q.device)[:, None]
        at = (cluster + first).clamp(0, n - 1).flatten(2)  # [B, H, tokens]
        at = at.repeat_interleave(q.shape[1] // at.shape[1], 1)[:, :, None]
        score = score.gather(3, at.expand(-1, -1, q.shape[2], -1))
        return best_of(score, length, 1, self.unit)

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        """Units read by queries q `[B, Hq, Q, D]`, the last Q tokens of rows of `length` [B]."""
        scores = self.scores(q, index, length, scale)
        return self.budget.choose(scores, length, index["cluster"].shape[1])


def cluster_keys(keys: Tensor, real: Tensor, clusters: int, rounds: int) -> tuple[Tensor, Tensor]:
    """k-means of the real keys of each `[..., n, D]` by direction: the means of clusters `[...,
    clusters, D]`, and each key's cluster `[..., n]`.

    real: bool, broadcasts over `keys`. Clusters begin with keys that lie evenly; one that loses all
    of its keys stays where it was.
    """
    whole = exact(keys.masked_fill(~real, 0))
    ways, n = normalize(whole, dim=-1), keys.shape[-2]
    number = torch.arange(clusters, device=keys.device)
    first = number * n // clusters
    centre = ways[..., first, :]
    here = real.expand(*keys.shape[:-1], 1)
    alive = here[..., first, 0]  # clusters that begin with a key
    for left in reversed(range(rounds)):
        near = ways @ centre.mT - centre.square().sum(-1)[..., None, :] / 2
        cluster = near.masked_fill(~alive[..., None, :], -torch.inf).argmax(-1)
        member = ((cluster[..., None] == number) & here).to(ways.dtype).mT  # [..., clusters, n]
        held = member.sum(-1, keepdim=True)
        mean = member @ (ways if left else whole) / held.clamp(min=1)
        centre = torch.where(held > 0, mean, centre)
    return centre, cluster
