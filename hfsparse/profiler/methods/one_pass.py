"""Measure candidates on every prompt, then choose one a head: what the one-pass methods share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.models.fingerprint import windows
from hfsparse.patcher.figures import Prompts, one_head
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler.job import Forecast, Found, Job
from hfsparse.profiler.measure.capture import capture
from hfsparse.profiler.measure.effects import Candidates, measure_layer
from hfsparse.profiler.parts import mark
from hfsparse.profiler.prompts.calibration import Prompt
from hfsparse.profiler.solve.allocation import Budget, Infeasible, Options, allocate, sum_losses


def measure_prompts(job: Job, candidates: Candidates) -> dict[int, dict[str, np.ndarray]]:
    """Mean over prompts of `measure_layer`, arrays `[layers, candidates, heads]`, by length."""
    name = mark(candidates)
    found: dict[int, list[dict[str, np.ndarray]]] = {n: [] for n in job.prompts}
    rows = [(n, i, prompt) for n, each in job.prompts.items() for i, prompt in enumerate(each)]
    for n, i, prompt in job.progress((f"{row[2].name}, {row[0]} tokens", row) for row in rows):
        look = partial(measure_prompt, job.model, prompt, candidates)
        found[n].append(job.parts.get(f"{name}-{n}-{i}", look))
    return {n: average(each) for n, each in found.items()}


def measure_prompt(
    model: PreTrainedModel, prompt: Prompt, candidates: Candidates
) -> dict[str, np.ndarray]:
    """Arrays `[layers, candidates, heads]` of one prompt."""
    look = partial(measure_layer, candidates=candidates)
    layers = capture(model, prompt.ids, short_sighted_plan(model, candidates), look)
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def short_sighted_plan(model: PreTrainedModel, candidates: Candidates) -> Plan:
    """A plan whose heads are the smallest ring, in layers that have no window of their own."""
    this = ModelId.of(model)
    rings = candidates.rings.items()
    name, ring = min(rings, key=lambda item: (item[1].recent_per_token, item[1].recent))
    kv = this.kv_heads
    short = Layer((name,) * this.q_heads, (name,) * kv, ("ring",) * kv)
    pairs = zip(windows(model), Plan.full(this).layers, strict=True)
    return Plan(this, {name: ring}, tuple(short if w is None else full for w, full in pairs))


def average(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Means of arrays of the same names."""
    return {name: np.mean([each[name] for each in found], axis=0) for name in found[0]}


def choose_plan(
    job: Job,
    candidates: Candidates,
    means: dict[int, dict[str, np.ndarray]],
    options: Callable[..., Options],
) -> Found:
    """Allocate what `options` makes of the measurements, in layers that may be sparse.

    Cache and decode are priced at the longest length.
    """
    free = {n: {name: t[job.free] for name, t in found.items()} for n, found in means.items()}
    choices = options(free, candidates, price_candidates(candidates, max(means)))
    this = ModelId.of(job.model)
    full = Plan.full(this).layers[0]
    known = {**candidates.patterns, **candidates.rings, **candidates.selectors}

    expect = Forecast(
        job,
        known,
        lambda layers: {n: look_up_prompts(layers, candidates, t) for n, t in means.items()},
    )

    def make_plan(taken: list[Layer]) -> Plan:
        rest = iter(taken)
        layers = tuple(next(rest) if sparse else full for sparse in job.free)
        return Plan(this, patterns_in_use(known, layers), layers, job.below, expect(layers))

    def choose(budget: Budget) -> Plan | None:
        try:
            return make_plan(allocate(choices, budget))
        except Infeasible:
            return None

    try:
        taken = allocate(choices, job.budget)
    except Infeasible as error:
        raise UsageError(f"{error}. Give larger budgets, or longer --lengths") from None
    suspects = job.spread(sum_losses(choices, taken))
    draw = partial(_draw_curves, job, candidates, free[max(free)], choices)
    return Found(make_plan(taken), expect, choose, suspects, draw)


def _draw_curves(job: Job, candidates: Candidates, found: dict[str, np.ndarray], choices: Options):
    from hfsparse.profiler.solve import curves  # matplotlib, only where it draws

    layers = np.flatnonzero(job.free).tolist()
    return curves.draw_figure(layers, candidates, found, choices, job.budget)


def patterns_in_use(patterns: dict[str, Any], layers: tuple[Layer, ...]) -> dict[str, Any]:
    """Of these patterns and selectors, those that a head follows."""
    words = {word for layer in layers for word in (*layer.prefill, *layer.cache, *layer.decode)}
    return {name: pattern for name, pattern in patterns.items() if name in words}


def price_candidates(candidates: Candidates, length: int) -> dict[str, Any]:
    """What choices keep of a row of `length` tokens and what a step reads, for Options."""
    rings, pages = (
        [one_head(length, each) for each in kinds.values()]
        for kinds in (candidates.rings, candidates.selectors)
    )
    named = {"ring": rings, "page": pages}
    found = {f"{name}_kept": [kept for kept, _ in each] for name, each in named.items()}
    found |= {f"{name}_read": [read for _, read in each] for name, each in named.items()}
    return found | {"full_kept": one_head(length)[0]}


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
