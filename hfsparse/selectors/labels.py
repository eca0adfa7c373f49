"""Labels: a few numbers that stand for a key, kept in few bits, and what they tell of tokens.

A label is the product of a key with a projection `[D, rank]`. Its product with that of a query and
a projection of queries, which may be another, estimates q · k. A unit is worth what its best token
is, and the q heads of a group vote with the softmax over units.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hfsparse.lists import PageLists
from hfsparse.precision import exact
from hfsparse.registry import later, require
from hfsparse.selectors.budget import Budget, best_of, products
from hfsparse.selectors.table import DeviceTensor

BITS = (4, 8, 16)
STEPS = (2.0**-24, 65504.0)  # the smallest and the largest that float16 has


@dataclass(frozen=True)
class Labelled:
    """A selector that keeps labels: one has its projections by `bind`, from a table of the plan.

    share, min_pages, refresh, top_p, unit, means: as in `Budget`. bits: 4, 8 or 16, of each number.
    """

    share: float = 0.06
    min_pages: int = 16
    refresh: int = 0
    top_p: float = 0.0
    unit: int = 16
    bits: int = 4
    means: bool = later(False)
    # The projections [H, D, rank] of keys, to be kept, and of queries, which ask.
    kept: DeviceTensor | None = field(default=None, compare=False, repr=False)
    asked: DeviceTensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        _ = self.budget  # refuses numbers out of range
        require(self.bits in BITS, f"bits is {self.bits}: give 4, 8 or 16")

    def _check_size(self, name: str) -> None:
        """Raise UsageError unless so many numbers can be kept: `name` is the field that says it."""
        size = getattr(self, name)
        require(size >= 1, f"{name} is {size}: give 1 or more")
        require(self.bits > 4 or size % 2 == 0, f"{name} is {size}: give an even number for 4 bits")

    @cached_property
    def budget(self) -> Budget:
        return Budget(self.share, self.min_pages, self.refresh, self.top_p, self.unit, self.means)

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        """The index of keys `[B, H, n, PAGE, D]`, 0 where they are not real.

        `label` `[B, H, n, PAGE, rank]` int8; of 4 bits `[B, H, n, PAGE, rank / 2]`, whose byte c
        has number c in its low half and number c + rank / 2 in its high half, both signed; of 16
        bits float16, and that is all. `scale` `[B, H, n, PAGE]` float16: what they are times.
        """
        projection = exact(self._on(self.kept, keys))
        found = torch.einsum("bhptd,hdr->bhptr", exact(keys.masked_fill(~real, 0)), projection)
        if self.bits == 16:
            return {"label": found.to(torch.float16)}
        most = (1 << self.bits - 1) - 1
        scale = (found.abs().amax(-1) / most).clamp(*STEPS).to(torch.float16)
        label = (found / scale[..., None]).round().clamp(-most, most).to(torch.int8)
        if self.bits == 4:
            low, high = label.chunk(2, -1)
            label = high << 4 | low & 15
        return {"label": label, "scale": scale}

    def scores(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> Tensor:
        """What each unit is worth to q `[B, Hq, Q, D]` in nats, `[B, Hq, Q, U]`: its best token."""
        label = index["label"].flatten(2, 3)  # [B, H, tokens, rank]
        if self.bits == 4:
            label = torch.cat([label << 4 >> 4, label >> 4], -1)
        group = q.shape[1] // label.shape[1]
        projection = exact(self._on(self.asked, q)).repeat_interleave(group, 0)
        score = products(torch.einsum("bhqd,hdr->bhqr", exact(q), projection), label) * scale
        if self.bits < 16:
            steps = index["scale"].flatten(2).repeat_interleave(group, 1)
            score = score * steps[:, :, None]
        return best_of(score, length, 1, self.unit)

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        """Units read by queries q `[B, Hq, Q, D]`, the last Q tokens of rows of `length` [B]."""
        scores = self.scores(q, index, length, scale)
        return self.budget.choose(scores, length, index["label"].shape[1])

    def _on(self, projection: DeviceTensor | None, beside: Tensor) -> Tensor:
        require(projection is not None, f"{self.kind} is bound to no table")
        return projection.on(beside.device)
