"""Make kv heads of a plan full again, or widen its budgets, until it loses little enough.

Heads are given back, those first that the method thinks lose most (`Found.suspects`). Where some
keep their keys in fewer bits, these first return to 16, and none is given back whole if that is
enough. Only what was lost is asked again: bisection finds how many heads win back what is lost too
much, in nats, and those that are not needed are taken away. Then everything is asked again; while
it still loses too much, half as many heads again are given back.
Many heads that lose a little are budgets that are too small. So a method that can choose anew
(`Found.choose`) does it within wider ones, as long as it then uses less than with the heads given
back, and the plan of the smallest that bisection finds is taken in place of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
from transformers import PreTrainedModel

from hfsparse.models.layers import layer_shapes
from hfsparse.plan import Layer, Plan
from hfsparse.plan.bits import in_bits
from hfsparse.profiler.job import Found, Job
from hfsparse.profiler.methods.one_pass import patterns_in_use, tables_in_use
from hfsparse.profiler.solve.allocation import Budget
from hfsparse.selectors.reuse import Reuse

MAX_TRIES = 8  # to do without heads that a search has given back
BUDGET_STEPS = (
    0.125,
    0.25,
    0.375,
    0.5,
    0.625,
    0.75,
)  # of the way from the budgets to dense attention

# Layer and kv head; and 16, where it is to keep no more keys, but these in 16 bits.
Unit = tuple[int, int] | tuple[int, int, int]
Bound = dict[int, list[int]]
T = TypeVar("T")


class Criterion(Protocol):
    """One way to say that a plan loses too much."""

    def rejects(self, plan: Plan) -> bool:
        """Whether it does."""

    def wins_back(self, plan: Plan) -> Callable[[Plan, str], bool]:
        """For a plan that is rejected: whether another wins back what this one loses too much.

        The function takes the other plan, and a label for the progress bar.
        """


def keep_within(
    job: Job, found: Found, criteria: Sequence[Criterion]
) -> tuple[Plan, list[Unit], Budget]:
    """A plan that no criterion rejects, the heads given back for that, and its budgets."""
    if not _find_rejecting(criteria, found.plan):
        return found.plan, [], job.budget
    bound = find_bound(job.model)
    given = _give_back(found, criteria, bound)
    final = restore(found.plan, given, bound)
    final.expected = {} if found.expect is None else found.expect(final.layers)
    if found.choose and (wider := _widen_budgets(job.budget, found, criteria, final)):
        budget, final = wider
        return final, [], budget
    return final, given, job.budget


def _find_rejecting(criteria: Sequence[Criterion], plan: Plan) -> list[Criterion]:
    return [criterion for criterion in criteria if criterion.rejects(plan)]


def find_bound(model: PreTrainedModel) -> Bound:
    """The layers that read the keys of a layer, which is the first of them, where others do."""
    found: Bound = {}
    for at, shape in enumerate(layer_shapes(model)):
        if shape.producer is not None:
            found.setdefault(shape.producer, [shape.producer]).append(at)
    return found


def restore(plan: Plan, units: Sequence[Unit], bound: Bound) -> Plan:
    """The plan with these kv heads full, or with as many keys in 16 bits, and those of layers that
    read their keys."""
    units = [(each, *head) for at, *head in units for each in bound.get(at, [at])]
    in_few = [unit[:2] for unit in units if len(unit) > 2]
    layers, patterns = in_bits(plan.layers, plan.patterns, 16, in_few)
    whole = [unit for unit in units if len(unit) == 2]
    return make_full(replace(plan, layers=layers, patterns=patterns), whole)


def make_full(plan: Plan, units: Sequence[tuple[int, int]]) -> Plan:
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
        if any(hasattr(plan.patterns.get(word), "pages") for word in layer.decode):
            chooser = at
        layers.append(Layer(tuple(prefill), tuple(cache), tuple(decode)))
    used = patterns_in_use(plan.patterns, tuple(layers))
    return replace(plan, layers=tuple(layers), patterns=used, data=tables_in_use(plan.data, used))


def _give_back(found: Found, criteria: Sequence[Criterion], bound: Bound) -> list[Unit]:
    """Few kv heads that, given back, keep the plan within all criteria."""
    given: list[Unit] = []
    searched: list[Criterion] = []
    while True:
        now = restore(found.plan, given, bound)
        rejecting, rest = _find_rejecting(criteria, now), _rank_units(now, found.suspects, bound)
        if not rejecting or not rest:
            return sorted(unit for unit in given if len(unit) == 2 or unit[:2] not in given)
        if rejecting[0] in searched:
            given += rest[: max(1, len(given) // 2)]
        else:
            searched.append(rejecting[0])
            given += _search_units(now, rest, rejecting[0], bound)


def _widen_budgets(
    budget: Budget, found: Found, criteria: Sequence[Criterion], other: Plan
) -> tuple[Budget, Plan] | None:
    """Wider budgets and their plan that nothing rejects and that uses less than the other, if any.

    Bisection looks for the smallest that win back what the plan found loses too much, then
    everything is asked, of wider ones, too, until they lose little enough.
    """
    steps = []
    for wider in map(budget.wider, BUDGET_STEPS):
        plan = found.choose(wider)
        if plan is None:
            continue
        if _sum_shares(plan) >= _sum_shares(other):  # all that are wider still do, too
            break
        steps.append((wider, plan))
    if not steps:
        return None
    rejecting = _find_rejecting(criteria, found.plan)
    tests = [criterion.wins_back(found.plan) for criterion in rejecting]

    def enough(steps: Sequence[tuple[Budget, Plan]]) -> bool:
        wider, plan = steps[-1]
        return all(wins(plan, f"budgets widened, cache {wider.cache:g}") for wins in tests)

    first = len(shortest_prefix(steps, enough)) - 1
    return next((step for step in steps[first:] if not _find_rejecting(criteria, step[1])), None)


def _sum_shares(plan: Plan) -> float:
    """Expected pair density, cache and decode share in sum, at the longest length."""
    expected = plan.expected[max(plan.expected)]
    return sum(expected[name] for name in ("pair_density", "cache_share", "decode_share"))


def _rank_units(plan: Plan, suspects: np.ndarray | None, bound: Bound) -> list[Unit]:
    """The kv heads that are not full, those first that the method suspects most; ahead of all those
    that are in fewer bits, to return to 16. Layers that read others' keys go with these."""
    reads = {reader for _, *readers in bound.values() for reader in readers}
    order = [x for x in np.ndindex(len(plan.layers), plan.model.kv_heads) if x[0] not in reads]
    if suspects is not None:
        order = sorted(order, key=lambda unit: -suspects[unit])
    in_few = [(*unit, 16) for unit in order if _bits_of(plan, *unit) != 16]
    return [unit for unit in (*in_few, *order) if restore(plan, [unit], bound) != plan]


def _bits_of(plan: Plan, layer: int, head: int) -> int:
    return getattr(plan.patterns.get(plan.layers[layer].cache[head]), "bits", 16)


def _search_units(
    plan: Plan, order: Sequence[Unit], criterion: Criterion, bound: Bound
) -> list[Unit]:
    """Few heads, the first of the order likely among them, that win back what is lost too much.

    Bits alone, if all of them do.
    """
    wins = criterion.wins_back(plan)

    def enough(units: Sequence[Unit]) -> bool:
        return wins(restore(plan, units, bound), f"given back: {len(units)}")

    in_few = [unit for unit in order if len(unit) > 2]
    whole = [unit for unit in order if len(unit) == 2]
    order = in_few if in_few and enough(in_few) else whole
    return drop_unneeded(shortest_prefix(order, enough), enough)


def shortest_prefix(order: Sequence[T], enough: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """The shortest prefix that bisection finds to be enough, if all of `order` is."""
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(order[:middle]) else (middle + 1, high)
    return order[:high]


def drop_unneeded(found: Sequence[T], enough: Callable[[Sequence[T]], bool]) -> list[T]:
    """What is left of `found` after MAX_TRIES tries to do without a quarter, less, single ones."""
    left, tries, size = list(found), 0, -(-len(found) // 4)
    while size:
        for end in range(len(left), 0, -size):  # the least suspicious first
            if tries == MAX_TRIES or len(left) == 1:
                return left
            without = left[: max(0, end - size)] + left[end:]
            tries += 1
            if without and enough(without):
                left = without
        size //= 2
    return left
