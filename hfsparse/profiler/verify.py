"""Try a plan on paired trials; give heads back, or widen budgets, until it loses little enough.

The patched model and the dense one answer the same questions on the same tokens (`trials`), of
tasks that the dense one can do (it is asked each once): on others nothing can be lost. A plan loses
too much where it loses more than the share `drop` of the values and chance does not explain
it: values said by a hair, which turn with any change, don't count, nor does what one trial alone
loses. Then kv heads are given back (made full), those first that the method thinks lose most
(`job.suspects`). Only the trials that lost are asked again, the shortest first: bisection finds how
many heads win back what is lost too much, in nats, and those that are not needed are taken away.
Then all trials are asked again; while they lose too much, half as many heads again are given back.
Many heads that lose a little are budgets that are too small. So a method that can choose anew
(`job.choose`) does it within wider ones, as long as it then uses less than with the heads given
back, and the plan of the smallest that bisection finds is taken in place of that one.
What was asked and lost, and what that leaves open, is written into `plan.made`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count, islice
from typing import TypeVar

import numpy as np
from scipy.stats import bootstrap

from hfsparse.patcher import patch
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler import trials
from hfsparse.profiler.allocate import Budget
from hfsparse.profiler.job import Job
from hfsparse.profiler.search import used
from hfsparse.profiler.trials import Trial
from hfsparse.selectors.reuse import Reuse

HAIR = 0.1  # nats a token that a value turned by, at most, when it turned by chance
ABLE = 0.5  # a task counts if the dense model says so large a share of its first values
FEW = 2  # values that may be lost whatever the limit
CHANCE = 0.15  # of bootstrap draws lose nothing: 0.36 where one trial loses, 0.13 where two do
TRIES = 8  # at most, to do without heads that a search has given back
WIDER = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # of the way from the budgets to dense attention

Unit = tuple[int, int]  # layer, kv head
T = TypeVar("T")


def draw(
    job: Job, samples: int = trials.ROUND, tasks: Collection[str] | None = None
) -> dict[str, Trial]:
    """The first trials, or those of some tasks, at each length, by a name that is their tokens'."""
    of = (i for i in count() if tasks is None or trials.task_of(i) in tasks)
    first = list(islice(of, samples))
    every = [trials.make(job.tokenizer, n, i, job.seed) for n in job.prompts for i in first]
    return {hashlib.sha256(repr(trial).encode()).hexdigest()[:12]: trial for trial in every}


def refine(job: Job, plan: Plan, drop: float, samples: int) -> Plan:
    """`plan`, more of it full, or one of wider budgets, that loses no more than `drop` allows.

    `samples` trials a length are asked, of tasks that the dense model can do once it has been asked
    each task. Lost is what it says and the plan doesn't, less what only the plan says; clearly
    lost, and that counts against `drop`, where a value got worse by more than HAIR.
    `made["verified"]` says what was found.
    """
    start, given, budget, pair = time.time(), [], job.budget, Pair(job)
    pair.ask(draw(job))
    able = {task for task, share in pair.tasks.items() if share >= ABLE}
    pair.counted = draw(job, samples, able) if able else {}
    pair.ask(pair.counted)
    if pair.counted and pair.lost(plan, HAIR).beyond(drop):
        given = _given(pair, plan, drop)
    final = full(plan, given)
    if given:
        final.expected = {} if job.expect is None else job.expect(final.layers)
    if given and job.choose and (found := _cheaper(pair, plan, drop, final)):
        given, (budget, final) = [], found
    wider = {k: v for k, v in asdict(budget).items() if v != getattr(job.budget, k)}
    final.made = plan.made | {
        "verified": {
            "lengths": list(job.prompts),
            "limit": drop,
            **pair.report(final, drop),
            **({"budgets": wider} if wider else {}),
            "given_back": [f"layer {at} kv head {g}" for at, g in given],
            "seconds": round(time.time() - start, 1),
        }
    }
    return final


@dataclass
class Pair:
    """Trials, what the dense model says in them, and what plans do."""

    job: Job
    asked: dict[str, Trial] = field(default_factory=dict)
    counted: dict[str, Trial] = field(default_factory=dict)  # of tasks that the dense model can do
    dense: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    found: dict[tuple[str, str], dict[str, np.ndarray]] = field(default_factory=dict)

    def ask(self, asked: dict[str, Trial]) -> None:
        """Have the dense model answer these trials, too."""
        self.asked |= asked
        self.dense |= self.run(Plan.full(ModelId.of(self.job.model)), asked, "dense")

    def run(
        self, plan: Plan, asked: dict[str, Trial], label: str | None = None
    ) -> dict[str, dict[str, np.ndarray]]:
        """What the model patched with `plan` says in each of these trials; a label shows a bar."""
        mark = plan.hash()[7:19]
        todo = [(f"{label}: {asked[n].task}", n) for n in asked if (mark, n) not in self.found]
        with patch(self.job.model, plan):
            for n in self.job.progress(todo) if label else (n for _, n in todo):
                compute = partial(trials.run, self.job.model, asked[n])
                self.found[mark, n] = self.job.parts.get(f"trial-{n}-{mark}", compute)
        return {n: self.found[mark, n] for n in asked}

    @property
    def tasks(self) -> dict[str, float]:
        """Share of values that the dense model says, by task."""
        said: dict[str, list[np.ndarray]] = {}
        for name, trial in self.asked.items():
            said.setdefault(trial.task, []).append(self.dense[name]["said"])
        return {task: float(np.concatenate(each).mean()) for task, each in said.items()}

    def changes(self, plan: Plan, hair: float = 0.0) -> dict[str, np.ndarray]:
        """By trial that counts, each value's change: 1 lost, 0 alike, -1 won.

        Alike are, too, values that turned by no more than `hair` nats a token.
        """
        return {
            name: turned(self.dense[name], found, hair)
            for name, found in self.run(plan, self.counted, "plan").items()
        }

    def within(self, plan: Plan, missed: dict[str, np.ndarray], most: float, label: str) -> bool:
        """Whether the values `missed`, by trial, are together at most `most` nats worse than dense.

        Runs no more trials than tell it.
        """
        total = 0.0
        for name in self.job.progress((label, n) for n in missed):
            found = self.run(plan, {name: self.asked[name]})[name]
            total += self.worse(name, found, missed[name])
            if total > most:
                return False
        return True

    def worse(self, name: str, found: dict[str, np.ndarray], values: np.ndarray) -> float:
        """By how many nats, in sum over some values of a trial, it was predicted worse."""
        return float((found["loss"] - self.dense[name]["loss"])[values].sum())

    def lost(self, plan: Plan, hair: float = 0.0) -> Lost:
        return lost(list(self.changes(plan, hair).values()))

    def report(self, plan: Plan, drop: float) -> dict:
        """For `made`: what the dense model says, and what of it the plan loses."""
        tasks = {task: {"dense": round(share, 4)} for task, share in self.tasks.items()}
        if not self.counted:
            return {"told": "nothing: the dense model can do none of these tasks", "tasks": tasks}
        changes = self.changes(plan)
        for task in {trial.task for trial in self.counted.values()}:
            each = [c for name, c in changes.items() if self.asked[name].task == task]
            tasks[task]["drop"] = round(float(np.concatenate(each).mean()), 4)
        total, clear = lost(list(changes.values())), self.lost(plan, HAIR)
        low, high = 100 * total.low, 100 * total.high
        chance = clear.mean > drop and not clear.beyond(drop)
        return {
            "told": f"{100 * total.mean:.1f} % of {total.values} answers lost, 95 % interval "
            f"{low:.1f} to {high:.1f}, in {len(changes)} trials: {total.against(drop)}; "
            f"{100 * clear.mean:.1f} % clearly lost (by more than {HAIR} nats a token)"
            f"{', which may be chance' if chance else ''}",
            "trials": len(changes),
            "values": total.values,
            "drop": round(total.mean, 4),
            "interval": [round(total.low, 4), round(total.high, 4)],
            "clearly": round(clear.mean, 4),
            "tasks": tasks,
        }


def turned(
    dense: dict[str, np.ndarray], found: dict[str, np.ndarray], hair: float = 0.0
) -> np.ndarray:
    """Of one trial's values: 1 lost, -1 won, 0 alike or turned by no more than `hair` nats."""
    change = dense["said"].astype(int) - found["said"].astype(int)
    by = change * (found["loss"] - dense["loss"])
    return np.where(by > hair, change, 0) if hair else change


@dataclass(frozen=True)
class Lost:
    """Values that the dense model says and the plan does not, less those the other way round."""

    mean: float  # share of all values asked
    low: float  # its 95 % interval
    high: float
    values: int
    chance: float  # share of bootstrap draws that lose nothing

    def beyond(self, drop: float) -> bool:
        """Whether more than this share is lost, and not by chance."""
        return self.mean * self.values > most(drop, self.values) and self.chance < CHANCE

    def against(self, drop: float) -> str:
        """What the interval says of a limit."""
        limit = f"{100 * drop:g} %"
        if self.high <= drop:
            return f"within {limit}"
        if self.low > drop:
            return f"more than {limit}"
        return f"more than {limit} is not shown, nor ruled out"


def lost(changes: Sequence[np.ndarray]) -> Lost:
    """Mean change with its interval, by a bootstrap over trials: values of one hang together."""
    sums, counts = (np.array([f(c) for c in changes], float) for f in (np.sum, len))
    mean, n, values = float(sums.sum() / counts.sum()), len(changes), int(counts.sum())
    if not sums.any():  # n alike in a row: exact, by trials
        return Lost(mean, 0.0, 1 - 0.05 ** (1 / n), values, 1.0)
    if n == 1:
        return Lost(mean, -1.0, 1.0, values, float(mean <= 0))
    drawn = bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    around, chance = drawn.confidence_interval, float((drawn.bootstrap_distribution <= 0).mean())
    return Lost(mean, float(around.low), float(around.high), values, chance)


def most(drop: float, values: int) -> float:
    """How many of so many values may be lost."""
    return max(drop * values, FEW) + 1e-6


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


def _given(pair: Pair, plan: Plan, drop: float) -> list[Unit]:
    """Few kv heads that, given back, keep the plan within the drop."""
    order, given = _order(pair.job, plan), []
    while pair.lost(full(plan, given), HAIR).beyond(drop):
        rest = [unit for unit in order if unit not in given]
        given += rest[: max(1, len(given) // 2)] if given else _found(pair, plan, drop)
    return sorted(given)


def _cheaper(pair: Pair, plan: Plan, drop: float, other: Plan) -> tuple[Budget, Plan] | None:
    """Wider budgets and their plan that keeps within the drop and uses less than the other, if any.

    Bisection looks for the smallest that win back what `plan` loses too much, then all trials are
    asked, of wider ones, too, until they lose little enough.
    """
    found = []
    for budget in map(pair.job.budget.wider, WIDER):
        wide = pair.job.choose(budget)
        if wide is None:
            continue
        if _use(wide) >= _use(other):  # so do all that are wider still
            break
        found.append((budget, wide))
    if not found:
        return None
    wins = _wins_back(pair, plan, drop)

    def enough(steps: Sequence[tuple[Budget, Plan]]) -> bool:
        budget, wide = steps[-1]
        return wins(wide, f"budgets widened, cache {budget.cache:g}")

    first = len(fewest(found, enough)) - 1
    good = (step for step in found[first:] if not pair.lost(step[1], HAIR).beyond(drop))
    return next(good, None)


def _use(plan: Plan) -> float:
    """Expected pair density, cache and decode share in sum, at the longest length."""
    expected = plan.expected[max(plan.expected)]
    return sum(expected[name] for name in ("pair_density", "cache_share", "decode_share"))


def _order(job: Job, plan: Plan) -> list[Unit]:
    """The kv heads that are not full, those first that the method suspects most."""
    units = np.ndindex(len(plan.layers), plan.model.kv_heads)
    order = [unit for unit in units if full(plan, [unit]) != plan]
    return order if job.suspects is None else sorted(order, key=lambda unit: -job.suspects[unit])


def _found(pair: Pair, plan: Plan, drop: float) -> list[Unit]:
    """Few heads, the most suspicious likely among them, that win back what is lost too much."""
    wins = _wins_back(pair, plan, drop)

    def enough(units: Sequence[Unit]) -> bool:
        return wins(full(plan, units), f"given back: {len(units)}")

    return fewer(fewest(_order(pair.job, plan), enough), enough)


def _wins_back(pair: Pair, plan: Plan, drop: float) -> Callable[[Plan, str], bool]:
    """Tells of another plan whether it wins back what this one loses too much, in nats.

    It asks the trials that lost, and shows a label beside their bar.
    """
    now = pair.run(plan, pair.counted)
    change = pair.changes(plan, HAIR)
    missed = {name: each > 0 for name, each in change.items() if (each > 0).any()}
    missed = dict(sorted(missed.items(), key=lambda item: len(pair.asked[item[0]].text)))
    worse = sum(pair.worse(name, now[name], values) for name, values in missed.items())
    found = lost(list(change.values()))
    allowed = worse * most(drop, found.values) / (found.mean * found.values)
    return lambda other, label: pair.within(other, missed, allowed, label)


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
