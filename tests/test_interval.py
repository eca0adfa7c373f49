"""Intervals on simulated data: how often they hold the truth, and of what chose nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hfsparse.interval import chance, interval
from hfsparse.profiler.verify.answers import estimate_loss

RUNS = 200


def drawn(rng, trials: int, values: int, loss: float, win: float, alike) -> np.ndarray:
    """Changes `[trials, values]`: 1 lost, -1 won. `alike`: the share of trials that are all of one
    value, or "rates": each trial has a rate of its own."""
    if alike == "rates":
        rates = rng.beta(0.3, 0.3 * (1 / loss - 1), (trials, 1)) if loss else np.zeros((trials, 1))
        down = rng.random((trials, values)) < rates
        return down - (~down & (rng.random((trials, values)) < win / (1 - loss))).astype(int)
    at = rng.random((trials, values))
    at = np.where(rng.random((trials, 1)) < alike, at[:, :1], at)
    return (at < loss).astype(int) - (at > 1 - win).astype(int)


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0, "rates"])
@pytest.mark.parametrize("values", [1, 3, 8])
def test_the_interval_of_24_trials_holds_the_true_loss(values, alike):
    for loss, win in [
        *((each, 0.0) for each in (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)),
        *((0.02, 0.01), (0.05, 0.05), (0.12, 0.02), (0.25, 0.05), (0.01, 0.03)),
    ]:
        rng, held = np.random.default_rng(0), 0
        for _ in range(RUNS):
            changes = drawn(rng, 24, values, loss, win, alike)
            low, high = interval(changes.sum(1), np.full(24, values), worst=1.0)
            held += low <= loss - win <= high
        assert held / RUNS >= 0.93, (loss, win)


def test_a_plan_chosen_on_some_trials_is_told_right_by_others():
    """Of 21 plans, from 20 % lost to none, the first not beyond 1 % on 24 trials is taken."""
    rng = np.random.default_rng(1)

    def draw(trials: int) -> np.ndarray:
        hang = 0.15 * (rng.random((trials, 1)) - 0.5)
        return np.clip(rng.random((trials, 4)) + hang, 0, 1)

    many, rows = draw(200_000), []
    for _ in range(2 * RUNS):
        chose, fresh = draw(24), draw(24)
        for step in range(21):
            loss = 0.2 * (1 - step / 20)
            if not estimate_loss(list((chose < loss).astype(int))).exceeds(0.01):
                break
        old, new = (estimate_loss(list((each < loss).astype(int))) for each in (chose, fresh))
        truth = (many < loss).mean()
        rows.append((truth, old.mean, new.mean, new.low <= truth <= new.high))
    truth, old, new, held = np.mean(rows, 0)
    assert truth - old > 0.005  # what chose it flatters it
    assert abs(truth - new) < 0.002
    assert held >= 0.93


def test_without_a_worst_case_it_is_students():
    some = np.random.default_rng(0).normal(3, 2, 12)
    expected = stats.ttest_1samp(some, 0).confidence_interval(0.95)
    assert interval(some) == pytest.approx((expected.low, expected.high))
    assert chance(some - 3) == pytest.approx(
        stats.ttest_1samp(some - 3, 0, alternative="greater").pvalue
    )


@pytest.mark.parametrize("n", [2, 5, 24, 400])
def test_one_sample_alone_is_never_less_likely_by_chance_than_the_limit(n):
    assert chance([1.0] + [0.0] * (n - 1)) > 0.158
    assert n < 5 or chance([1.0, 1.0] + [0.0] * (n - 2)) < 0.11


def test_a_lone_sample_tells_only_of_bounded_changes():
    assert interval([0.0], worst=1.0) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="one sample has no interval"):
        interval([0.0])
