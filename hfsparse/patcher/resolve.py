"""From a plan to what each layer needs of it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hfsparse.errors import PlanError
from hfsparse.kernels.rows import q_heads_of
from hfsparse.lists import FULL, Band, HeadIndex
from hfsparse.models.loading import device_name
from hfsparse.plan import Below, Plan
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.counts import Counts
from hfsparse.runtime.layer_plan import LayerPlan, Mode
from hfsparse.runtime.routes import Cases, routes_by_case
from hfsparse.selectors.reuse import Reuse


def resolve_below(plan: Plan, device: torch.device) -> Below:
    """The plan's thresholds; for prompts what `hfsparse bench --write` measured on this device."""
    found: Any = plan.measured
    for key in (device_name(device), "below", "prefill"):
        found = found.get(key) if isinstance(found, dict) else None
    return replace(plan.below, prefill=found) if isinstance(found, int) else plan.below


def resolve_layers(
    plan: Plan, indices: Sequence[int], windows: Sequence[int | None], below: Below
) -> list[LayerPlan]:
    """Of the layers `indices`, which have attention; windows: each layer's own, in tokens."""
    owner, steps, at, mode = uuid.uuid4().hex, Counter(), HeadIndex(), Mode()
    sources, made = _sources(plan, indices), {}
    for index in indices:
        source = made.get(sources.get(index))
        groups = _groups(plan, index, windows[index], source)
        made[index] = LayerPlan(
            owner,
            index,
            plan.model.kv_heads,
            tuple(plan.patterns.get(word) for word in plan.layers[index].prefill),
            groups,
            _cases(plan, index, range(plan.model.kv_heads)),
            tuple(_cases(plan, index, g.heads, ranked=g.band == FULL) for g in groups),
            below,
            plan.skip,
            windows[index],
            Counts(plan.model.q_heads),
            leads=not made,
            source=source,
            shared=index in sources.values(),
            steps=steps,
            at=at,
            mode=mode,
        )
    return [*made.values()]


def _sources(plan: Plan, indices: Sequence[int]) -> dict[int, int]:
    """For layers that read another's choice of pages, that one: the last before them to choose."""
    last, found = None, {}
    for index in indices:
        selectors = [_selector(plan, word) for word in plan.layers[index].decode]
        reuses = [isinstance(each, Reuse) for each in selectors if each is not None]
        if any(reuses):
            found[index] = last
        if not all(reuses):
            last = index
    return found


def _groups(
    plan: Plan, index: int, window: int | None, source: LayerPlan | None
) -> tuple[Group, ...]:
    """A layer's kv heads by how their cache is kept and read."""
    words = plan.layers[index]
    groups: dict[Group, list[int]] = {}
    for head, (cache, decode) in enumerate(zip(words.cache, words.decode, strict=True)):
        band = FULL if cache == "full" else plan.patterns[cache].band
        band = Band(0, window) if window is not None else band
        groups.setdefault(Group((), band, _selector(plan, decode)), []).append(head)
    return tuple(_group(plan, index, kind, tuple(own), source) for kind, own in groups.items())


def _selector(plan: Plan, decode: str) -> Any:
    return None if decode in ("full", "ring") else plan.patterns[decode]


def _group(
    plan: Plan, layer: int, kind: Group, heads: tuple[int, ...], source: LayerPlan | None
) -> Group:
    """kv heads of a kind; those that reuse a choice find it at their places in the chooser's."""
    if kind.selector is None:
        return replace(kind, heads=heads)
    if not isinstance(kind.selector, Reuse):
        table = plan.table_of(kind.selector)
        try:
            return Group(heads, kind.band, kind.selector.bind(layer, heads, table))
        except ValueError as error:
            raise PlanError(f"layer {layer}: {error}") from error
    chooses = next(g.heads for g in source.groups if g.selector is not None)
    return Group(heads, kind.band, reuses=tuple(chooses.index(head) for head in heads))


def _cases(plan: Plan, index: int, kv_heads: Sequence[int], ranked: bool = True) -> Cases:
    """Routes of a layer's heads; ranked False: no pattern ranks their keys, since a ring's slots
    are no place for that (of a layer with a window of its own)."""
    words, ratio = plan.layers[index], plan.model.q_heads // plan.model.kv_heads
    patterns = [plan.patterns.get(word) for word in words.prefill]
    if not ranked:
        patterns = [p if hasattr(p, "band") else None for p in patterns]
    rings = {head for head, word in enumerate(words.cache) if word != "full"}
    return routes_by_case(patterns, q_heads_of(kv_heads, ratio), rings, ratio)
