"""A selector of the tests' own: Double Sparsity's label channels (arXiv 2408.07092).

Of each key it keeps the few channels that weigh most in products q · k, as a table made offline
tells. A page is worth what the best of its keys is. It stands for any selector that keeps an index
of its own and is bound to a table; the tests register it (`known`), plans of users don't know it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from hfsparse.lists import PAGE, PageLists
from hfsparse.plan import Below, ModelId, Plan
from hfsparse.plan.files import DataFile
from hfsparse.precision import exact
from hfsparse.registry import Registry, require
from hfsparse.selectors import SELECTORS, Budget, DeviceTensor
from hfsparse.selectors.budget import votes
from tests import frozen
from tests.patcher.families import own_window
from tests.patterns import matrix

KIND = "channels"


@Registry("pages").register(KIND)
@dataclass(frozen=True)
class Channels:
    share: float = 0.06
    min_pages: int = 16
    refresh: int = 0
    top_p: float = 0.0
    count: int = 4  # label channels of each kv head
    data: str = "channels"
    labels: DeviceTensor | None = field(default=None, compare=False, repr=False)  # [H, count]

    def __post_init__(self):
        _ = self.budget
        require(self.count >= 1, f"count is {self.count}: give 1 or more channels")

    @cached_property
    def budget(self) -> Budget:
        return Budget(self.share, self.min_pages, self.refresh, self.top_p)

    def bind(self, layer: int, heads: Sequence[int], data: dict[str, Tensor] | None) -> Channels:
        weight = (data or {}).get("weight")  # [layers, kv heads, D]
        require(
            weight is not None, "channels needs a table with weight: hfsparse profile makes one"
        )
        require(layer < len(weight), f"its table has {len(weight)} layers, not layer {layer}")
        best = weight[layer, list(heads)].sort(dim=1, descending=True, stable=True).indices
        return replace(self, labels=DeviceTensor(best[:, : self.count].sort().values))

    def calibrate(self, seen) -> dict[str, Tensor]:
        q, k = (t[0].float().abs().mean(1) for t in (seen.q, seen.k))
        return {"weight": k * q.view(len(k), -1, q.shape[1]).mean(1)}

    def summarise(self, keys: Tensor, real: Tensor) -> dict[str, Tensor]:
        at = self._labels(keys.device)[:, None, None].expand(*keys.shape[:4], -1)
        return {"labels": keys.gather(4, at).masked_fill(~real, 0)}

    def pages(self, q: Tensor, index: dict[str, Tensor], length: Tensor, scale: float) -> PageLists:
        labels = index["labels"]  # [B, H, P, PAGE, count]
        (B, _, Q, D), (H, P) = q.shape, labels.shape[1:3]
        at = self._labels(q.device)[:, None, None].expand(B, H, q.shape[1] // H, Q, -1)
        q = q.view(B, H, -1, Q, D).gather(4, at)
        score = torch.einsum("bhgqc,bhptc->bhgqpt", exact(q), exact(labels)).float() * scale
        beyond = torch.arange(P * PAGE, device=q.device).view(P, PAGE) >= length[:, None, None]
        score = score.masked_fill(beyond[:, None, None, None], -torch.inf).amax(5)
        return self.budget.best(votes(score.flatten(1, 2), length, H), length, Q)

    def _labels(self, device: torch.device) -> Tensor:
        require(self.labels is not None, "channels is bound to no table")
        return self.labels.on(device)


def oracle(selector: Channels, q, k, scale: float, table, head: int) -> np.ndarray:
    """Each page's vote, from the keys: see `matrix`."""
    heavy = np.argsort(-table["weight"][0, head].double().numpy(), kind="stable")[: selector.count]
    score = q[..., heavy] @ k[:, heavy].T * scale  # [group, Q, n]
    pages = np.array_split(score, range(PAGE, len(k), PAGE), axis=2)
    return matrix.largest_share(np.stack([page.max(2) for page in pages], 2))


def plan_of(model, selector: Any, below: int = 0) -> Plan:
    """Full caches, every kv head of every layer that may be sparse reads what a selector chooses.

    Any selector: one that reads a table is given one.
    """
    this = ModelId.of(model)
    full = Plan.full(this).layers[0]
    mine = replace(full, decode=("it",) * this.kv_heads)
    layers = tuple(full if windowed else mine for windowed in own_window(model))
    drawn = table(this.layers, this.kv_heads, this.head_dim)
    named = getattr(selector, "data", None)
    data = {} if named is None else {named: DataFile.of(f"{named}.safetensors", drawn)}
    return Plan(this, {"it": selector}, layers, Below(decode=below), data=data)


def labelled(model) -> Plan:
    """Three pages, of which one is chosen, by labels."""
    return plan_of(model, Channels(0.06, 3, count=3))


def refreshed(model) -> Plan:
    """By labels, and read again by three more steps; top_p."""
    return plan_of(model, Channels(0.9, 2, refresh=4, top_p=0.6, count=3))


def compare(*args, **more):
    """`frozen.compare` where plans may name channels."""
    with known():
        return frozen.compare(*args, **more)


def table(layers: int = 1, heads: int = 2, dim: int = 8) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(5)
    return {"weight": torch.rand(layers, heads, dim, generator=made)}


ROW = matrix.SelectorRow(
    {
        "channels": Channels(0.2, 2, count=3),
        "channels_all": Channels(1.0, 2, count=2),
        "channels_top_p": Channels(0.7, 2, top_p=0.5, count=4),
    },
    oracle,
    table(),
)


@contextmanager
def known() -> Iterator[None]:
    """Plans may name it, and the oracles know it."""
    with patch.dict(SELECTORS, {KIND: Channels}), patch.dict(matrix.SELECTOR_ROWS, {KIND: ROW}):
        yield
