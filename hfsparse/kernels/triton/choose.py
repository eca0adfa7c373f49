"""Which units of a cache a decode step reads, in Triton: `pages(selector, ...)` for SELECT.

First a kernel of the selector's own, or PyTorch where there is none, writes the units' scores, and
how much softmax weight each tile of units has in all (`scores.py`). The last kernel, a program a kv
head, adds the tiles up, so that scores become votes, finds the vote at which enough units are kept
by trying two float32 bit patterns at a time (ties go to the lower unit, as a stable sort has it)
and writes them in ascending order. Of many units the votes are made before it, by many programs.
Nothing is sorted, no host waits. Votes lie in registers, so the last kernel compiles once for each
of six sizes of cache. Lengths are read on the device, and what is chosen does not depend on the
room there is for more pages, so that a CUDA graph over a cache's whole room serves every step. A
row whose last choice is young (`refresh`), or that is too short for one, leaves all early.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton import quest, scores
from hfsparse.kernels.triton.limits import DTYPES
from hfsparse.kernels.triton.scores import Asked, is_young
from hfsparse.lists import PageLists
from hfsparse.lists.choice import Choice
from hfsparse.selectors.quest import Quest
from hfsparse.shares import ratio

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

SIZES = tuple(1 << n for n in range(10, 16))  # units
MOST = SIZES[-1] - 1  # units; two counts of them fit into an int32
WIDEST_KEY = 1024  # dims; latents (MLA) are 576 wide
TOGETHER = 1 << 12  # units up to which one program makes all votes of a kv head
CHUNK = 1024  # units whose votes one program makes, of more
FIRST, LAST = tl.constexpr(0x3F800000), tl.constexpr(0x43160000)  # bits of 1.0 and 150.0
FORCED = tl.constexpr(-(1 << 31))  # in the order of what is read in any case
BEYOND = tl.constexpr(0x7FFFFFFF)  # the order of what is no unit of the row
SUM_ONE = tl.constexpr(float(1 << 32))  # what a weight of 1 is in sums

SCORED: dict[type, Callable] = {Quest: quest.score}


def why_not(need: Need) -> str | None:
    """Why a selector's units can't be scored and chosen here; None: they can."""
    if need.chooser not in SCORED:
        return f"{need.chooser.kind} is not fused"
    if need.head_dim > WIDEST_KEY:
        return f"head dim {need.head_dim}: at most {WIDEST_KEY} is supported"
    if need.dtype not in DTYPES or need.index_dtype not in (None, need.dtype):
        return f"queries of {need.dtype} and a cache of {need.index_dtype or need.dtype}"
    return _too_many(need)


def why_not_scored(need: Need) -> str | None:
    """Why units that PyTorch scores can't be chosen here; None: they can."""
    if not hasattr(need.chooser, "scores"):
        return f"{need.chooser.kind} has no scores"
    return _too_many(need)


def _too_many(need: Need) -> str | None:
    if (units := need.tokens // need.unit) > MOST:
        return f"{units} units of {need.unit} tokens: at most {MOST} are supported"
    return None


def pages(
    selector,
    q: Tensor,
    index: dict[str, Tensor],
    length: Tensor,
    scale: float,
    heads: slice | Tensor = slice(None),
    below: int = 0,
    choice: Choice | None = None,
    read: Tensor | None = None,
) -> PageLists:
    """As `selector.pages`: q `[B, Hq, Q, D]`, index `[B, Hkv, P, ...]` by name, length [B].

    heads, below, choice and read: as the table SELECT has them; lists of a choice lie in its own
    tensors.
    """
    q = q.detach() if q.stride(-1) == 1 else q.detach().contiguous()
    q, heads = (q, heads) if isinstance(heads, Tensor) else (q[:, heads], None)
    Hkv, P = next(iter(index.values())).shape[1:3]
    budget, length = selector.budget, length.contiguous()
    asked = Asked(budget, q, heads, length, Hkv, P, below, choice)
    SCORED.get(type(selector), scores.score)(selector, index, asked, scale)
    return _chosen(asked, read)


def _chosen(asked: Asked, read: Tensor | None) -> PageLists:
    """The units whose votes are best, of scores that are written."""
    budget, q, choice, length = asked.budget, asked.q, asked.choice, asked.length
    B, Hkv, U, Q = len(q), asked.kv_heads, asked.units, q.shape[2]
    width, size = budget.width(asked.pages, Q), next(size for size in SIZES if size >= U)
    if choice is None:
        chosen = torch.empty(B, Hkv, width, dtype=torch.int64, device=q.device)
    else:
        chosen = choice.pages[..., :width]
    count = torch.empty(B, Hkv, dtype=torch.int64, device=q.device)
    order = length  # a stand-in that is not read
    more = {"SIZE": size, **asked.settings()}
    del more["SOME"]
    given = asked.scores, asked.totals
    if voted := size > TOGETHER:
        order = asked.scores.new_empty(B * Hkv, U, dtype=torch.int32)
        _vote[(triton.cdiv(U, CHUNK), B * Hkv)](
            *(*given, order, length, asked.made, *asked.numbers(), asked.tiles),
            EACH=budget.per_page,
            CHUNK=CHUNK,
            **more,
            num_warps=4,
        )
    _choose[(B * Hkv,)](
        *(*given, order, chosen, count, length, asked.made),
        *(count if choice is None else choice.count, count if read is None else read),
        *(*asked.numbers(), asked.tiles, width, chosen.stride(1), budget.fewest),
        *(*ratio(budget.share), *ratio(budget.top_p)),
        EACH=budget.per_page,
        VOTED=voted,
        MASS=budget.top_p > 0,
        COUNTS=read is not None,
        **more,
        num_warps=max(4, min(32, size // 512)),
    )
    return PageLists(chosen, count, budget.unit)


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
def _keys(count, length, UNIT: tl.constexpr):
    """Keys in units of which the last is the row's last."""
    return count.to(tl.int64) * UNIT - (tl.cdiv(length, UNIT) * UNIT - length)


@triton.jit
def _weight(x, top):
    return (tl.exp2(x - top) * SUM_ONE).to(tl.int64)


@triton.jit
def _total(top, mass):
    return top + tl.log2(mass.to(tl.float32) / SUM_ONE)


@triton.jit
def _totals(a, b, c, d):
    """log2 of the sum of 2^x, of four rows at a time: a reduction is mostly waiting."""
    i, j, k, m = tl.reduce((a, b, c, d), 0, _largest)
    # Summed as integers: whatever the order, hence the size, totals have the same bits.
    weights = _weight(a, i), _weight(b, j), _weight(c, k), _weight(d, m)
    e, f, g, h = tl.reduce(weights, 0, _sum)
    return _total(i, e), _total(j, f), _total(k, g), _total(m, h)


@triton.jit
def _ranks(
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
def _order(rank, unit, total, newest, EACH: tl.constexpr):
    """Units by cost, as integers from FIRST to LAST; the forced ones are below 0."""
    order = rank.to(tl.int32, bitcast=True)
    order = tl.where((unit < EACH) | (unit >= newest), order | FORCED, order)
    return tl.where(unit < total, order, BEYOND)


@triton.jit
def _newest(length, Q, PAGE: tl.constexpr, EACH: tl.constexpr):
    """The first unit of the pages that hold the row's new queries."""
    return tl.maximum(length - Q, 0) // PAGE * EACH


@triton.jit(do_not_specialize="Hkv Q queries U below refresh tiles".split())
def _vote(
    SCORES, TOTALS, ORDER, LENGTH, MADE, Hkv, Q, queries, U, below: tl.int64, refresh, tiles,
    SIZE: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr,
    CHUNK: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    length, total = scores.units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    if tl.program_id(0) * CHUNK >= total:
        return
    unit = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    rank = _ranks(SCORES, TOTALS, head, unit, total, queries, tiles, SIZE, TILE)
    order = _order(rank, unit, total, _newest(length, Q, UNIT * EACH, EACH), EACH)
    tl.store(ORDER + head * U + unit, order, mask=unit < U)


NUMBERS = "Hkv Q queries U below refresh tiles width stride fewest part whole votes all_votes"


@triton.jit(do_not_specialize=NUMBERS.split())
def _choose(
    SCORES, TOTALS, ORDER, CHOSEN, COUNT, LENGTH, MADE, KEPT, READ,
    Hkv, Q, queries, U, below: tl.int64, refresh, tiles, width, stride, fewest,
    part: tl.int64, whole: tl.int64, votes: tl.int64, all_votes: tl.int64,
    SIZE: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr,
    VOTED: tl.constexpr, MASS: tl.constexpr, KEEPS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTH + head // Hkv).to(tl.int32)
    total = tl.minimum(tl.cdiv(length, UNIT), U)
    unit = tl.arange(0, SIZE)
    out = CHOSEN + head * stride

    if length < below:
        tl.store(COUNT + head, tl.zeros([], tl.int64))
        if not KEEPS:  # what no list uses names a unit too
            tl.store(out + unit, tl.zeros([SIZE], tl.int64), mask=unit < width)
        return
    if KEEPS:
        young, made = is_young(length, MADE, head, refresh)
        if young:  # read on, and what the row has grown by
            kept, then = tl.load(KEPT + head).to(tl.int32), tl.cdiv(made, UNIT)
            place = kept + unit - then
            grown = (unit >= then) & (unit < total) & (place < width)
            tl.store(out + place, unit.to(tl.int64), mask=grown)
            count = tl.minimum(kept + total - then, width)
            tl.store(COUNT + head, count.to(tl.int64))
            if COUNTS:
                tl.atomic_add(READ + head % Hkv, _keys(count, length, UNIT))
            return

    newest = _newest(length, Q, UNIT * EACH, EACH)
    if VOTED:
        order = tl.load(ORDER + head * U + unit, mask=unit < total, other=BEYOND)
    else:
        rank = _ranks(SCORES, TOTALS, head, unit, total, queries, tiles, SIZE, TILE)
        order = _order(rank, unit, total, newest, EACH)
    forced = tl.minimum(total - newest + tl.minimum(newest, EACH), total)
    budget = tl.cdiv(total * part, whole).to(tl.int32)
    budget = tl.minimum(tl.maximum(tl.maximum(budget, fewest), forced), total)

    # Before `low` come `early` units, no more than the budget; up to `high` no fewer. Each pass
    # leaves about a third of what lies between, until as many as the budget come before `low`.
    low, high, early = tl.full([], FIRST, tl.int32), tl.full([], LAST, tl.int32), forced
    if MASS:
        # As many as hold enough of all votes: the cost at which, searched for as that below.
        rank = (order & BEYOND).to(tl.float32, bitcast=True)
        vote = tl.where(unit < total, _weight(1.0, rank), 0)
        need = tl.cdiv(tl.sum(vote, 0) * votes, all_votes)
        need -= tl.sum(tl.where(order < 0, vote, 0), 0)
        while low < high:
            third = (high - low) // 3
            near, far = low + third, low + 2 * third
            nearer = tl.sum(tl.where((order > 0) & (order <= near), vote, 0), 0)
            farther = tl.sum(tl.where((order > 0) & (order <= far), vote, 0), 0)
            low = tl.where(farther < need, far + 1, tl.where(nearer < need, near + 1, low))
            high = tl.where(nearer >= need, near, tl.where(farther >= need, far, high))
        early += tl.sum(tl.where((order > 0) & (order < low), 1, 0), 0)
        need -= tl.sum(tl.where((order > 0) & (order < low), vote, 0), 0)
        each = tl.maximum(_weight(1.0, low.to(tl.float32, bitcast=True)), 1)
        enough = early + (tl.maximum(need + each - 1, 0) // each).to(tl.int32)
        least = tl.minimum(tl.maximum(fewest, forced), total)
        if (enough < least) | (enough > budget):  # the cost for another number is searched for
            low, high, early = tl.full([], FIRST, tl.int32), tl.full([], LAST, tl.int32), forced
        budget = tl.minimum(tl.maximum(enough, least), budget)
    while (early < budget) & (low < high):
        third = (high - low) // 3
        near, far = low + third, low + 2 * third
        counts = tl.sum(tl.where(order <= near, 1, 0) + tl.where(order <= far, 1 << 16, 0), 0)
        nearer, farther = counts & 0xFFFF, counts >> 16
        low = tl.where(farther <= budget, far + 1, tl.where(nearer <= budget, near + 1, low))
        early = tl.where(farther <= budget, farther, tl.where(nearer <= budget, nearer, early))
        high = tl.where(nearer > budget, near, tl.where(farther > budget, far, high))

    # All before `low`; of those at it, the lower units, as many as are due.
    due = budget - early
    kind = tl.where(order < low, 1, tl.where(order == low, 1 << 16, 0))
    seen = tl.cumsum(kind, 0)
    kept = (kind == 1) | ((kind > 1) & (seen >> 16 <= due))
    place = (seen & 0xFFFF) + tl.minimum(seen >> 16, due) - 1
    tl.store(out + place, unit.to(tl.int64), mask=kept & (place < width))
    unused = (unit >= budget) & (unit < width)
    tl.store(out + unit, tl.zeros([SIZE], tl.int64) + (U - 1), mask=unused)
    count = tl.minimum(budget, width)
    tl.store(COUNT + head, count.to(tl.int64))
    if KEEPS:
        tl.store(KEPT + head, count.to(tl.int64))
        tl.store(MADE + head, length.to(tl.int64))
    if COUNTS:
        tl.atomic_add(READ + head % Hkv, _keys(count, length, UNIT))
