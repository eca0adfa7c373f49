"""What attention needs of a plan, for one layer, and where a patch leaves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import nan
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hfsparse.lists import FAR, FULL, PAGE, HeadIndex
from hfsparse.lists.pages import passed_pages
from hfsparse.plan import Below
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.cache.part import PartLayer
from hfsparse.runtime.cache.stateful import StatefulCacheLayer
from hfsparse.runtime.counts import Counts
from hfsparse.runtime.extend import Extension
from hfsparse.runtime.parts import ContextParallel
from hfsparse.runtime.routes import Cases
from hfsparse.stats import Work

NAME = "_hfsparse_layer"  # an attribute of patched attention modules; decoders have `_hfsparse`


@dataclass
class Mode:
    """How the layers of one patch run for the time being."""

    # The profiler's eye, `(module, q, k, v, logits)`: may answer a function that sees the output,
    # and that may answer another output.
    observe: Callable[..., Callable[[Tensor], Tensor | None] | None] | None = None
    fusing: bool = False  # the model is being compiled: one operator stands for attention


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerPlan:
    """What the attention function needs of a plan, for one layer."""

    owner: str
    index: int
    kv_heads: int
    prefill: tuple[Any, ...]  # a q head's pattern, None: full
    groups: tuple[Group, ...]  # kv heads by how their cache is kept and read
    cases: Cases  # prompts: routes of all heads
    store_cases: tuple[Cases, ...]  # chunks behind a past: of each group's heads
    below: Below
    skip: float | None  # prompts: how far below the running maximum a tile is left out
    window: int | None  # the model's own sliding window, or the size of its chunks
    chunked: bool  # tokens see no further back than their chunk's first
    has_state: bool  # beside its keys, as no plan changes it
    counts: Counts
    leads: bool  # the first layer with these steps: counts them
    source: LayerPlan | None  # the layer whose choice of pages some heads read
    shared: bool  # whether others read what this one chooses
    producer: LayerPlan | None  # the layer whose keys it reads; None: it makes and keeps its own
    last_reader: int | None  # the last layer that reads its keys
    extension: Extension | None  # how rows are read that are too long for the model
    draft: LayerPlan | None = None  # in exact mode, where this one reads all keys: what drafts read
    context: ContextParallel | None = None  # how ranks share a row's tokens; None: they don't
    # How often a row came to n tokens with m new ones, where full stores here hold so many of the
    # n; layers that read others' keys may get fewer queries, and have their own.
    steps: Counter[tuple[int, int, int]]
    # One of each for all layers of a patch:
    at: HeadIndex
    mode: Mode
    # Its index, as what is compiled for one layer and serves many is given it.
    number: Tensor = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "number", torch.tensor(self.index, device="cpu"))

    @cached_property
    def sliding_window(self) -> int | None:
        """What the model's calls say of it: nothing of chunks."""
        return None if self.chunked else self.window

    @cached_property
    def rank(self) -> int:
        """Of the latents that its cache holds (MLA); 0: it holds keys and values."""
        return self.groups[0].rank

    @cached_property
    def key_heads(self) -> int:
        """Heads of the keys that attention is given: latents are expanded for each q head."""
        return self.counts.q_heads if self.rank else self.kv_heads

    @property
    def free(self) -> bool:
        """Whether it may be sparse."""
        return self.window is None

    @property
    def alone(self) -> bool:
        """Whether it may be sparse, and binds no other layer, nor is bound."""
        return self.free and self.producer is None and self.last_reader is None

    @property
    def packs(self) -> bool:
        """Whether some kv heads keep numbers in fewer bits than they come in."""
        return any(group.bits != 16 for group in self.groups)

    @property
    def hosts(self) -> bool:
        """Whether some kv heads keep their keys in host memory."""
        return any(group.hot for group in self.groups)

    @cached_property
    def may_wait(self) -> bool:
        """Whether prompts may wait before they are stored: not where an eviction ranks keys by
        their queries, nor where host memory takes them."""
        return not any(group.eviction or group.hot for group in self.groups)

    @cached_property
    def plain_heads(self) -> dict[tuple[bool, bool], tuple[int, ...]]:
        """All q heads, by the cases of `cases` in which they all read every key, and nothing else
        is to be done for a prompt."""
        own = self.window is None and self.producer is None and self.extension is None
        own = own and self.context is None and not self.rank and self.may_wait
        cases = self.cases.items() if own else ()
        return {case: routes.heads for case, routes in cases if routes.listed is None}

    @property
    def evicting(self) -> int:
        """How many kv heads of its own keep what an eviction chooses."""
        own = self.groups if self.producer is None else ()
        return sum(len(group.heads) for group in own if group.eviction is not None)

    def extends(self, tokens: int) -> Extension | None:
        """How a row of so many tokens is read, if it is too long for the model."""
        extension = self.extension
        return extension if extension is not None and extension.rule.changes(tokens) else None

    @property
    def means(self) -> bool:
        """Whether steps read what some heads leave out by its means."""
        return any(group.means for group in self.groups)

    def new_cache(self, reserve: int = 0, expected: int = 0) -> CacheLayer:
        below = self.below.cache if self.window is None else 0
        more = reserve, expected, self.window, self.below.decode, self.index, self.at
        kind = StatefulCacheLayer if self.has_state else CacheLayer
        kind = kind if self.context is None else PartLayer
        return kind(self.owner, (self.draft or self).groups, below, *more)

    def reads(self) -> Work:
        """Keys that decode steps read, by kv head; nan where only a run tells them, and none was.

        Dense attention reads all, or those in the model's window or chunk.
        """
        keys = [0] * self.kv_heads
        if not self.steps:
            return Work(keys, keys)
        length, new, held, times = (
            np.array(x) for x in zip(*((*at, t) for at, t in self.steps.items()), strict=True)
        )
        total = np.minimum(length, self.window or FAR)
        if self.chunked:
            total = (length - 1) % self.window + 1
        for group in self.groups:
            limit = self.below.decode if group.band == FULL else self.below.cache
            own = held if group.band == FULL else length
            if group.reuses:
                chosen = self.source.reads().done
                for head in group.heads:
                    keys[head] = chosen[head]
                continue
            if group.eviction is not None:
                for head, read in zip(group.heads, self.counts.keys_read(group.heads), strict=True):
                    keys[head] = int(read) or nan
                continue
            if group.selector is not None and group.selector.budget.counted:
                whole = (np.where(own < limit, own, 0) * times).sum()
                for head, read in zip(group.heads, self.counts.keys_read(group.heads), strict=True):
                    keys[head] = int(whole + read) or nan
                continue
            if group.selector is not None:
                read = group.selector.budget.reads(own, new)
            elif group.reads != FULL:
                read = own - PAGE * passed_pages(group.reads, own)
            elif group.band == FULL:
                read = own
            else:
                read = np.minimum(length, group.band.sink + group.band.span(length - 1))
            if group.band == FULL or self.window is None:
                read = np.where(own < limit, own, read)
            for head in group.heads:
                keys[head] = int((np.minimum(read, total) * times).sum())
        return Work(keys, [int((total * times).sum())] * self.kv_heads)


def put_layer_plan(module: nn.Module, layer_plan: LayerPlan) -> None:
    """Leave what a patch says of an attention module on it."""
    setattr(module, NAME, layer_plan)


def drop_layer_plan(module: nn.Module) -> None:
    """Take it away again, where there is one."""
    vars(module).pop(NAME, None)


def layer_plan_of(module: nn.Module) -> LayerPlan | None:
    """What a patch left on an attention module; None: no patch is on it."""
    return getattr(module, NAME, None)


def layer_plans_of(model: nn.Module) -> list[LayerPlan]:
    """Of a patched model, or a part of one: what the patch left on its modules, in layer order."""
    found = [vars(module)[NAME] for module in model.modules() if NAME in vars(module)]
    return sorted(found, key=lambda layer_plan: layer_plan.index)


@contextmanager
def observed(model: nn.Module, observe: Callable) -> Iterator[None]:
    """Show a patched model's attention to `observe`, as `Mode.observe` says."""
    mode = layer_plans_of(model)[0].mode
    mode.observe = observe
    try:
        yield
    finally:
        mode.observe = None


class Logits(NamedTuple):
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

    def part(self, low: int) -> Logits:
        """Of the keys from position `low` on, a part of a row: sink logits count once."""
        return self._replace(s_aux=None) if low else self

    @property
    def special(self) -> bool:
        return self.softcap is not None or self.s_aux is not None
