"""Measure candidates on every prompt, then choose one a head: what the one-pass methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.kernels import cpu
from hfsparse.models.layers import LayerShape, layer_shapes
from hfsparse.models.loading import device_of
from hfsparse.patcher.figures import NARROW, Prompts, one_head
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.plan.files import DataFile
from hfsparse.profiler.job import Forecast, Found, Job
from hfsparse.profiler.measure.capture import Given, capture, forward, stack_layers
from hfsparse.profiler.measure.effects import Candidates, measure_layer
from hfsparse.profiler.parts import mark
from hfsparse.profiler.prompts.calibration import Prompt
from hfsparse.profiler.solve.allocation import Budget, Infeasible, Options, allocate, sum_losses
from hfsparse.profiler.solve.room import Room


def drop_slow(job: Job, candidates: Candidates) -> Candidates:
    """The candidates without patterns that take longer than reading every key, where the model is:
    on a CPU those that gather blocks or columns, of prompts that are all short."""
    if device_of(job.model).type != "cpu" or max(job.prompts) >= cpu.GATHERING_PAYS:
        return candidates
    bands = {name: each for name, each in candidates.patterns.items() if hasattr(each, "band")}
    return replace(candidates, patterns=bands)


def calibrate_tables(job: Job, candidates: Candidates) -> Candidates:
    """The candidates with the tables that their selectors read.

    Means over the longest prompts: after RoPE, short ones say little of long ones.
    """
    needed = {s.data: s for s in candidates.selectors.values() if hasattr(s, "calibrate")}
    if not needed:
        return candidates

    def look(given: Given) -> dict[str, np.ndarray]:
        return {
            f"{name}/{part}": t.float().cpu().numpy()
            for name, selector in needed.items()
            for part, t in selector.calibrate(given).items()
        }

    def visit(prompt: Prompt) -> dict[str, np.ndarray]:
        return stack_layers(job.model, forward(job.model, prompt.ids, look))

    longest = max(job.prompts)
    some = replace(job, prompts={longest: job.prompts[longest]})
    means = average(_visit_prompts(some, f"tables-{mark(needed)}", visit)[longest])
    tables: dict[str, dict[str, Tensor]] = {name: {} for name in needed}
    for key, values in means.items():
        name, part = key.split("/", 1)
        tables[name][part] = torch.from_numpy(values)
    data = {name: DataFile.of_plan(job.settings.out, name, t) for name, t in tables.items()}
    return replace(candidates, data=candidates.data | data)


def measure_prompts(job: Job, candidates: Candidates) -> dict[int, dict[str, np.ndarray]]:
    """Mean over prompts of `measure_layer`, arrays `[layers, candidates, heads]`, by length."""
    more = candidates.data, candidates.evictions, candidates.packed
    name = mark(candidates, *chain.from_iterable(each.items() for each in more))
    each = _visit_prompts(job, name, lambda prompt: measure_prompt(job.model, prompt, candidates))
    return {n: average(found) for n, found in each.items()}


def _visit_prompts(
    job: Job, name: str, visit: Callable[[Prompt], dict[str, np.ndarray]]
) -> dict[int, list[dict[str, np.ndarray]]]:
    """What `visit` answers of each prompt, by length; parts called `name` keep it."""
    if any(shape.free and not shape.alone for shape in layer_shapes(job.model)):
        name += "-shared"  # earlier ones know nothing of layers that share keys
    found: dict[int, list[dict[str, np.ndarray]]] = {n: [] for n in job.prompts}
    rows = [(n, i, prompt) for n, each in job.prompts.items() for i, prompt in enumerate(each)]
    for n, i, prompt in job.progress((f"{row[2].name}, {row[0]} tokens", row) for row in rows):
        found[n].append(job.parts.get(f"{name}-{n}-{i}", partial(visit, prompt)))
    return found


def measure_prompt(
    model: PreTrainedModel, prompt: Prompt, candidates: Candidates
) -> dict[str, np.ndarray]:
    """Arrays `[layers, candidates, heads]` of one prompt."""
    measure = partial(measure_layer, candidates=candidates)
    plan = short_sighted_plan(model, candidates)
    return stack_layers(model, capture(model, prompt.ids, plan, measure))


def short_sighted_plan(model: PreTrainedModel, candidates: Candidates) -> Plan:
    """A plan whose heads are the smallest ring, in layers that may be sparse."""
    this = ModelId.of(model)
    rings = candidates.rings.items()
    name, ring = min(rings, key=lambda item: (item[1].recent_per_token, item[1].recent))
    kv = this.kv_heads
    short = Layer((name,) * this.q_heads, (name,) * kv, ("ring",) * kv)
    pairs = zip(layer_shapes(model), Plan.full(this).layers, strict=True)
    return Plan(this, {name: ring}, tuple(short if each.free else full for each, full in pairs))


def average(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Means of arrays of the same names."""
    return {name: np.mean([each[name] for each in found], axis=0) for name in found[0]}


def choose_plan(
    job: Job,
    candidates: Candidates,
    means: dict[int, dict[str, np.ndarray]],
    options: Callable[..., Options],
) -> Found:
    """Allocate what `options` makes of the measurements, in layers that may be sparse, also where
    they share keys.

    Cache is priced at `job.cache_length`, decode at the longest length.
    """
    job = replace(job, together=True)
    free = {n: {name: t[job.free] for name, t in found.items()} for n, found in means.items()}
    this = ModelId.of(job.model)
    at, itemsize = job.cache_length, job.model.dtype.itemsize
    costs = price_candidates(candidates, max(means), job.shape, at, itemsize)
    choices = options(free, candidates, costs | {"producers": job.producers})
    known = {**candidates.patterns, **candidates.rings, **candidates.selectors}
    known |= candidates.evictions | candidates.packed

    expect = Forecast(
        job,
        known,
        lambda layers: {n: look_up_prompts(layers, candidates, t) for n, t in means.items()},
        candidates.data,
    )

    def make_plan(taken: list[Layer]) -> Plan:
        layers = job.fill(taken)
        used = patterns_in_use(known, layers)
        data = tables_in_use(candidates.data, used)
        return Plan(this, used, layers, job.below, expect(layers), data=data)

    def choose(budget: Budget) -> Plan | None:
        try:
            return make_plan(allocate(choices, budget))
        except Infeasible:
            return None

    try:
        taken = allocate(choices, job.budget)
    except Infeasible as error:
        told = describe_least(job, error.least)
        raise UsageError(f"{error}{told}. Give larger budgets, or longer --lengths") from None
    lost = sum_losses(choices, taken)
    lost = np.stack([lost[choices.members.get(at, [])].sum(0) for at in range(len(lost))])
    suspects = job.spread(lost)
    draw = partial(_draw_curves, job, candidates, free[max(free)], choices)
    return Found(make_plan(taken), expect, choose, suspects, draw)


def describe_least(job: Job, least: dict[str, float]) -> str:
    """The smallest share of cache that there can be, in GiB, where a budget is given in them."""
    if job.settings.cache_gib is None:
        return ""
    room = Room.of(job.model, job.cache_length, together=True)
    return (
        f", {room.gib(least['cache']):.3g} GiB of the {room.gib(1):.3g} that the whole cache takes "
        f"at {room.tokens} tokens (cache_gib is {job.settings.cache_gib:g})"
    )


def _draw_curves(job: Job, candidates: Candidates, found: dict[str, np.ndarray], choices: Options):
    from hfsparse.profiler.solve import curves  # matplotlib, only where it draws

    layers = np.flatnonzero(job.free).tolist()
    return curves.draw_figure(layers, candidates, found, choices, job.budget)


def patterns_in_use(patterns: dict[str, Any], layers: tuple[Layer, ...]) -> dict[str, Any]:
    """Of these patterns and selectors, those that a head follows."""
    words = {word for layer in layers for word in (*layer.prefill, *layer.cache, *layer.decode)}
    return {name: pattern for name, pattern in patterns.items() if name in words}


def tables_in_use(data: dict[str, DataFile], patterns: dict[str, Any]) -> dict[str, DataFile]:
    """Of these tables, those that a selector reads."""
    named = {getattr(each, "data", None) for each in patterns.values()}
    return {name: table for name, table in data.items() if name in named}


def price_candidates(
    candidates: Candidates,
    length: int,
    shape: LayerShape = NARROW,
    at: int | None = None,
    itemsize: int = 2,
) -> dict[str, Any]:
    """What a step reads of a row of `length` tokens, and what choices keep of one of `at`, for
    Options.

    shape: of the layers. at: None is `length`. What is kept are bytes, of a model that works in a
    type of `itemsize`. A step of a selector reads keys and values, and all that is kept beside
    them: its index; both count as in a type of two bytes.
    """
    kinds = {"ring": candidates.rings, "evict": candidates.evictions, "page": candidates.selectors}

    def price(name: str, tokens: int, *more: Any) -> list[tuple[float, float]]:
        some = kinds[name].values()
        return [one_head(tokens, each, shape, candidates.data, *more) for each in some]

    at, full = at or length, one_head(length)[0]
    found = {f"{name}_kept": [kept for kept, _ in price(name, at, itemsize)] for name in kinds}
    found |= {f"{name}_read": [r for _, r in price(name, length, 2)] for name in ("ring", "evict")}
    found["page_read"] = [read + kept - full for kept, read in price("page", length, 2)]
    packed = []
    for few in candidates.packed.values():
        alone, _ = one_head(at, None, shape, None, itemsize, few)
        packed.append([alone, *(kept for kept, _ in price("page", at, itemsize, few))])
    return found | {"full_kept": one_head(at)[0], "packed_kept": packed}


def look_up_prompts(
    choices: tuple[Layer, ...], candidates: Candidates, found: dict[str, np.ndarray]
) -> Prompts:
    """What a choice does in prompts, as measured at one length."""
    tables = {
        word: (kind, i)
        for kind, words in (("pattern", candidates.patterns), ("ring", candidates.rings))
        for i, word in enumerate(words)
    }
    group = found["pattern_pairs"].shape[2] // found["ring_pairs"].shape[2]

    def of(name: str) -> np.ndarray:
        shares = np.ones((len(choices), len(choices[0].prefill)))
        for layer, choice in enumerate(choices):
            for head, word in enumerate(choice.prefill):
                if word != "full":
                    kind, i = tables[word]
                    at = head // group if kind == "ring" else head
                    shares[layer, head] = found[f"{kind}_{name}"][layer, i, at]
        return shares

    return Prompts(*map(of, ("pairs", "blocks", "recall")))
