"""Channels: read the tokens whose keys score highest in few channels (Double Sparsity, 2408.07092).

Few channels of a head's keys decide where q · k is large: those where a token's own query times its
key is large on average, which the profiler measures. What is kept of keys and how it is scored,
`labels` says.
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


@register("channels")
@dataclass(frozen=True)
class Channels(Labelled):
    """Share of a row's units read by a decode step, never fewer than `min_pages` pages hold.

    channels: of each key that are kept. data: the plan's table, with the `weight`
    `[layers, kv heads, D]` of each channel. The others: `Labelled`.
    """

    channels: int = 16
    data: str = "channels"

    def __post_init__(self):
        super().__post_init__()
        self._check_size("channels")

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> Channels:
        """With the channels of most weight; of equal ones the lower."""
        weight = layer_of(self.kind, data, "weight", layer)[list(heads)]
        (H, D), n = weight.shape, self.channels
        require(n <= D, f"channels is {n}: keys have {D}, give no more")
        best = weight.sort(dim=1, descending=True, stable=True).indices[:, :n].sort().values
        picked = torch.zeros(H, D, n, dtype=torch.float32).scatter_(1, best[:, None], 1)
        picks = DeviceTensor(picked)  # a product with it picks them
        return replace(self, kept=picks, asked=picks)

    def calibrate(self, seen: Any) -> dict[str, Tensor]:
        """The `weight` `[H, D]`: mean size of a token's own q times k, over tokens and group."""
        q, k = seen.q[0].float(), seen.k[0].float()
        own = q.unflatten(0, (len(k), -1)) * k[:, None]  # [H, group, L, D]
        return {"weight": own.abs().mean((1, 2))}
