"""Which units of a cache a decode step reads, in Triton: `pages(selector, ...)` for SELECT.

First a kernel of the selector's own, or PyTorch where there is none, writes the units' scores, and
how much softmax weight each tile of units has in all (`scores.py`). The last kernel, a program a kv
head, adds the tiles up, so that scores become votes, finds the vote at which enough units are kept
by trying two float32 bit patterns at a time (ties go to the lower unit, as a stable sort has it)
and writes them in ascending order. Votes lie in registers, so it compiles once for each size of
cache; of many units several programs choose (`many.py`). Nothing is sorted, no host waits. Lengths
are read on the device, and what is chosen does not depend on the room there is for more pages, so
that a CUDA graph over a cache's whole room serves every step. A row whose last choice is young
(`refresh`), or that is too short for one, leaves all early.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton import labels, many, quest, scores
from hfsparse.kernels.triton.limits import DTYPES, await_previous, chained
from hfsparse.kernels.triton.scores import Asked, is_young
from hfsparse.kernels.triton.votes import (
    FIRST,
    LAST,
    budget_of,
    keys_in,
    newest_unit,
    ranks,
    weight,
)
from hfsparse.lists import PageLists
from hfsparse.lists.choice import Choice
from hfsparse.selectors.labels import Labelled
from hfsparse.selectors.quest import Quest
from hfsparse.shares import ratio

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

FEWEST = 1 << 10  # units that the smallest form of the last kernel holds
TOGETHER = 1 << 12  # units up to which one program chooses
MOST = (1 << 15) - 1  # of which it can; two counts of them fit into an int32
WIDEST_KEY = 1024  # dims; latents (MLA) are 576 wide


def why_not(need: Need) -> str | None:
    """Why a selector's units can't be scored and chosen here; None: they can."""
    if _scorer(need.chooser) is None:
        return f"{need.chooser.kind} is not fused"
    if need.head_dim > WIDEST_KEY:
        return f"head dim {need.head_dim}: at most {WIDEST_KEY} is supported"
    held = need.index_dtype or need.dtype
    if need.dtype not in DTYPES or (isinstance(need.chooser, Quest) and held != need.dtype):
        return f"queries of {need.dtype} and a cache of {held}"
    return _too_many(need)


def why_not_scored(need: Need) -> str | None:
    """Why units that PyTorch scores can't be chosen here; None: they can."""
    if not hasattr(need.chooser, "scores"):
        return f"{need.chooser.kind} has no scores"
    return _too_many(need)


def _scorer(selector) -> Callable[..., None] | None:
    """The kernel that scores a selector's units, if there is one."""
    if isinstance(selector, Labelled):
        return labels.score
    return quest.score if type(selector) is Quest else None


def _too_many(need: Need) -> str | None:
    budget = need.chooser.budget
    most = MOST if budget.top_p else many.MOST
    if (units := need.tokens // budget.unit) > most:
        return f"{units} units of {budget.unit} tokens: at most {most} are supported"
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
    score = _scorer(selector) or scores.score
    score(selector, index, asked, scale)
    return _chosen(asked, read)


def _chosen(asked: Asked, read: Tensor | None) -> PageLists:
    """The units whose votes are best, of scores that are written."""
    budget, q, choice, length = asked.budget, asked.q, asked.choice, asked.length
    B, Hkv, U, Q = len(q), asked.kv_heads, asked.units, q.shape[2]
    width, size = budget.width(asked.pages, Q), max(FEWEST, triton.next_power_of_2(U))
    if choice is None:
        chosen = torch.empty(B, Hkv, width, dtype=torch.int64, device=q.device)
    else:
        chosen = choice.pages[..., :width]
    count = torch.empty(B, Hkv, dtype=torch.int64, device=q.device)
    lists = PageLists(chosen, count, budget.unit)
    if size > TOGETHER and not budget.top_p:
        many.choose(asked, lists, read, size)
        return lists
    _choose[(B * Hkv,)](
        *(asked.scores, asked.totals, chosen, count, length, asked.made),
        *(count if choice is None else choice.count, count if read is None else read),
        *(*asked.numbers(), asked.tiles, width, chosen.stride(1), budget.fewest),
        *(*ratio(budget.share), *ratio(budget.top_p)),
        SIZE=size,
        EACH=budget.per_page,
        MASS=budget.top_p > 0,
        COUNTS=read is not None,
        **asked.settings(),
        num_warps=max(4, min(32, size // 512)),
        **chained(str(q.device)),
    )
    return lists


NUMBERS = "Hkv Q queries U below refresh tiles width stride fewest part whole votes all_votes"


@triton.jit(do_not_specialize=NUMBERS.split())
def _choose(
    SCORES, TOTALS, CHOSEN, COUNT, LENGTH, MADE, KEPT, READ,
    Hkv, Q, queries, U, below: tl.int64, refresh, tiles, width, stride, fewest,
    part: tl.int64, whole: tl.int64, votes: tl.int64, all_votes: tl.int64,
    SIZE: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr,
    SOME: tl.constexpr, MASS: tl.constexpr, KEEPS: tl.constexpr, COUNTS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
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
                tl.atomic_add(READ + head % Hkv, keys_in(count, length, UNIT))
            return

    # Units by cost, as integers from FIRST to LAST; the forced ones, which are those of the first
    # page and of the new queries' pages, come before.
    newest = newest_unit(length, Q, UNIT * EACH, EACH)
    rank = ranks(SCORES, TOTALS, head, unit, total, queries, tiles, SIZE, TILE)
    order = rank.to(tl.int32, bitcast=True)
    order = tl.where((unit < EACH) | (unit >= newest), 0, order)
    order = tl.where(unit < total, order, 0x7FFFFFFF)
    budget, forced = budget_of(total, newest, part, whole, fewest, EACH)

    # Before `low` come `early` units, no more than the budget; up to `high` no fewer. Each pass
    # leaves about a third of what lies between, until as many as the budget come before `low`.
    low, high, early = tl.full([], FIRST, tl.int32), tl.full([], LAST, tl.int32), forced
    if MASS:
        # As many as hold enough of all votes: the cost at which, searched for as that below.
        vote = tl.where(unit < total, weight(1.0, rank), 0)
        need = tl.cdiv(tl.sum(vote, 0) * votes, all_votes)
        need -= tl.sum(tl.where(order == 0, vote, 0), 0)
        while low < high:
            third = (high - low) // 3
            near, far = low + third, low + 2 * third
            nearer = tl.sum(tl.where((order > 0) & (order <= near), vote, 0), 0)
            farther = tl.sum(tl.where((order > 0) & (order <= far), vote, 0), 0)
            low = tl.where(farther < need, far + 1, tl.where(nearer < need, near + 1, low))
            high = tl.where(nearer >= need, near, tl.where(farther >= need, far, high))
        early += tl.sum(tl.where((order > 0) & (order < low), 1, 0), 0)
        need -= tl.sum(tl.where((order > 0) & (order < low), vote, 0), 0)
        each = tl.maximum(weight(1.0, low.to(tl.float32, bitcast=True)), 1)
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
        tl.atomic_add(READ + head % Hkv, keys_in(count, length, UNIT))
