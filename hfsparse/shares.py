"""Budgets that are a share of a number of blocks or pages: in integers, so the same everywhere.

A share is meant as it is written, to six decimals: 0.1 of 30 is 3. Floats would make it 4 where
they lie above it, and float32 at other numbers than Python.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from torch import Tensor


@lru_cache
def ratio(share: float) -> tuple[int, int]:
    """Numerator and denominator of a share of at most 1, both at most 2^20."""
    return Fraction(share).limit_denominator(1 << 20).as_integer_ratio()


def share_of(whole, numerator, denominator):
    """That share of `whole`, rounded up.

    `whole` is an integer below 2^42, or an array or tensor of them (int64). Kernels do the same.
    """
    return (whole * numerator + denominator - 1) // denominator


def whole_of(share: float, least: int) -> int:
    """The smallest whole of which that share is at least `least`, 1 or more."""
    numerator, denominator = ratio(share)
    return (least - 1) * denominator // numerator + 1


def counted(mass: Tensor) -> Tensor:
    """Parts of a whole of 1 as int64, which sum up to the same in any order."""
    return (mass * (1 << 32)).long()
