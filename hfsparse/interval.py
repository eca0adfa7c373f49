"""The 95 % interval of a mean over samples, for proofs and evaluations alike.

Samples (trials, texts, pairs of scores) are independent of one another. Values within one sample
are correlated in unknown ways, so only the number of samples counts as evidence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from hfsparse.errors import UsageError

MISSED = 0.05  # the share of intervals that may miss the truth


def interval(
    sums: Sequence[float], counts: Sequence[float] | None = None, worst: float | None = None
) -> tuple[float, float]:
    """95 % interval of `sum(sums) / sum(counts)`, by Student's t over samples.

    Without `counts` it is of the mean. Few samples miss what is rare, and their spread knows
    nothing of it. So where no value can change by more than `worst`, each end is that of an
    interval with one more sample, all of whose values changed by so much: about 3 / n further out
    where none changed, which is what n alike in a row leave open. UsageError for a lone sample
    without `worst`.
    """
    sums, counts = _pairs(sums, counts)
    if worst is None:
        return _ends(sums, counts)
    usual = float(counts.mean())

    def end(by: float) -> tuple[float, float]:
        return _ends(np.append(sums, by * usual), np.append(counts, usual))

    return max(-worst, end(-worst)[0]), min(worst, end(worst)[1])


def chance(sums: Sequence[float], counts: Sequence[float] | None = None) -> float:
    """One-sided p that the mean is 0 or less, by Student's t: above 0.158 where one sample alone
    differs from 0, whatever their number. Of one sample: 0 or 1, as it says itself."""
    sums, counts = _pairs(sums, counts)
    mean, error = _mean(sums, counts)
    if not error:
        return float(mean <= 0)
    return float(student.sf(mean / error, len(sums) - 1))


def _pairs(sums: Sequence[float], counts: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    sums = np.asarray(sums, float)
    return sums, np.ones(len(sums)) if counts is None else np.asarray(counts, float)


def _mean(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The ratio and its standard error (0 of a lone sample), linearised."""
    n, mean = len(sums), sums.sum() / counts.sum()
    squares = ((sums - mean * counts) ** 2).sum()
    return float(mean), float(np.sqrt(squares * n / max(n - 1, 1)) / counts.sum())


def _ends(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    if len(sums) < 2:
        raise UsageError("one sample has no interval: give two or more")
    mean, error = _mean(sums, counts)
    by = float(student.ppf(1 - MISSED / 2, len(sums) - 1)) * error
    return mean - by, mean + by
