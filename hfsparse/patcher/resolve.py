"""From a plan to what each layer needs of it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from hfsparse.errors import PlanError
from hfsparse.kernels.rows import q_heads_of
from hfsparse.lists import FULL, PAGE, Band, HeadIndex
from hfsparse.models.layers import LayerShape
from hfsparse.models.loading import device_name
from hfsparse.models.sharding import Shard
from hfsparse.patterns.pattern import Pattern
from hfsparse.plan import Below, Layer, Plan
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.counts import Counts
from hfsparse.runtime.extend import Extension
from hfsparse.runtime.layer_plan import LayerPlan, Mode
from hfsparse.runtime.parts import ContextParallel
from hfsparse.runtime.routes import Cases, routes_by_case
from hfsparse.selectors.reuse import Reuse

WHOLE = Shard()
Bind = Callable[[Any, int, tuple[int, ...]], Any]  # a selector, a layer, heads: that selector there


def resolve_below(plan: Plan, device: torch.device) -> Below:
    """The plan's thresholds; for prompts what `hfsparse bench --write` measured on this device."""
    found: Any = plan.measured
    for key in (device_name(device), "below", "prefill"):
        found = found.get(key) if isinstance(found, dict) else None
    return replace(plan.below, prefill=found) if isinstance(found, int) else plan.below


def resolve_layers(
    plan: Plan,
    shapes: Sequence[LayerShape],
    below: Below,
    extensions: Mapping[int, Extension] = MappingProxyType({}),
    shard: Shard = WHOLE,
    context: ContextParallel | None = None,
) -> list[LayerPlan]:
    """Of the layers that have attention, for a shard's heads, which are numbered from 0 on.

    shapes: of all layers of the plan's model, with all heads. context: how ranks share tokens.
    """
    owner, at, mode = uuid.uuid4().hex, HeadIndex(), Mode()
    steps, steps_of_readers = Counter(), Counter()
    indices = [index for index, shape in enumerate(shapes) if shape.attends]
    words_of = {index: _words(plan.layers[index], shapes[index], shard) for index in indices}
    sources, made = _sources(plan, words_of), {}
    for index, words in words_of.items():
        shape, source = shapes[index], made.get(sources.get(index))
        q_heads, kv_heads = len(words.prefill), len(words.cache)
        ratio, bind = q_heads // kv_heads, partial(_bound, plan, shard.first(shape.kv_heads))
        if (producer := made.get(shape.producer)) is None:
            groups, own_steps = _groups(plan, index, words, shape, source, bind), steps
        else:
            groups = _groups_of_reader(plan, words, producer, source, bind)
            own_steps = steps_of_readers
        patterns = tuple(plan.patterns.get(word) for word in words.prefill)
        expanded = shape.rank > 0
        kept = (plan.patterns.get(word) for word in words.cache)
        rings = {head for head, pattern in enumerate(kept) if hasattr(pattern, "band")}
        made[index] = LayerPlan(
            owner=owner,
            index=index,
            kv_heads=kv_heads,
            prefill=patterns,
            groups=groups,
            cases=routes_by_case(patterns, range(q_heads), rings, ratio, expanded),
            store_cases=tuple(
                _store_cases(patterns, group, rings, ratio, expanded) for group in groups
            ),
            below=below,
            skip=plan.skip,
            window=shape.window,
            chunked=shape.chunked,
            has_state=shape.has_state,
            counts=Counts(q_heads),
            leads=not any(each.steps is own_steps for each in made.values()),
            source=source,
            shared=index in sources.values(),
            producer=producer,
            last_reader=max((i for i in indices if shapes[i].producer == index), default=None),
            extension=extensions.get(index),
            context=context,
            steps=own_steps,
            at=at,
            mode=mode,
        )
    return [*made.values()]


def resolve_exact(plan: Plan, shapes: Sequence[LayerShape], below: Below) -> list[LayerPlan]:
    """As `resolve_layers`, for exact mode: layers that read every key of prompts and steps, and
    keep it. Their `draft` reads the plan's choice of that: of a ring's keys those in its band."""

    def full(layer: Layer) -> Layer:
        return replace(layer, prefill=("full",) * len(layer.prefill))

    def kept(layer: LayerPlan, group: Group) -> Group:
        ring = layer.window is None and group.band != FULL
        return replace(group, band=FULL, reads=group.band) if ring else group

    found, steps = [], {}
    whole = replace(plan, layers=tuple(map(full, plan.layers)), skip=None)
    for layer in resolve_layers(whole, shapes, below):
        draft = replace(layer, groups=tuple(kept(layer, group) for group in layer.groups))
        groups = (replace(g, selector=None, reuses=(), reads=FULL) for g in draft.groups)
        own = {"counts": Counts(layer.counts.q_heads), "source": None, "shared": False}
        own["steps"] = steps.setdefault(id(layer.steps), Counter())
        found.append(replace(draft, groups=tuple(groups), draft=draft, **own))
    return found


def why_not_exact(
    model: PreTrainedModel,
    plan: Plan,
    shapes: Sequence[LayerShape],
    layers: Sequence[LayerPlan],
    shard: Shard = WHOLE,
) -> str | None:
    """Why a plan can't draft; None: it can. layers: as `resolve_exact` has them."""
    if not hasattr(type(model), "_get_logits_processor"):
        return f"{type(model).__name__} has no generate"
    if shard != WHOLE:
        return "ranks share its heads (tensor parallel)"
    if any(shape.has_state for shape in shapes):
        return "its linear layers can't take drafts back"
    if any("kept" in layer.decode for layer in plan.layers):
        return "the plan evicts keys, and drafts are made from all"
    if any(layer.packs for layer in layers):
        return "the plan keeps keys in fewer bits, and drafts are verified by those of the model"
    if any(layer.hosts for layer in layers):
        return "the plan keeps keys in host memory, and drafts are verified by all of them"
    if plan.extend is not None:
        return "the plan has extend, by which long rows are read otherwise than the model does"
    if not any(group.chosen for layer in layers for group in layer.draft.groups):
        return "the plan's steps read every key, so that a draft would cost what a step does"
    return None


def _sources(plan: Plan, words_of: Mapping[int, Layer]) -> dict[int, int]:
    """For layers that read another's choice of pages, that one: the last before them to choose."""
    last, found = None, {}
    for index, words in words_of.items():
        selectors = [_selector(plan, word) for word in words.decode]
        reuses = [isinstance(each, Reuse) for each in selectors if each is not None]
        if any(reuses):
            found[index] = last
        if not all(reuses):
            last = index
    return found


def _words(words: Layer, shape: LayerShape, shard: Shard) -> Layer:
    """A layer's words, of a shard's heads; all are full, and as many as it has heads, where it has
    others than a plan has words for (`Plan.check` sees to that)."""
    if (len(words.prefill), len(words.cache)) != shape.heads:
        words = Layer(("full",) * shape.q_heads, *[("full",) * shape.kv_heads] * 2)
    return Layer(*map(shard.own, (words.prefill, words.cache, words.decode)))


def _groups(
    plan: Plan, index: int, words: Layer, shape: LayerShape, source: LayerPlan | None, bind: Bind
) -> tuple[Group, ...]:
    """A layer's kv heads by how their cache is kept and read."""
    groups: dict[Group, list[int]] = {}
    for head, (cache, decode) in enumerate(zip(words.cache, words.decode, strict=True)):
        kept = plan.patterns.get(cache)
        band, eviction = getattr(kept, "band", FULL), kept if decode == "kept" else None
        bits = getattr(kept, "bits", 16)
        if shape.window is not None:
            band = Band(0, shape.window, chunked=shape.chunked)
        hot = kept.hot if getattr(kept, "host", False) else 0.0
        more = {"eviction": eviction, "bits": bits, "hot": hot, "rank": shape.rank}
        kind = Group((), band, _selector(plan, decode), **more)
        groups.setdefault(kind, []).append(head)
    return tuple(_group(index, kind, tuple(own), source, bind) for kind, own in groups.items())


def _groups_of_reader(
    plan: Plan, words: Layer, producer: LayerPlan, source: LayerPlan | None, bind: Bind
) -> tuple[Group, ...]:
    """Of a layer that reads another's keys: that one's, whose stores it reads by its own words."""
    found = []
    for group in producer.groups:
        kind = replace(group, selector=_selector(plan, words.decode[group.heads[0]]), reuses=())
        found.append(_group(producer.index, kind, group.heads, source, bind))
    return tuple(found)


def _selector(plan: Plan, decode: str) -> Any:
    return None if decode in ("full", "ring", "kept") else plan.patterns[decode]


def _group(
    layer: int, kind: Group, heads: tuple[int, ...], source: LayerPlan | None, bind: Bind
) -> Group:
    """kv heads of a kind; those that reuse a choice find it at their places in the chooser's."""
    if kind.selector is None:
        return replace(kind, heads=heads)
    if not isinstance(kind.selector, Reuse):
        return replace(kind, heads=heads, selector=bind(kind.selector, layer, heads))
    chooses = next(g.heads for g in source.groups if g.selector is not None)
    places = tuple(chooses.index(head) for head in heads)
    return replace(kind, heads=heads, selector=None, reuses=places)


def _bound(plan: Plan, first: int, selector: Any, layer: int, heads: tuple[int, ...]) -> Any:
    """A selector of these kv heads; PlanError for a table that does not fit them or their keys.

    first: the plan's number of head 0.
    """
    table, channels = plan.table_of(selector), plan.model.head_dim
    try:
        bound = selector.bind(layer, tuple(first + head for head in heads), table)
        if table is not None:
            page = torch.empty(0, len(heads), 1, PAGE, channels, device="cpu")
            bound.summarise(page, page[..., :1].bool())
        return bound
    except ValueError as error:
        raise PlanError(f"layer {layer}: {error}") from error
    except RuntimeError as error:
        raise PlanError(
            f"layer {layer}: {selector.kind} has a table that is not of keys of {channels} "
            f"channels: hfsparse profile MODEL --selector {selector.kind} makes one"
        ) from error


def _store_cases(
    patterns: Sequence[Pattern | None],
    group: Group,
    rings: Collection[int],
    ratio: int,
    expanded: bool,
) -> Cases:
    """Routes of a store's heads; no pattern ranks the keys of a ring, since its slots are no place
    for that (of a layer with a window of its own). Of an eviction's keys every one is read."""
    if group.eviction is not None:
        patterns = [None] * len(patterns)
    elif group.band != FULL:
        patterns = [p if hasattr(p, "band") else None for p in patterns]
    return routes_by_case(patterns, q_heads_of(group.heads, ratio), rings, ratio, expanded)
