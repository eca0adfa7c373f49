"""What attention needs of a plan, for one layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np
from torch import Tensor

from hfsparse.lists import FAR, FULL, HeadIndex
from hfsparse.plan import Below
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.layer import Layer
from hfsparse.runtime.counts import Counts
from hfsparse.stats import Work


@dataclass
class LayerPlan:
    """What the attention function needs of a plan, for one layer; set on the attention module."""

    owner: str
    index: int
    kv_heads: int
    prefill: tuple[Any, ...]  # a q head's pattern, None: full
    groups: tuple[Group, ...]  # kv heads by how their cache is kept and read
    rings: frozenset[int]  # kv heads whose cache the plan makes a ring
    below: Below
    skip: float | None  # prompts: how far below the running maximum a tile is left out
    window: int | None  # the model's own sliding window
    counts: Counts
    leads: bool  # the first layer: counts the decode steps of all
    steps: Counter[tuple[int, int]]  # how often a row came to n tokens with m new ones
    # The profiler's eye: sees q, k, v; may answer a function that sees the output, and that may
    # answer another output
    observe: Any = None
    fusing: bool = False  # the model is being compiled: one operator stands for attention
    source: LayerPlan | None = None  # the layer whose choice of pages some heads read
    shared: bool = False  # whether others read what this one chooses
    at: HeadIndex = field(default_factory=HeadIndex)  # one for all layers of a patch

    def new_cache(self, reserve: int = 0, expected: int = 0) -> Layer:
        below = self.below.cache if self.window is None else 0
        more = reserve, expected, self.window, self.below.decode, self.index, self.at
        return Layer(self.owner, self.groups, below, *more)

    def reads(self) -> Work:
        """Keys that decode steps read, by kv head; nan where only a run tells them, and none was.

        Dense attention reads all, or those in the model's window.
        """
        keys = [0] * self.kv_heads
        if not self.steps:
            return Work(keys, keys)
        length, new, times = (
            np.array(x) for x in zip(*((*at, t) for at, t in self.steps.items()), strict=True)
        )
        total = np.minimum(length, self.window or FAR)
        for group in self.groups:
            limit = self.below.decode if group.band == FULL else self.below.cache
            if group.reuses:
                chosen = self.source.reads().done
                for head in group.heads:
                    keys[head] = chosen[head]
                continue
            if group.selector is not None and group.selector.budget.counted:
                whole = (np.where(length < limit, length, 0) * times).sum()
                for head, read in zip(group.heads, self.counts.keys_read(group.heads), strict=True):
                    keys[head] = int(whole + read) or nan
                continue
            if group.selector is not None:
                read = group.selector.budget.reads(length, new)
            elif group.band == FULL:
                read = length
            else:
                read = np.minimum(length, group.band.sink + group.band.span(length - 1))
            if group.band == FULL or self.window is None:
                read = np.where(length < limit, length, read)
            for head in group.heads:
                keys[head] = int((np.minimum(read, total) * times).sum())
        return Work(keys, [int((total * times).sum())] * self.kv_heads)


@dataclass(frozen=True)
class Logits:
    """How a model turns q · k into logits."""

    scale: float
    softcap: float | None
    s_aux: Tensor | None  # [Hq] sink logits

    def of(self, at: slice | Tensor = slice(None)) -> dict[str, Any]:
        """Keyword arguments for a kernel that serves these q heads."""
        if not self.special:
            return {"scale": self.scale}
        sinks = self.s_aux if self.s_aux is None else self.s_aux[at]
        return {"scale": self.scale, "softcap": self.softcap, "s_aux": sinks}

    @property
    def special(self) -> bool:
        return self.softcap is not None or self.s_aux is not None
