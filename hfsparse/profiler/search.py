"""Measure candidates on every prompt, then choose one a head: what the one-pass methods share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hfsparse.cache import ring_size
from hfsparse.fingerprint import windows
from hfsparse.loading import UsageError
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler import measure
from hfsparse.profiler.allocate import Budget, Infeasible, Options, allocate, losses
from hfsparse.profiler.capture import capture
from hfsparse.profiler.job import Job, mark
from hfsparse.profiler.measure import Candidates
from hfsparse.profiler.prompts import Prompt


def measured(job: Job, candidates: Candidates) -> dict[int, dict[str, np.ndarray]]:
    """Mean over prompts of `measure.layer`, arrays `[layers, candidates, heads]`, by length."""
    name = mark(candidates)
    found: dict[int, list[dict[str, np.ndarray]]] = {n: [] for n in job.prompts}
    rows = [(n, i, prompt) for n, each in job.prompts.items() for i, prompt in enumerate(each)]
    for n, i, prompt in job.progress((f"{row[2].name}, {row[0]} tokens", row) for row in rows):
        look = partial(of_prompt, job.model, prompt, candidates)
        found[n].append(job.parts.get(f"{name}-{n}-{i}", look))
    return {n: mean(each) for n, each in found.items()}


def of_prompt(
    model: PreTrainedModel, prompt: Prompt, candidates: Candidates
) -> dict[str, np.ndarray]:
    """Arrays `[layers, candidates, heads]` of one prompt."""
    look = partial(measure.layer, candidates=candidates)
    layers = capture(model, prompt.ids, short_sighted(model, candidates), look)
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def short_sighted(model: PreTrainedModel, candidates: Candidates) -> Plan:
    """Every head a ring, the smallest, in layers that have no window of their own."""
    this = ModelId.of(model)
    rings = candidates.rings.items()
    name, ring = min(rings, key=lambda item: (item[1].recent_per_token, item[1].recent))
    kv = this.kv_heads
    short = Layer((name,) * this.q_heads, (name,) * kv, ("ring",) * kv)
    pairs = zip(windows(model), Plan.full(this).layers, strict=True)
    return Plan(this, {name: ring}, tuple(short if w is None else full for w, full in pairs))


def mean(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.mean([each[name] for each in found], axis=0) for name in found[0]}


def chosen(
    job: Job,
    candidates: Candidates,
    means: dict[int, dict[str, np.ndarray]],
    options: Callable[..., Options],
) -> Plan:
    """Allocate what `options` makes of the measurements, in layers that may be sparse.

    Rings are priced at the longest length.
    """
    kept_and_read = ring_shares(candidates, max(means))
    free = {n: {name: t[job.free] for name, t in found.items()} for n, found in means.items()}
    choices = options(free, candidates, *kept_and_read)
    this = ModelId.of(job.model)
    full = Plan.full(this).layers[0]
    known = {**candidates.patterns, **candidates.rings, **candidates.selectors}

    def of(taken: list[Layer]) -> Plan:
        rest = iter(taken)
        layers = tuple(next(rest) if sparse else full for sparse in job.free)
        return Plan(this, used(known, layers), layers, job.below, job.expect(layers))

    def choose(budget: Budget) -> Plan | None:
        try:
            return of(allocate(choices, budget))
        except Infeasible:
            return None

    try:
        taken = allocate(choices, job.budget)
    except Infeasible as error:
        raise UsageError(f"{error}. Give larger budgets, or longer --lengths") from None
    job.suspects = job.spread(losses(choices, taken))
    job.draw = partial(_curves, job, candidates, free[max(free)], choices)
    job.expect = lambda layers: {n: expected(layers, candidates, t, n) for n, t in means.items()}
    job.choose = choose
    return of(taken)


def _curves(job: Job, candidates: Candidates, found: dict[str, np.ndarray], choices: Options):
    from hfsparse.profiler import curves  # matplotlib, only where it draws

    layers = np.flatnonzero(job.free).tolist()
    return curves.figure(layers, candidates, found, choices, job.budget)


def used(patterns: dict[str, Any], layers: tuple[Layer, ...]) -> dict[str, Any]:
    """Of these patterns and selectors, those that a head is told to follow."""
    words = {word for layer in layers for word in (*layer.prefill, *layer.cache, *layer.decode)}
    return {name: pattern for name, pattern in patterns.items() if name in words}


def ring_shares(candidates: Candidates, length: int) -> tuple[list[float], list[float]]:
    """Shares of a row of `length` tokens that each ring keeps, and that a decode step reads."""
    kept, read = [], []
    for ring in candidates.rings.values():
        kept.append(min(1.0, (ring.sink + ring_size(ring.band, length)) / length))
        read.append(min(1.0, (ring.sink + ring.band.span(length)) / length))
    return kept, read


def expected(
    choices: tuple[Layer, ...], candidates: Candidates, found: dict[str, np.ndarray], length: int
) -> dict[str, float]:
    """Mean densities, shares and recall of a choice at one length, as measured."""
    patterns, rings, pages = (
        {name: i for i, name in enumerate(t)}
        for t in (candidates.patterns, candidates.rings, candidates.selectors)
    )
    kept, read = ring_shares(candidates, length)
    rows: dict[str, list[float]] = {
        name: []
        for name in ("pair_density", "block_density", "cache_share", "decode_share", "recall")
    }
    for layer, choice in enumerate(choices):
        group = len(choice.prefill) // len(choice.cache)
        for h, word in enumerate(choice.prefill):
            if word in rings:
                table, i, at = "ring", rings[word], h // group
            elif word in patterns:
                table, i, at = "pattern", patterns[word], h
            values = [1.0] * 3
            if word != "full":
                values = [
                    found[f"{table}_{x}"][layer, i, at] for x in ("pairs", "blocks", "recall")
                ]
            for name, value in zip(
                ("pair_density", "block_density", "recall"), values, strict=True
            ):
                rows[name].append(float(value))
        for g, (cache, decode) in enumerate(zip(choice.cache, choice.decode, strict=True)):
            rows["cache_share"].append(1.0 if cache == "full" else kept[rings[cache]])
            share = 1.0 if decode == "full" else read[rings[cache]] if decode == "ring" else None
            if share is None:
                share = float(found["page_share"][layer, pages[decode], g])
            rows["decode_share"].append(share)
    return {name: round(float(np.mean(values)), 4) for name, values in rows.items()}
