"""The interval that may be looked at after every sample, on simulated pairs."""

import numpy as np
import pytest
from scipy import stats

from hfsparse.anytime import anytime, wealth
from hfsparse.interval import MISSED

RUNS, BLOCKS, FIRST = 300, 150, 8  # FIRST: samples before Student's interval is looked at
THREE = (-1.0, 0.0, 1.0)  # an answer lost, kept, won
# Values of a change and their chances, for each stratum of a block.
DRAWN = {
    "one in two hundred is lost": [(THREE, (0.005, 0.995, 0))],
    "one in twenty is lost": [(THREE, (0.05, 0.95, 0))],
    "lost and won alike, seldom": [(THREE, (0.02, 0.96, 0.02))],
    "lost and won alike, often": [(THREE, (0.5, 0, 0.5))],
    "nearly all is lost": [(THREE, (0.97, 0.03, 0))],
    "parts of an answer": [(np.linspace(-1, 1, 11), np.full(11, 1 / 11))],
    "one task of four loses all": [(THREE, (1, 0, 0)), *3 * [(THREE, (0, 1, 0))]],
    "tasks that lose, win and do neither": [
        (THREE, (0.3, 0.7, 0)),
        (THREE, (0.05, 0.75, 0.2)),
        (THREE, (0, 1, 0)),
    ],
}


def draw(name: str) -> tuple[np.ndarray, float]:
    """Changes `[runs, blocks, strata]` and their true mean."""
    rng = np.random.default_rng(0)
    each = [rng.choice(values, (RUNS, BLOCKS), p=chances) for values, chances in DRAWN[name]]
    return np.stack(each, 2), np.mean([np.dot(*stratum) for stratum in DRAWN[name]])


@pytest.mark.parametrize("name", DRAWN)
def test_it_holds_the_truth_at_every_look_together(name):
    changes, truth = draw(name)
    values, mean = (changes + 1) / 2, (truth + 1) / 2
    refused = [
        max(wealth(run, mean).max(), wealth(1 - run, 1 - mean).max()) >= np.log(2 / MISSED)
        for run in values
    ]
    assert np.mean(refused) <= MISSED
    for run, missed in zip(changes[:20], refused, strict=False):  # the ends say what wealth says
        low, high = anytime(run)
        assert (low <= truth <= high) != missed


@pytest.mark.parametrize("name", ["lost and won alike, often", "parts of an answer"])
def test_students_interval_looked_at_as_often_does_not(name):
    changes, truth = draw(name)
    n = np.arange(1, BLOCKS + 1)
    means = changes[..., 0].cumsum(1) / n
    squares = (changes[..., 0] ** 2).cumsum(1) / n - means**2
    half = stats.t.ppf(1 - MISSED / 2, n - 1) * np.sqrt(squares.clip(0) / (n - 1).clip(1))
    outside = (abs(means - truth) > half)[:, FIRST:]
    assert outside[:, -1].mean() < 0.1  # at one look it is right
    assert outside.any(1).mean() > 0.15


def test_clear_losses_are_told_soon_and_small_limits_take_their_time():
    def first(changes, wanted) -> int:
        return next(n for n in range(1, len(changes)) if wanted(*anytime(changes[:n])))

    lost = np.random.default_rng(0).random((200, 1)) < 0.5
    assert first(-lost.astype(float), lambda low, high: high < -0.01) <= 20
    assert first(np.zeros((60, 1)), lambda low, high: low >= -0.1) <= 50  # 5 / limit
    assert anytime(np.zeros((500, 1)))[0] == pytest.approx(-0.01, abs=2e-4)


def test_worst_is_only_a_unit_and_no_sample_tells_nothing():
    changes = np.random.default_rng(0).uniform(-1, 1, (30, 3))
    low, high = anytime(changes)
    assert anytime(100 * changes, worst=100) == pytest.approx((100 * low, 100 * high))
    assert -1 < low < changes.mean() < high < 1
    assert anytime(np.empty((0, 1))) == (-1, 1)
    assert anytime(-changes) == pytest.approx((-high, -low))
