"""The statistics of pairs, against numbers known otherwise and on simulated data."""

import numpy as np
import pytest
from scipy.stats import binom, norm

from hfsparse.interval import interval
from hfsparse_eval.report.statistics import change, mcnemar
from hfsparse_eval.report.verdict import verdict


@pytest.mark.parametrize(
    ("dense", "sparse", "expected"),
    [
        ([1.0] * 8, [1.0] * 8, "0.0, no difference seen; up to 31 % of samples could differ"),
        ([1.0], [1.0], "0.0, no difference seen; up to 95 % of samples could differ"),
        ([0.2] * 300, [0.2] * 300, "0.0, no difference seen; up to 1 % of samples could differ"),
        ([1.0], [0.5], "-50.0, one sample"),
        ([0.5, 0.5], [1.0, 1.0], "+50.0, all 2 alike"),
    ],
)
def test_differences_that_no_bootstrap_can_take(dense, sparse, expected):
    assert str(change(dense, sparse)) == expected


def test_the_interval_is_the_one_known_for_a_large_sample():
    # 400 changes of 0 and -100 points, a quarter of them -100: normal theory gives -25 +- 4.24
    low, high = interval([-100.0, 0.0, 0.0, 0.0] * 100)
    assert low == pytest.approx(-29.24, abs=0.6)
    assert high == pytest.approx(-20.76, abs=0.6)
    assert (low, high) == interval([-100.0, 0.0, 0.0, 0.0] * 100)


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    """300 runs of 100 pairs: answers of several values, one in six samples changed."""
    random, runs = np.random.default_rng(0), 300
    values, chances = np.array([-100.0, -50, 0, 50, 100]), [0.07, 0.05, 0.83, 0.02, 0.03]
    true = values @ chances
    drawn = random.choice(values, p=chances, size=(runs, 100))
    covered = sum(low <= true <= high for low, high in map(interval, drawn))
    assert binom.ppf(0.005, runs, 0.95) <= covered <= binom.ppf(0.995, runs, 0.95)


def test_pairs_that_are_all_alike_bound_what_was_not_seen():
    unseen = change([1.0] * 59, [1.0] * 59)  # 0.95 ** 59 < 0.05: 5 % of samples would have shown
    assert (unseen.low, unseen.high) == pytest.approx((-4.95, 4.95), abs=0.01)
    lost = change([1.0] * 59, [0.0] * 59)
    assert (lost.mean, lost.low) == (-100, -100)
    assert lost.high == pytest.approx(-100 + 2 * 4.95, abs=0.02)


def test_mcnemars_p_is_exact_and_near_its_normal_form_for_many():
    assert mcnemar([True] * 6, [False] * 6) == pytest.approx(2 * 0.5**6)
    assert mcnemar([True, False, True], [True, False, True]) == 1.0
    dense, sparse = [True] * 60 + [False] * 40, [False] * 60 + [True] * 40
    assert mcnemar(dense, sparse) == pytest.approx(2 * norm.sf((60 - 40 - 1) / 10), abs=0.002)


SHARES = {"pair density": 0.222, "KV share": None}


@pytest.mark.parametrize(
    ("changes", "promise", "expected"),
    [
        ((-0.4, -1.0, 0.2), {"limit": 0.01}, "drop 0.4 ± 0.6 points at pair density 0.22: within"),
        ((-0.4, -1.2, 0.4), {"limit": 0.01}, "not decided against the promised 1.0: 100 samples"),
        ((-4.0, -6.0, -1.5), {"limit": 0.01}, "drop 4.0 ± 2.2 points at pair density 0.22: beyond"),
        ((0.02, -0.3, 0.3), {}, "drop 0.0 ± 0.3 points at pair density 0.22: no promise is stated"),
        (
            (0.0, -0.2, 0.2),
            {"limit": 0.01, "lengths": [1024, 2048]},
            "within the promised 1.0 (promised at 1024, 2048 tokens; here also 4096)",
        ),
    ],
)
def test_a_plan_is_judged_by_its_own_promise(changes, promise, expected):
    from hfsparse_eval.report.statistics import Change

    seen = Change(100, *changes, alike=False)
    assert expected in verdict(seen, SHARES, promise, [2048, 4096])


def test_no_pairs_are_no_verdict():
    assert verdict(None, SHARES, {"limit": 0.01}).startswith("nothing to judge")
