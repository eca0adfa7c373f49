"""What pairs of scores tell: the mean change with its interval, and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from hfsparse.interval import interval


@dataclass(frozen=True)
class Change:
    """Sparse minus dense, in points: the mean of `n` samples and its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float
    alike: bool  # whether every sample changed by the same
    # Samples of each task, length and depth, if the interval holds at any number of them:
    each: int | None = None

    def __str__(self) -> str:
        if not self.alike:
            return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"
        if not self.mean:
            unseen = 100 * _unseen(self.n)
            return f"0.0, no difference seen; up to {unseen:.0f} % of samples could differ"
        return f"{self.mean:+.1f}, " + (f"all {self.n} alike" if self.n > 1 else "one sample")


def change(dense: Sequence[float], sparse: Sequence[float]) -> Change:
    """From scores of 0 to 1, in the same order; ValueError for none.

    The interval is Student's over samples. Of samples that are all alike it is what a share of
    others, as large as could be missed by chance, might do at worst.
    """
    changes = [100 * (s - d) for d, s in zip(dense, sparse, strict=True)]
    n, middle = len(changes), mean(changes)
    if len(set(changes)) > 1:
        return Change(n, middle, *interval(changes), alike=False)
    share = _unseen(n)
    low, high = middle - share * (100 + middle), middle + share * (100 - middle)
    return Change(n, middle, low, high, alike=True)


def mcnemar(dense: Sequence[bool], sparse: Sequence[bool]) -> float:
    """Exact two-sided p that a sample is as likely to be lost as won (McNemar 1947)."""
    from scipy.stats import binomtest

    pairs = list(zip(dense, sparse, strict=True))
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def _unseen(n: int) -> float:
    """The largest share of samples of which n in a row show none, once in twenty; about 3 / n."""
    return 1 - 0.05 ** (1 / n)
