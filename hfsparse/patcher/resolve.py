"""From a plan to what each layer needs of it."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from hfsparse.errors import PlanError
from hfsparse.lists import FULL, Band, HeadIndex
from hfsparse.models.loading import device_name
from hfsparse.plan import Below, Plan
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.counts import Counts
from hfsparse.runtime.layer_plan import LayerPlan
from hfsparse.selectors.reuse import Reuse


def resolve_below(plan: Plan, device: torch.device) -> Below:
    """The plan's thresholds; for prompts what `hfsparse bench --write` measured on this device."""
    found: Any = plan.measured
    for key in (device_name(device), "below", "prefill"):
        found = found.get(key) if isinstance(found, dict) else None
    return replace(plan.below, prefill=found) if isinstance(found, int) else plan.below


def resolve_layers(
    plan: Plan, indices: list[int], windows: list[int | None], below: Below
) -> list[LayerPlan]:
    plans, owner, source = [], uuid.uuid4().hex, None
    steps, at = Counter(), HeadIndex()
    for index in indices:
        words, window = plan.layers[index], windows[index]
        rings = frozenset(g for g, word in enumerate(words.cache) if word != "full")
        groups: dict[Group, list[int]] = {}
        for head, (cache, decode) in enumerate(zip(words.cache, words.decode, strict=True)):
            band = plan.patterns[cache].band if head in rings else FULL
            band = Band(0, window) if window is not None else band
            selector = None if decode in ("full", "ring") else plan.patterns[decode]
            groups.setdefault(Group((), band, selector), []).append(head)
        plans.append(
            LayerPlan(
                owner,
                index,
                plan.model.kv_heads,
                tuple(plan.patterns.get(word) for word in words.prefill),
                tuple(_group(plan, index, g, tuple(h), source) for g, h in groups.items()),
                rings,
                below,
                plan.skip,
                window,
                Counts(plan.model.q_heads),
                not plans,
                steps,
                source=source if any(isinstance(g.selector, Reuse) for g in groups) else None,
                at=at,
            )
        )
        if any(g.selector is not None for g in plans[-1].groups):
            source = plans[-1]
    for layer in plans:
        if layer.source is not None:
            layer.source.shared = True
    return plans


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
