"""Low rank: read the tokens whose keys score highest in few dimensions (Loki, arXiv 2406.02542).

The keys of a head, after RoPE, lie near a space of few dimensions: the principal ones of their
covariance, which the profiler measures. Both sides of q · k are projected onto those; what is kept
of keys and how it is scored, `labels` says. Loki ranks tokens for each q head and reads those
alone; here the q heads of a group read alike, and the first and the newest page always.

The covariance has the mean key taken off: what the mean adds to scores is the same for all keys.
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

    rank: dimensions that keys are projected onto. data: the plan's table, with `covariance`
    `[layers, kv heads, D, D]` of the keys. The others: `Labelled`.
    """

    rank: int = 16
    data: str = "lowrank"

    def __post_init__(self):
        super().__post_init__()
        self._check_size("rank")

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> LowRank:
        """With the principal dimensions of these heads' keys."""
        covariance = layer_of(self.kind, data, "covariance", layer)[list(heads)]
        dim = covariance.shape[-1]
        require(self.rank <= dim, f"rank is {self.rank}: keys have {dim} channels, give no more")
        return replace(self, projection=DeviceTensor(principal(covariance, self.rank)))

    def calibrate(self, seen: Any) -> dict[str, Tensor]:
        """The `covariance` `[H, D, D]` of a prompt's keys."""
        keys = seen.k[0].float()
        keys = keys - keys.mean(1, keepdim=True)
        return {"covariance": keys.mT @ keys / keys.shape[1]}


def principal(covariance: Tensor, rank: int) -> Tensor:
    """The orthonormal dimensions of most variance, `[H, D, rank]` float32 of `[H, D, D]`.

    The largest entry of each is positive, so that they are the same wherever they are worked out.
    """
    vectors = torch.linalg.eigh(covariance.double()).eigenvectors.flip(-1)[..., :rank]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return (vectors * largest.sign()).float().contiguous()
