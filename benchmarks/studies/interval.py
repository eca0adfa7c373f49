"""How often do the intervals of plans and of `hfsparse eval` hold the true loss? Simulated.

    python -m benchmarks.studies.interval [--runs 400] [--seed 0]

Four tables, behind docs/proof.md and docs/eval.md: the interval of a plan's proof, that of paired
scores, both kinds of interval looked at after every round of samples, and what the trials that
chose a plan tell of it beside fresh ones. Runs a minute or two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import mean

import numpy as np

from hfsparse.anytime import anytime
from hfsparse.interval import chance, interval
from hfsparse_eval.options import ROUND
from hfsparse_eval.report.statistics import change

Draw = Callable[[int, int, float], np.ndarray]  # trials, values of each, rate of loss: bool

LOSSES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
WON = 0.02  # rate of wins, in the cases that have some
VALUES = (1, 2, 4, 8)  # of a trial
CHANGED = 1 / 6  # rate of pairs whose scores differ
TRUTH = -CHANGED / 3  # their mean change
LIMIT, CHANCE = 0.01, 0.15  # `--drop`; the one-sided p below which a loss is no chance


def draws(rng: np.random.Generator) -> dict[str, Draw]:
    """How values of one trial hang together."""

    def independent(n: int, values: int, rate: float) -> np.ndarray:
        return rng.random((n, values)) < rate

    def alike(n: int, values: int, rate: float) -> np.ndarray:
        return np.repeat(rng.random((n, 1)) < rate, values, 1)

    def partly(n: int, values: int, rate: float) -> np.ndarray:
        return np.where(
            rng.random((n, values)) < 0.5, alike(n, values, rate), independent(n, values, rate)
        )

    def by_trial(n: int, values: int, rate: float) -> np.ndarray:
        """A trial's own rate: beta with the mean `rate`, half as wide as it can be."""
        rates = rng.beta(rate, 1 - rate, (n, 1)) if rate else np.zeros((n, 1))
        return rng.random((n, values)) < rates

    return {"independent": independent, "alike": alike, "partly": partly, "by trial": by_trial}


def coverage(rng: np.random.Generator, trials: int, runs: int) -> list[float]:
    """Share of runs whose interval holds the true loss, for each case."""
    found = []
    for draw in draws(rng).values():
        for values in VALUES:
            for rate, wins in [*((rate, 0.0) for rate in LOSSES), (0.05, WON)]:
                held = 0
                for _ in range(runs):
                    changes = draw(trials, values, rate).astype(float)
                    changes -= draw(trials, values, wins) if wins else 0.0
                    sums, counts = changes.sum(1), np.full(trials, values)
                    low, high = interval(sums, counts, worst=1.0)
                    held += low <= rate - wins <= high
                found.append(held / runs)
    return found


def draw_pairs(rng: np.random.Generator, n: int) -> np.ndarray:
    """Changes of paired scores: one in six is not 0, a third of these won and the others lost."""
    luck = rng.random(n)
    return np.where(luck < CHANGED / 3, 1.0, np.where(luck < CHANGED, -1.0, 0.0))


def paired(rng: np.random.Generator, n: int, runs: int) -> float:
    """Share of runs whose interval of paired scores holds the truth."""
    held = 0
    for _ in range(runs):
        seen = change([0.0] * n, draw_pairs(rng, n).tolist())
        held += seen.low <= 100 * TRUTH <= seen.high
    return held / runs


def looked_at(rng: np.random.Generator, n: int, runs: int) -> dict[str, float]:
    """Share of runs in which an interval holds the truth after every round of 8 samples up to n."""
    held = {"set beforehand": 0, "at any time": 0}
    for _ in range(runs):
        changes = draw_pairs(rng, n)
        ends = range(ROUND, n + 1, ROUND)
        usual = [change([0.0] * end, changes[:end].tolist()) for end in ends]
        low, high = anytime(changes[:, None])  # of all looks together
        held["set beforehand"] += all(x.low <= 100 * TRUTH <= x.high for x in usual)
        held["at any time"] += low <= TRUTH <= high
    return {name: count / runs for name, count in held.items()}


def choose(rng: np.random.Generator, runs: int, trials: int = 24, values: int = 4) -> dict:
    """The first of 21 plans, from 20 % of loss to none, that isn't beyond the limit is taken.

    All are asked the same trials; fresh ones then tell of the one that was taken.
    """
    told, true, fresh, broken = [], [], [], 0
    for _ in range(runs):
        asked, again = rng.random((2, trials, values))
        for rate in np.linspace(0.2, 0, 21):
            if not beyond(asked < rate):
                break
        told.append((asked < rate).mean())
        fresh.append((again < rate).mean())
        true.append(rate)
        broken += beyond(again < rate)
    return {
        "trials that chose": mean(told),
        "true": mean(true),
        "fresh trials": mean(fresh),
        "beyond the limit by fresh trials": broken / runs,
    }


def beyond(lost: np.ndarray) -> bool:
    """As a proof judges losses [trials, values]: above the limit, above two, and not by luck."""
    sums, counts = lost.sum(1).astype(float), np.full(len(lost), lost.shape[1])
    return sums.sum() > max(LIMIT * lost.size, 2) and chance(sums, counts) < CHANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=400, help="of each case")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    print("| trials | least coverage | mean |\n| --- | --- | --- |", flush=True)
    for trials in (6, 12, 24, 48):
        found = coverage(rng, trials, args.runs)
        print(f"| {trials} | {100 * min(found):.1f} % | {100 * mean(found):.1f} % |", flush=True)
    print("\n| pairs | coverage |\n| --- | --- |")
    for n in (20, 50, 100):
        print(f"| {n} | {100 * paired(rng, n, 5 * args.runs):.1f} % |", flush=True)
    print(
        "\n| interval looked at after every round of 8, up to 400 pairs | coverage |\n| --- | --- |"
    )
    for name, share in looked_at(np.random.default_rng(args.seed), 400, args.runs).items():
        print(f"| {name} | {100 * share:.1f} % |", flush=True)
    print("\n| of a plan's loss | % |\n| --- | --- |")
    for name, share in choose(rng, 5 * args.runs // 2).items():
        print(f"| {name} | {100 * share:.1f} |")


if __name__ == "__main__":
    main()
