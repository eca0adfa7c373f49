"""Two methods by phase: one chooses for prompts, another for cache and decode.

Each works under its own part of the budgets. A kv head that the second makes a ring streams in
prompts, too; the q heads of the others take the first's words. So the density of prompts is that of
neither method, and may pass its budget: `expected` says what it is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hfsparse.errors import UsageError
from hfsparse.patcher.figures import Prompts
from hfsparse.plan import Layer, Plan
from hfsparse.profiler.job import Forecast, Found, Job, Method
from hfsparse.profiler.methods.one_pass import patterns_in_use
from hfsparse.profiler.solve.allocation import Budget


def plan(job: Job, prompts: Method, rest: Method) -> Found:
    """The plan of `prompts` where that of `rest` keeps the cache full, else that of `rest`."""
    budget = job.budget
    first = prompts(replace(job, budget=Budget(budget.pairs, 1.0, 1.0)))
    second = rest(replace(job, budget=Budget(1.0, budget.cache, budget.decode)))
    for found, name in ((first, job.settings.prefill_method), (second, job.settings.method)):
        if found.expect is None:
            raise UsageError(f"method {name} does not tell what a plan computes: use it alone")
    one, other = first.plan, second.plan
    names = {word: _name(word, one, other) for word in one.patterns}
    pairs = zip(one.layers, other.layers, strict=True)
    layers = tuple(join(mine, theirs, names) for mine, theirs in pairs)
    back = {name: word for word, name in names.items()}
    patterns = {names[word]: pattern for word, pattern in one.patterns.items()} | other.patterns

    def look_up_prompts(layers: tuple[Layer, ...]) -> dict[int, Prompts]:
        """A head that one method leaves full is the other's: each knows its own."""
        halves = zip(*(split(layer, back) for layer in layers), strict=True)
        both = zip((first, second), halves, strict=True)
        x, y = (found.expect.prompts(half) for found, half in both)
        return {n: _multiply(x[n], y[n]) for n in x if n in y}

    expect = Forecast(job, patterns, look_up_prompts, other.data)
    joint = replace(
        other,
        layers=layers,
        patterns=patterns_in_use(patterns, layers),
        expected=expect(layers),
        made=one.made | other.made,
    )
    return Found(joint, expect, suspects=_add_suspects(first, second))


def _multiply(one: Prompts, other: Prompts) -> Prompts:
    """Of heads that at least one of the two leaves full, at 1."""
    recall = None
    if one.recall is not None and other.recall is not None:
        recall = one.recall * other.recall
    return Prompts(one.pairs * other.pairs, one.blocks * other.blocks, recall)


def _add_suspects(*found: Found) -> np.ndarray | None:
    """What each method suspects, as a share of the most that it does; None where none does."""
    each = [x.suspects for x in found if x.suspects is not None and x.suspects.max() > 0]
    return sum(x / x.max() for x in each) if each else None


def join(mine: Layer, theirs: Layer, names: dict[str, str]) -> Layer:
    """Their layer, with my words, renamed, for the q heads of a full cache."""
    rings = _find_rings(theirs)
    both = zip(mine.prefill, theirs.prefill, rings, strict=True)
    return replace(theirs, prefill=tuple(b if ring else names.get(a, a) for a, b, ring in both))


def split(layer: Layer, back: dict[str, str]) -> tuple[Layer, Layer]:
    """What each method chose of a joint layer, in its own words and full elsewhere."""
    rings, kv = _find_rings(layer), ("full",) * len(layer.cache)
    both = list(zip(layer.prefill, rings, strict=True))
    mine = tuple("full" if ring else back.get(word, word) for word, ring in both)
    theirs = tuple(word if ring else "full" for word, ring in both)
    return Layer(mine, kv, kv), replace(layer, prefill=theirs)


def _find_rings(layer: Layer) -> list[bool]:
    """Whether each q head's kv head is a ring."""
    group = len(layer.prefill) // len(layer.cache)
    return [word == "ring" for word in layer.decode for _ in range(group)]


def _name(word: str, one: Plan, other: Plan) -> str:
    """A word of `one` that means the same in `other`, or nothing there."""
    clash = word in other.patterns and other.patterns[word] != one.patterns[word]
    return f"{word}-prompt" if clash else word
