"""Landmarks: read the chunks whose mean key scores highest (ShadowKV, arXiv 2410.21465).

A chunk is 8 tokens of a row; its landmark is the mean of its keys, after RoPE. Where keys of a
chunk point elsewhere than their mean, it says little of them: the outliers, chunks of a row in
which a key's cosine to the mean is lowest, come before all others. The q heads of a group vote with
the softmax over units, whose best chunk speaks for them.

ShadowKV chooses 48 outliers once, behind the prompt, and beside the budget; here they are a share
of the row as it is and take their part of the budget. Keys stay as they are: no low-rank copy of
them is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hfsparse.lists import UNITS, PageLists
from hfsparse.precision import exact
from hfsparse.registry import later, require
from hfsparse.selectors.budget import Budget, best_of, beyond, products
from hfsparse.selectors.selector import register
from hfsparse.shares import ratio, share_of

CHUNK = 8  # tokens of a landmark


@register("landmarks")
@dataclass(frozen=True)
class Landmarks:
    """Share of a row's units read by a decode step, never fewer than `min_pages` pages hold.

    refresh, top_p, means: as in `Budget`. unit: tokens that are read together, one or more chunks
    of 8. outliers: share of a row's chunks that come before all others; 0: none.
    """

    share: float = 0.06
    min_pages: int = 16
    refresh: int = 0
    top_p: float = 0.0
    unit: int = CHUNK
    outliers: float = 0.003
    means: bool = later(False)

    def __post_init__(self):
        _ = self.budget  # refuses numbers out of range
        given = [unit for unit in UNITS if unit >= CHUNK]
        require(self.unit in given, f"unit is {self.unit}: give one of {given} tokens")
        require(0 <= self.outliers <= 1, f"outliers is {self.outliers}: give a share, 0 to 1")

    @cached_property
    def budget(self) -> Budget:
        return Budget(self.share, self.min_pages, self.refresh, self.top_p, self.unit, self.means)

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> Landmarks:
        """The same for all heads of all layers."""
        return self

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Of each chunk of keys `[B, H, n, PAGE, D]`: `landmark` `[B, H, n, PAGE / 8, D]`, and
        `cosine` `[B, H, n, PAGE / 8]` float32, the smallest of its keys to the landmark."""
        chunks = exact(keys.masked_fill(~real, 0)).unflatten(3, (-1, CHUNK))
        real = real.unflatten(3, (-1, CHUNK))
        mean = chunks.sum(4, keepdim=True) / real.sum(4, keepdim=True).clamp(min=1)
        size = chunks.norm(dim=-1) * mean.norm(dim=-1)
        cosine = (chunks * mean).sum(-1) / size.clamp(min=torch.finfo(torch.float32).tiny)
        cosine = cosine.masked_fill(~real[..., 0], 1).amin(-1).float()
        return {"landmark": mean[..., 0, :].to(keys.dtype), "cosine": cosine}

    def scores(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> Tensor:
        """What each unit is worth to q `[B, Hq, Q, D]` in nats, `[B, Hq, Q, U]`: its best chunk.

        Outliers are worth as much as the best.
        """
        cosine = index["cosine"].flatten(2)  # [B, H, chunks]
        score = products(q, index["landmark"].flatten(2, 3)) * scale
        past = beyond(length, CHUNK, cosine.shape[2])[:, None]
        score = score.masked_fill(past[:, None], -torch.inf)
        lowest = cosine.masked_fill(past, torch.inf).sort(dim=-1, stable=True).indices
        number = share_of((~past).sum(-1, keepdim=True), *ratio(self.outliers))  # [B, 1, 1]
        counted = torch.arange(past.shape[-1], device=q.device) < number
        first = torch.zeros_like(lowest, dtype=torch.bool)
        first = first.scatter(2, lowest, counted.expand_as(lowest))
        first = first.repeat_interleave(q.shape[1] // cosine.shape[1], 1)[:, :, None]
        score = torch.where(first, score.amax(-1, keepdim=True), score)
        return best_of(score, length, CHUNK, self.unit)

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        """Units read by queries q `[B, Hq, Q, D]`, the last Q tokens of rows of `length` [B]."""
        scores = self.scores(q, index, length, scale)
        return self.budget.choose(scores, length, index["cosine"].shape[1])
