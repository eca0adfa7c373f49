"""Make kv heads of a plan full again, or widen its budgets, until it loses little enough.

Heads are given back, those first that the method thinks lose most (`job.suspects`). Only what was
lost is asked again: bisection finds how many heads win back what is lost too much, in nats, and
those that are not needed are taken away. Then everything is asked again; while it still loses too
much, half as many heads again are given back.
Many heads that lose a little are budgets that are too small. So a method that can choose anew
(`job.choose`) does it within wider ones, as long as it then uses less than with the heads given
back, and the plan of the smallest that bisection finds is taken in place of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from hfsparse.plan import Layer, Plan
from hfsparse.profiler.job import Job
from hfsparse.profiler.methods.one_pass import used
from hfsparse.profiler.solve.allocation import Budget
from hfsparse.selectors.reuse import Reuse

TRIES = 8  # at most, to do without heads that a search has given back
WIDER = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # of the way from the budgets to dense attention

Unit = tuple[int, int]  # layer, kv head
T = TypeVar("T")


class Criterion(Protocol):
    """One way to say that a plan loses too much."""

    def beyond(self, plan: Plan) -> bool:
        """Whether it does."""

    def wins_back(self, plan: Plan) -> Callable[[Plan, str], bool]:
        """Of a plan that is beyond: tells whether another is not, as far as what this one lost.

        A label stands beside the bar.
        """


def until_within(
    job: Job, plan: Plan, criteria: Sequence[Criterion]
) -> tuple[Plan, list[Unit], Budget]:
    """A plan that is beyond no criterion, the heads given back for that, and its budgets."""
    if not _broken(criteria, plan):
        return plan, [], job.budget
    given = _given(job, plan, criteria)
    final = full(plan, given)
    final.expected = {} if job.expect is None else job.expect(final.layers)
    if job.choose and (found := _cheaper(job, plan, criteria, final)):
        budget, final = found
        return final, [], budget
    return final, given, job.budget


def _broken(criteria: Sequence[Criterion], plan: Plan) -> list[Criterion]:
    return [criterion for criterion in criteria if criterion.beyond(plan)]


def full(plan: Plan, units: Sequence[Unit]) -> Plan:
    """The plan with these kv heads, and the q heads of their groups, full.

    Where later layers read the pages that one of these chose, decode is full there, too.
    """
    layers, group = [], plan.model.q_heads // plan.model.kv_heads
    chooser = None  # the last layer that chose pages
    for at, layer in enumerate(plan.layers):
        prefill, cache, decode = (list(words) for words in vars(layer).values())
        reused = [isinstance(plan.patterns.get(word), Reuse) for word in decode]
        for g in range(plan.model.kv_heads):
            if (at, g) in units:
                prefill[g * group : (g + 1) * group] = ["full"] * group
                cache[g] = decode[g] = "full"
            elif reused[g] and (chooser, g) in units:
                decode[g] = "full"
        if any(
            w not in ("full", "ring") and not r for w, r in zip(layer.decode, reused, strict=True)
        ):
            chooser = at
        layers.append(Layer(tuple(prefill), tuple(cache), tuple(decode)))
    return replace(plan, layers=tuple(layers), patterns=used(plan.patterns, tuple(layers)))


def _given(job: Job, plan: Plan, criteria: Sequence[Criterion]) -> list[Unit]:
    """Few kv heads that, given back, keep the plan within all criteria."""
    given: list[Unit] = []
    searched: list[Criterion] = []
    while True:
        now = full(plan, given)
        broken, rest = _broken(criteria, now), _order(job, now)
        if not broken or not rest:
            return sorted(given)
        if broken[0] in searched:
            given += rest[: max(1, len(given) // 2)]
        else:
            searched.append(broken[0])
            given += _found(now, rest, broken[0])


def _cheaper(
    job: Job, plan: Plan, criteria: Sequence[Criterion], other: Plan
) -> tuple[Budget, Plan] | None:
    """Wider budgets and their plan that is beyond nothing and uses less than the other, if any.

    Bisection looks for the smallest that win back what `plan` loses too much, then everything is
    asked, of wider ones, too, until they lose little enough.
    """
    found = []
    for budget in map(job.budget.wider, WIDER):
        wide = job.choose(budget)
        if wide is None:
            continue
        if _use(wide) >= _use(other):  # so do all that are wider still
            break
        found.append((budget, wide))
    if not found:
        return None
    tests = [criterion.wins_back(plan) for criterion in _broken(criteria, plan)]

    def enough(steps: Sequence[tuple[Budget, Plan]]) -> bool:
        budget, wide = steps[-1]
        return all(wins(wide, f"budgets widened, cache {budget.cache:g}") for wins in tests)

    first = len(fewest(found, enough)) - 1
    return next((step for step in found[first:] if not _broken(criteria, step[1])), None)


def _use(plan: Plan) -> float:
    """Expected pair density, cache and decode share in sum, at the longest length."""
    expected = plan.expected[max(plan.expected)]
    return sum(expected[name] for name in ("pair_density", "cache_share", "decode_share"))


def _order(job: Job, plan: Plan) -> list[Unit]:
    """The kv heads that are not full, those first that the method suspects most."""
    units = np.ndindex(len(plan.layers), plan.model.kv_heads)
    order = [unit for unit in units if full(plan, [unit]) != plan]
    return order if job.suspects is None else sorted(order, key=lambda unit: -job.suspects[unit])


def _found(plan: Plan, order: Sequence[Unit], criterion: Criterion) -> list[Unit]:
    """Few heads, the first of the order likely among them, that win back what is lost too much."""
    wins = criterion.wins_back(plan)

    def enough(units: Sequence[Unit]) -> bool:
        return wins(full(plan, units), f"given back: {len(units)}")

    return fewer(fewest(order, enough), enough)


def fewest(order: Sequence[T], enough: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """The shortest start of `order` that bisection finds to be enough; the whole of it is."""
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(order[:middle]) else (middle + 1, high)
    return order[:high]


def fewer(found: Sequence[T], enough: Callable[[Sequence[T]], bool]) -> list[T]:
    """What of `found` is still enough, in TRIES tries: without a quarter, less, and single ones."""
    left, tries, size = list(found), 0, -(-len(found) // 4)
    while size:
        for end in range(len(left), 0, -size):  # the least suspicious first
            if tries == TRIES or len(left) == 1:
                return left
            without = left[: max(0, end - size)] + left[end:]
            tries += 1
            if without and enough(without):
                left = without
        size //= 2
    return left
