"""What a plan loses of the dense model's answers, in paired trials.

The patched model and the dense one answer the same questions on the same tokens (`trials`), of
tasks that the dense one can do (it is asked each once): on others nothing can be lost. A plan loses
too much where it loses more than the share `drop` of the values and chance does not explain it:
values whose loss changes by MARGIN or less don't count, nor does what one trial alone loses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from hfsparse.interval import chance, interval
from hfsparse.plan import Plan
from hfsparse.profiler.job import Job
from hfsparse.profiler.verify import trials
from hfsparse.profiler.verify.runs import Runs
from hfsparse.profiler.verify.trials import Trial

MARGIN = 0.1  # nats a token: a value that is lost or won by no more may have changed by chance
SOLVED = 0.5  # share of its first values that the dense model must say for a task to count
ALLOWED = 2  # values that may be lost whatever the limit
# One-sided p of a loss that counts: it is at least 0.158 where one trial alone loses, at most 0.1
# where two do.
SIGNIFICANCE = 0.15


def draw_trials(
    job: Job, indices: Iterable[int], tasks: Mapping = trials.TASKS
) -> dict[str, Trial]:
    """These trials of some tasks at each length, by a name that is their tokens'."""
    indices = list(indices)
    every = [
        trials.make_trial(job.tokenizer, n, i, job.settings.seed, tasks)
        for n in job.prompts
        for i in indices
    ]
    return {hashlib.sha256(repr(trial).encode()).hexdigest()[:12]: trial for trial in every}


def list_first_round(tasks: Mapping) -> range:
    """Indices of trials that ask each task once, known and not."""
    return range(2 * len(tasks))


def list_trials(names: Collection[str], samples: int, start: int, tasks: Mapping) -> list[int]:
    """The first `samples` trials from `start` on whose tasks have these names."""
    return list(islice((i for i in count(start) if trials.name_task(i, tasks) in names), samples))


def ask_dense(runs: Runs[Trial]) -> tuple[dict[str, float], Mapping]:
    """Share of values that the dense model says by task, and the tasks that were asked last.

    Levels of tasks are asked one by one, until it can do some.
    """
    shares: dict[str, float] = {}
    for tasks in trials.LEVELS:
        asked = draw_trials(runs.job, list_first_round(tasks), tasks)
        runs.items |= asked
        said: dict[str, list[np.ndarray]] = {}
        for name, found in runs.get(runs.dense, asked, "dense, each task once").items():
            said.setdefault(asked[name].task, []).append(found["said"])
        shares |= {task: float(np.concatenate(each).mean()) for task, each in said.items()}
        if select_solved(shares):
            break
    return shares, tasks


def select_solved(shares: Mapping[str, float]) -> set[str]:
    """Tasks that the dense model can do."""
    return {task for task, share in shares.items() if share >= SOLVED}


@dataclass
class Answers:
    """Some trials, and how much of the dense model's answers a plan may lose in them."""

    runs: Runs[Trial]
    trials: dict[str, Trial]
    drop: float

    def __post_init__(self) -> None:
        self.runs.items |= self.trials
        self.dense = self.runs.get(self.runs.dense, self.trials, "dense")

    def rejects(self, plan: Plan) -> bool:
        """Whether the plan loses too much."""
        return self.estimate(plan, MARGIN).exceeds(self.drop)

    def estimate(self, plan: Plan, margin: float = 0.0) -> Loss:
        """What the plan loses; `margin` as in `compare`."""
        return estimate_loss(list(self.compare(plan, margin).values()))

    def compare(self, plan: Plan, margin: float = 0.0) -> dict[str, np.ndarray]:
        """By trial, each value's change, as `compare_values` has it."""
        return {
            name: compare_values(self.dense[name], found, margin)
            for name, found in self.runs.get(plan, self.trials, "plan").items()
        }

    def wins_back(self, plan: Plan) -> Callable[[Plan, str], bool]:
        """Whether another plan wins back, in nats, what this one loses too much.

        The function asks the trials that lost, the shortest first and no more than decide it, and
        shows a label beside their bar.
        """
        now = self.runs.get(plan, self.trials)
        change = self.compare(plan, MARGIN)
        missed = {name: each > 0 for name, each in change.items() if (each > 0).any()}
        missed = dict(sorted(missed.items(), key=lambda item: len(self.trials[item[0]].text)))
        worse = sum(self._sum_nats(name, now[name], values) for name, values in missed.items())
        found = estimate_loss(list(change.values()))
        allowed = worse * count_allowed(self.drop, found.values) / (found.mean * found.values)

        def enough(other: Plan, label: str) -> bool:
            total = 0.0
            for name in self.runs.job.progress((label, n) for n in missed):
                total += self._sum_nats(name, self.runs.get(other, [name])[name], missed[name])
                if total > allowed:
                    return False
            return True

        return enough

    def _sum_nats(self, name: str, found: dict[str, np.ndarray], values: np.ndarray) -> float:
        """By how many nats, in sum over some values of a trial, it was predicted worse."""
        return float((found["loss"] - self.dense[name]["loss"])[values].sum())

    def report(self, plan: Plan) -> dict:
        """For `made`: what was asked and lost, and `told`, in a sentence."""
        changes = self.compare(plan)
        total, clear = estimate_loss(list(changes.values())), self.estimate(plan, MARGIN)
        tasks: dict[str, list[np.ndarray]] = {}
        for name, change in changes.items():
            tasks.setdefault(self.trials[name].task, []).append(change)
        by_chance = clear.mean > self.drop and not clear.exceeds(self.drop)
        limit = f"{100 * self.drop:g} %"
        return {
            "told": f"{100 * total.mean:.1f} % of {total.values} answers lost, 95 % interval "
            f"{100 * total.low:.1f} to {100 * total.high:.1f}, in {len(changes)} trials: "
            f"{compare_to_limit(total.low, total.high, self.drop, limit)}; "
            f"{100 * clear.mean:.1f} % clearly lost (by more than {MARGIN} nats a token)"
            f"{', which may be chance' if by_chance else ''}",
            "limit": self.drop,
            "trials": len(changes),
            "values": total.values,
            "drop": round(total.mean, 4),
            "interval": [round(total.low, 4), round(total.high, 4)],
            "clearly": round(clear.mean, 4),
            "tasks": {
                task: {"drop": round(float(np.concatenate(each).mean()), 4)}
                for task, each in tasks.items()
            },
        }


def compare_values(
    dense: dict[str, np.ndarray], found: dict[str, np.ndarray], margin: float = 0.0
) -> np.ndarray:
    """Of one trial's values: 1 lost, -1 won, 0 alike, or changed by at most `margin` nats."""
    change = dense["said"].astype(int) - found["said"].astype(int)
    by = change * (found["loss"] - dense["loss"])
    return np.where(by > margin, change, 0) if margin else change


@dataclass(frozen=True)
class Loss:
    """Values that the dense model says and the plan does not, less those the other way round."""

    mean: float  # share of all values asked
    low: float  # its 95 % interval
    high: float
    values: int
    chance: float  # one-sided p that nothing is lost

    def exceeds(self, drop: float) -> bool:
        """Whether more than this share is lost, and not by chance."""
        allowed = count_allowed(drop, self.values)
        return self.mean * self.values > allowed and self.chance < SIGNIFICANCE


def estimate_loss(changes: Sequence[np.ndarray]) -> Loss:
    """Mean change with its interval over trials: values of one trial are not independent."""
    sums, counts = (np.array([f(c) for c in changes], float) for f in (np.sum, len))
    low, high = interval(sums, counts, worst=1.0)
    mean = float(sums.sum() / counts.sum())
    return Loss(mean, low, high, int(counts.sum()), chance(sums, counts))


def count_allowed(drop: float, values: int) -> float:
    """How many of so many values may be lost."""
    return max(drop * values, ALLOWED) + 1e-6


def compare_to_limit(low: float, high: float, limit: float, shown: str) -> str:
    """What an interval says of a limit."""
    if high <= limit:
        return f"within {shown}"
    if low > limit:
        return f"more than {shown}"
    return f"more than {shown} is not shown, nor ruled out"
