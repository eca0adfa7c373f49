"""Centroids: read the tokens of the clusters of keys that score highest, page by page.

Each page's keys are clustered by direction, as Squeezed Attention (arXiv 2411.09688) and RetroInfer
(arXiv 2505.02922) cluster a whole prompt's: k-means on keys of length 1, centroids are means of the
keys as they are. A token is worth what its centroid is, a unit what its best token is, and the q
heads of a group vote with the softmax over units.

Both papers cluster over all of a prompt, once. What the cache keeps of a page depends on that page
alone, so that it can grow, shrink and be moved; clusters here end with their page, and a keys'
neighbour on another page has a centroid of its own. That costs more centroids for as good clusters.
Neither the threshold of the one (a share takes its place) nor the other's estimate of what is not
read is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from hfsparse.lists import PAGE, PageLists
from hfsparse.precision import exact
from hfsparse.registry import later, require
from hfsparse.selectors.budget import Budget, best_of, products
from hfsparse.selectors.selector import register

ROUNDS = 4  # of k-means


@register("centroids")
@dataclass(frozen=True)
class Centroids:
    """Share of a row's units read by a decode step, never fewer than `min_pages` pages hold.

    refresh, top_p, unit, means: as in `Budget`. clusters: of each page's 64 keys.
    """

    share: float = 0.06
    min_pages: int = 16
    refresh: int = 0
    top_p: float = 0.0
    unit: int = 1
    clusters: int = 8
    means: bool = later(False)

    def __post_init__(self):
        _ = self.budget  # refuses numbers out of range
        require(
            1 <= self.clusters <= PAGE, f"clusters is {self.clusters}: give 1 to {PAGE} of a page"
        )

    @cached_property
    def budget(self) -> Budget:
        return Budget(self.share, self.min_pages, self.refresh, self.top_p, self.unit, self.means)

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> Centroids:
        """The same for all heads of all layers."""
        return self

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Of pages of keys `[B, H, n, PAGE, D]`: `centroid` `[B, H, n, clusters, D]`, and `cluster`
        `[B, H, n, PAGE]` uint8, each token's."""
        whole = exact(keys.masked_fill(~real, 0))
        ways = normalize(whole, dim=-1)
        first = torch.arange(self.clusters, device=keys.device) * PAGE // self.clusters
        centre = ways[..., first, :]
        here = real.expand(*keys.shape[:4], 1)
        alive = here[..., first, 0]  # clusters that begin with a token
        for left in reversed(range(ROUNDS)):
            near = ways @ centre.mT - centre.square().sum(-1)[..., None, :] / 2
            cluster = near.masked_fill(~alive[..., None, :], -torch.inf).argmax(-1)
            member = (one_hot(cluster, self.clusters) * here).to(ways.dtype).mT  # [..., c, PAGE]
            number = member.sum(-1, keepdim=True)
            mean = member @ (ways if left else whole) / number.clamp(min=1)
            centre = torch.where(number > 0, mean, centre)
        return {"centroid": centre.to(keys.dtype), "cluster": cluster.to(torch.uint8)}

    def scores(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> Tensor:
        """What each unit is worth to q `[B, Hq, Q, D]` in nats, `[B, Hq, Q, U]`: its best token."""
        score = products(q, index["centroid"].flatten(2, 3)) * scale
        score = score.unflatten(3, (-1, self.clusters))  # [B, Hq, Q, P, clusters]
        at = index["cluster"].clamp(max=self.clusters - 1).long()
        at = at.repeat_interleave(q.shape[1] // at.shape[1], 1)[:, :, None]
        score = score.gather(4, at.expand(-1, -1, q.shape[2], -1, -1))
        return best_of(score.flatten(3), length, 1, self.unit)

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        """Units read by queries q `[B, Hq, Q, D]`, the last Q tokens of rows of `length` [B]."""
        scores = self.scores(q, index, length, scale)
        return self.budget.choose(scores, length, index["cluster"].shape[1])
