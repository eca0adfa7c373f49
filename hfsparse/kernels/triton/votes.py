"""Votes of units, of scores and totals that are written (`scores.py`), and how many are read."""

from __future__ import annotations

import triton
import triton.language as tl

FIRST, LAST = tl.constexpr(0x3F800000), tl.constexpr(0x43160000)  # bits of 1.0 and 150.0
SUM_ONE = tl.constexpr(float(1 << 32))  # what a weight of 1 is in sums


@triton.jit
def _row(X, row, at, width):
    return tl.load(X + row * width + at, at < width, 0.0)


@triton.jit
def _largest(a, b, c, d, e, f, g, h):
    return tl.maximum(a, e), tl.maximum(b, f), tl.maximum(c, g), tl.maximum(d, h)


@triton.jit
def _sum(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def keys_in(count, length, UNIT: tl.constexpr):
    """Keys in units of which the last is the row's last."""
    return count.to(tl.int64) * UNIT - (tl.cdiv(length, UNIT) * UNIT - length)


@triton.jit
def weight(x, top):
    """2^x of 2^top, as an integer: the sum of these is the same in any order."""
    return (tl.exp2(x - top) * SUM_ONE).to(tl.int64)


@triton.jit
def _total(top, mass):
    return top + tl.log2(mass.to(tl.float32) / SUM_ONE)


@triton.jit
def _totals(a, b, c, d):
    """log2 of the sum of 2^x, of four rows at a time: a reduction is mostly waiting."""
    i, j, k, m = tl.reduce((a, b, c, d), 0, _largest)
    # Summed as integers: whatever the order, hence the size, totals have the same bits.
    weights = weight(a, i), weight(b, j), weight(c, k), weight(d, m)
    e, f, g, h = tl.reduce(weights, 0, _sum)
    return _total(i, e), _total(j, f), _total(k, g), _total(m, h)


@triton.jit
def ranks(
    SCORES, TOTALS, head, unit, total, queries, tiles, SIZE: tl.constexpr, TILE: tl.constexpr
):
    """1 and the costs of some units of a row.

    A unit's cost is how often 1 is halved to give its vote, the largest of its shares of the
    queries' softmax. Of a vote that float32 has as 0 it is 149.
    """
    tile = tl.arange(0, SIZE // TILE)
    cost = tl.full(unit.shape, 149.0, tl.float32)
    for first in range(0, queries, 4):
        a = head * queries + first
        b = head * queries + tl.minimum(first + 1, queries - 1)
        c = head * queries + tl.minimum(first + 2, queries - 1)
        d = head * queries + tl.minimum(first + 3, queries - 1)
        score_a = _row(SCORES, a, unit, tiles * TILE)  # they come while totals are made
        score_b = _row(SCORES, b, unit, tiles * TILE)
        score_c = _row(SCORES, c, unit, tiles * TILE)
        score_d = _row(SCORES, d, unit, tiles * TILE)
        whole_a, whole_b, whole_c, whole_d = _totals(
            tl.where(tile * TILE < total, _row(TOTALS, a, tile, tiles), float("-inf")),
            tl.where(tile * TILE < total, _row(TOTALS, b, tile, tiles), float("-inf")),
            tl.where(tile * TILE < total, _row(TOTALS, c, tile, tiles), float("-inf")),
            tl.where(tile * TILE < total, _row(TOTALS, d, tile, tiles), float("-inf")),
        )
        cost = tl.minimum(cost, tl.minimum(whole_a - score_a, whole_b - score_b))
        cost = tl.minimum(cost, tl.minimum(whole_c - score_c, whole_d - score_d))
    return tl.maximum(cost, 0.0) + 1.0


@triton.jit
def newest_unit(length, Q, PAGE: tl.constexpr, EACH: tl.constexpr):
    """The first unit of the pages that hold the row's new queries."""
    return tl.maximum(length - Q, 0) // PAGE * EACH


@triton.jit
def budget_of(total, newest, part, whole, fewest, EACH: tl.constexpr):
    """How many of a row's units are read by share, and how many of them in any case."""
    forced = tl.minimum(total - newest + tl.minimum(newest, EACH), total)
    budget = tl.cdiv(total * part, whole).to(tl.int32)
    return tl.minimum(tl.maximum(tl.maximum(budget, fewest), forced), total), forced
