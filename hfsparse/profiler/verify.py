"""Prove a plan on paired trials, and give heads back until no more than a stated share is lost.

The patched model and the dense one answer the same questions on the same tokens (`trials`). If the
plan loses too much, each layer in turn is given back (made full) on the trials that lost most; in
the order of what that wins, bisection finds the fewest layers, then in them the fewest kv heads,
with which the plan keeps within the drop. What was asked and lost is written into `plan.made`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from typing import TypeVar

import numpy as np
from scipy.stats import bootstrap

from hfsparse.patcher import patch
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler import trials
from hfsparse.profiler.job import Job
from hfsparse.profiler.search import used
from hfsparse.profiler.trials import Trial

ABLE = 0.5  # a task counts if the dense model says so large a share of its values
LOOKED = 2  # trials, those that lost most, on which single layers and heads are given back

Unit = tuple[int, int]  # layer, kv head
T = TypeVar("T")


def asked(job: Job, samples: int) -> dict[str, Trial]:
    """So many trials at each of the job's lengths, by a name that stands for their tokens."""
    every = [
        trials.make(job.tokenizer, n, i, job.seed) for n in job.prompts for i in range(samples)
    ]
    return {hashlib.sha256(repr(trial).encode()).hexdigest()[:12]: trial for trial in every}


def refine(job: Job, plan: Plan, drop: float, asked: dict[str, Trial]) -> Plan:
    """`plan`, or more of it full, that loses at most the share `drop` of these trials' answers.

    Lost is what the dense model says and the plan doesn't, less what only the plan says.
    `made["verified"]` says what was found.
    """
    start, given = time.time(), []
    pair = Pair(job, asked, {})
    pair.dense = pair.run(Plan.full(ModelId.of(job.model)), asked, "dense")
    if pair.counted and pair.lost(plan).mean > drop:
        given = _given(pair, plan, drop)
    final = full(plan, given)
    if given:
        final.expected = {} if job.expect is None else job.expect(final.layers)
    final.made = plan.made | {
        "verified": {
            "lengths": list(job.prompts),
            "limit": drop,
            **pair.report(final),
            "given_back": [f"layer {at} kv head {g}" for at, g in given],
            "seconds": round(time.time() - start, 1),
        }
    }
    return final


@dataclass
class Pair:
    """Trials, what the dense model says in them, and what plans do."""

    job: Job
    asked: dict[str, Trial]
    dense: dict[str, dict[str, np.ndarray]]
    found: dict[tuple[str, str], dict[str, np.ndarray]] = field(default_factory=dict)

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

    @property
    def counted(self) -> dict[str, Trial]:
        """Trials of tasks that the dense model can do: on others nothing can be lost."""
        able = {task for task, share in self.tasks.items() if share >= ABLE}
        return {name: trial for name, trial in self.asked.items() if trial.task in able}

    def changes(self, plan: Plan) -> dict[str, np.ndarray]:
        """By trial that counts, each value's change: 1 lost, 0 alike, -1 won."""
        return {
            name: self.dense[name]["said"].astype(int) - found["said"].astype(int)
            for name, found in self.run(plan, self.counted, "plan").items()
        }

    def lost(self, plan: Plan) -> Lost:
        return lost(list(self.changes(plan).values()))

    def report(self, plan: Plan) -> dict:
        """For `made`: what the dense model says, and what of it the plan loses."""
        tasks = {task: {"dense": round(share, 4)} for task, share in self.tasks.items()}
        if not self.counted:
            return {"told": "nothing: the dense model can do none of these tasks", "tasks": tasks}
        changes = self.changes(plan)
        for task in {trial.task for trial in self.counted.values()}:
            each = [c for name, c in changes.items() if self.asked[name].task == task]
            tasks[task]["drop"] = round(float(np.concatenate(each).mean()), 4)
        total = lost(list(changes.values()))
        low, high = 100 * total.low, 100 * total.high
        return {
            "told": f"{100 * total.mean:.1f} % of {total.values} answers lost, 95 % interval "
            f"{low:.1f} to {high:.1f}, in {len(changes)} trials",
            "trials": len(changes),
            "values": total.values,
            "drop": round(total.mean, 4),
            "interval": [round(total.low, 4), round(total.high, 4)],
            "tasks": tasks,
        }


@dataclass(frozen=True)
class Lost:
    """Values that the dense model says and the plan does not, less those the other way round."""

    mean: float  # share of all values asked
    low: float  # its 95 % interval
    high: float
    values: int


def lost(changes: Sequence[np.ndarray]) -> Lost:
    """Mean change with its interval, by a bootstrap over trials: values of one hang together."""
    sums, counts = (np.array([f(c) for c in changes], float) for f in (np.sum, len))
    mean, n, values = float(sums.sum() / counts.sum()), len(changes), int(counts.sum())
    if not sums.any():  # n alike in a row: exact, by trials
        return Lost(mean, 0.0, 1 - 0.05 ** (1 / n), values)
    if n == 1:
        return Lost(mean, -1.0, 1.0, values)
    around = bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Lost(mean, float(around.low), float(around.high), values)


def full(plan: Plan, units: Sequence[Unit]) -> Plan:
    """The plan with these kv heads, and the q heads of their groups, full."""
    layers, group = list(plan.layers), plan.model.q_heads // plan.model.kv_heads
    for at, g in units:
        prefill, cache, decode = (list(words) for words in vars(layers[at]).values())
        prefill[g * group : (g + 1) * group] = ["full"] * group
        cache[g] = decode[g] = "full"
        layers[at] = Layer(tuple(prefill), tuple(cache), tuple(decode))
    return replace(plan, layers=tuple(layers), patterns=used(plan.patterns, tuple(layers)))


def _given(pair: Pair, plan: Plan, drop: float) -> list[Unit]:
    """The fewest kv heads found that, given back, keep the plan within the drop."""
    changes = pair.changes(plan)
    worst = sorted(changes, key=lambda name: -changes[name].sum())[:LOOKED]
    looked = {name: pair.asked[name] for name in worst if changes[name].sum() > 0}

    def ranked(choices: Sequence[list[Unit]], what: str) -> list[list[Unit]]:
        """These groups of heads, the one that wins most when given back first."""
        left = []
        for units in pair.job.progress((f"{what} {i}", c) for i, c in enumerate(choices)):
            found = pair.run(full(plan, units), looked).values()
            left.append(np.concatenate([each["loss"] for each in found]).mean())
        return [choices[i] for i in np.argsort(left, kind="stable")]

    def enough(choices: Sequence[list[Unit]]) -> bool:
        return pair.lost(full(plan, [*chain(*choices)])).mean <= drop

    sparse = [
        unit
        for unit in np.ndindex(len(plan.layers), plan.model.kv_heads)
        if full(plan, [unit]) != plan
    ]
    layers = [list(units) for _, units in groupby(sparse, key=lambda unit: unit[0])]
    layers = fewest(ranked(layers, "layer given back"), enough)
    heads = [[unit] for units in layers for unit in units]
    return sorted(chain(*fewest(ranked(heads, "head given back"), enough)))


def fewest(order: Sequence[T], enough: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """The shortest start of `order` that bisection finds to be enough; the whole of it is."""
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(order[:middle]) else (middle + 1, high)
    return order[:high]
