"""The 95 % interval of a mean that may be looked at after every sample: a confidence sequence.

Who adds samples until an interval tells something looks many times, and each look is one more
chance to be wrong: `hfsparse.interval` is for a number of samples set beforehand. This one holds
the truth at all looks together in 95 % of the runs.

It is a betting interval (Waudby-Smith and Ramdas, Estimating means of bounded random variables by
betting, arXiv 2010.09686). If the mean of values x from 0 to 1 is at most m, none of the bets
1 + f * (x / m - 1), 0 <= f < 1, gains in the mean; so by Ville's inequality wealth of 1, laid on
them again and again, reaches 1 / a at any time with a chance of at most a. The wealth is split
alike among fixed f. Means m at which it has reached 2 / 0.05 are too low; 1 - x says the same of
those that are too high.
"""

from __future__ import annotations

import numpy as np

from hfsparse.interval import MISSED

BETS = 24
# The bets f lie densest near 0 and 1: small ones gain by many small changes, large ones by none.
SHARES = (1 - np.cos(np.pi * (np.arange(BETS) + 0.5) / BETS)) / 2
HALVINGS = 40  # of the span in which an end is sought


def anytime(changes: np.ndarray, worst: float = 1.0) -> tuple[float, float]:
    """The interval of the mean of `changes`, after all looks so far; from -worst to worst if none.

    changes `[blocks, strata]`: in the order in which they were drawn, each from -worst to worst.
    Changes are independent of one another. Each stratum may have a mean of its own, and a look
    comes after a whole block: factors whose means are 1 or less in the mean have a product whose
    mean is 1 or less.
    """
    values = np.clip((np.asarray(changes, float) / worst + 1) / 2, 0, 1)
    low, high = _end(values), 1 - _end(1 - values)
    return worst * (2 * low - 1), worst * (2 * high - 1)


def wealth(values: np.ndarray, mean: float) -> np.ndarray:
    """The logarithm `[blocks]` of what bets against a mean of at most this have made of 1.

    values `[blocks, strata]`: from 0 to 1. The larger `mean` (above 0), the less.
    """
    return _gain(*_count(values), mean)


def _count(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values, and how many of each had come `[blocks, different]` after each block:
    scores are few, so this is much less to work on."""
    different, places = np.unique(values, return_inverse=True)
    counts = np.zeros((len(values), len(different)))
    np.add.at(counts, (np.arange(len(values))[:, None], places.reshape(values.shape)), 1)
    return different, counts.cumsum(0)


def _gain(different: np.ndarray, counts: np.ndarray, mean: float) -> np.ndarray:
    gains = counts @ np.log1p(SHARES * (different[:, None] / mean - 1))
    return np.logaddexp.reduce(gains, axis=1) - np.log(BETS)


def _end(values: np.ndarray) -> float:
    """The largest mean that is too low, or 0."""
    low, high, counted = 0.0, 1.0, _count(values)
    for _ in range(HALVINGS if values.size else 0):
        middle = (low + high) / 2
        refused = _gain(*counted, middle).max() >= np.log(2 / MISSED)
        low, high = (middle, high) if refused else (low, middle)
    return low
