"""Which units of a cache a decode step reads, in Triton: `pages(selector, ...)` for SELECT.

First a kernel of the selector's own, or PyTorch where there is none, writes the units' scores, and
how much softmax weight each tile of units has in all (`scores.py`). `_vote` adds the tiles up, so
that scores become votes, and counts how many units have which rank, of few thousand
(`budget.ranks`). `_write` finds in these counts the rank at which there are enough units, and
writes those that come before it, and the lower ones of those that have it, in ascending order. Both
serve a row by a program for each chunk of its units. Nothing is sorted, no host waits. Lengths are
read on the device, and what is chosen does not depend on the room there is for more pages, so that
a CUDA graph over a cache's whole room serves every step. A row whose last choice is young
(`refresh`), or that is too short for one, leaves all early.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton import labels, quest, scores
from hfsparse.kernels.triton.limits import DTYPES, await_previous, chained
from hfsparse.kernels.triton.scores import (
    BINS,
    CHUNKS,
    NEAR,
    WORDS,
    YOUNG,
    Asked,
    is_young,
    units_of,
)
from hfsparse.kernels.triton.votes import budget_of, forces, keys_in, rank_of, ranks, weight
from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.choice import Choice
from hfsparse.selectors.labels import Labelled
from hfsparse.selectors.quest import Quest
from hfsparse.shares import ratio

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

FEWEST = 1 << 12  # units that the smallest form of the kernels holds
MOST = (1 << 18) - 1
VOTERS, VOTE_WARPS, WRITE_WARPS = 1024, 4, 8  # units of a program of `_vote`
CHUNK = 1024  # of `_write`, at least
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


def _scorer(selector) -> ModuleType | None:
    """The module that scores a selector's units, if there is one."""
    if isinstance(selector, Labelled):
        return labels
    return quest if type(selector) is Quest else None


def _too_many(need: Need) -> str | None:
    unit = need.chooser.budget.unit
    if (units := need.tokens // unit) > MOST:
        return f"{units} units of {unit} tokens: at most {MOST} are supported"
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
    scorer = _scorer(selector) or scores
    asked = Asked(budget, q, heads, length, Hkv, P, below, choice, scorer.tile(budget.unit))
    scorer.score(selector, index, asked, scale)
    return _chosen(asked, read)


def _chosen(asked: Asked, read: Tensor | None) -> PageLists:
    """The units whose votes are best, of scores that are written."""
    budget, q, choice, U = asked.budget, asked.q, asked.choice, asked.units
    (B, _, Q, _), Hkv, width = q.shape, asked.kv_heads, budget.width(asked.pages, q.shape[2])
    if choice is None:
        chosen = torch.empty(B, Hkv, width, dtype=torch.int64, device=q.device)
    else:
        chosen = choice.pages[..., :width]
    count = torch.empty(B, Hkv, dtype=torch.int64, device=q.device)
    keys = torch.empty(B * Hkv, U, dtype=torch.int16, device=q.device)
    size = max(FEWEST, triton.next_power_of_2(U))
    chunk = max(CHUNK, size // CHUNKS.value)
    given = keys, asked.tally, asked.length, asked.made
    more = {"EACH": budget.per_page, **asked.settings(), **chained(str(q.device))}
    _vote[(triton.cdiv(U, VOTERS), B * Hkv)](
        *(asked.scores, asked.totals, *given, *asked.numbers(), asked.tiles),
        SIZE=size,
        CHUNK=VOTERS,
        **more,
        num_warps=VOTE_WARPS,
    )
    _write[(triton.cdiv(U, chunk), B * Hkv)](
        *(*given, chosen, count, count if choice is None else choice.count),
        *(count if read is None else read, *asked.numbers()),
        *(budget.fewest, *ratio(budget.share), *ratio(budget.top_p), width, chosen.stride(1)),
        CHUNK=chunk,
        NEW=triton.next_power_of_2((2 + Q // PAGE) * budget.per_page),
        MASS=budget.top_p > 0,
        COUNTS=read is not None,
        **more,
        num_warps=WRITE_WARPS,
    )
    return PageLists(chosen, count, budget.unit)


NUMBERS = "Hkv Q queries U below refresh"


@triton.jit(do_not_specialize=[*NUMBERS.split(), "tiles"])
def _vote(
    SCORES, TOTALS, KEYS, TALLY, LENGTH, MADE,
    Hkv, Q, queries, U, below: tl.int64, refresh, tiles,
    SIZE: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr,
    CHUNK: tl.constexpr, SOME: tl.constexpr, KEEPS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length, total = units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    tally = TALLY + head * WORDS
    if KEEPS and chunk == 0:  # asked now: the last launch writes when the choice was made
        young, made = is_young(length, MADE, head, refresh)
        tl.store(tally + YOUNG, tl.where(young, made, 0))
    if chunk * CHUNK >= total:
        return
    unit = chunk * CHUNK + tl.arange(0, CHUNK)
    key = ranks(SCORES, TOTALS, head, unit, total, queries, tiles, SIZE, TILE)
    tl.store(KEYS + head * U + unit, key.to(tl.int16), mask=unit < total)
    forced, _ = forces(unit, length, Q, total, UNIT, EACH)
    place = tally + key % NEAR * (BINS // NEAR) + key // NEAR
    tl.atomic_add(place, 1, mask=(unit < total) & ~forced, sem="relaxed")


@triton.jit
def _bin(found, need):
    """Of bins `[NEAR, BINS / NEAR]`, which count down the columns, the one where their sum reaches
    `need`, and the sum before it."""
    near, far = tl.arange(0, NEAR), tl.arange(0, BINS // NEAR)
    whole = tl.sum(found, 0)
    column = tl.sum(tl.where(tl.cumsum(whole, 0) < need, 1, 0), 0)
    before = tl.sum(tl.where(far < column, whole, 0), 0)
    each = tl.sum(tl.where((far == column)[None, :], found, 0), 1)
    row = tl.sum(tl.where(before + tl.cumsum(each, 0) < need, 1, 0), 0)
    return column * NEAR + row, before + tl.sum(tl.where(near < row, each, 0), 0)


@triton.jit(
    do_not_specialize=[*NUMBERS.split(), *"fewest part whole votes all_votes width stride".split()]
)
def _write(
    KEYS, TALLY, LENGTH, MADE, CHOSEN, COUNT, KEPT, READ,
    Hkv, Q, queries, U, below: tl.int64, refresh, fewest, part: tl.int64, whole: tl.int64,
    votes: tl.int64, all_votes: tl.int64, width, stride,
    TILE: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr, CHUNK: tl.constexpr,
    NEW: tl.constexpr, SOME: tl.constexpr, MASS: tl.constexpr, KEEPS: tl.constexpr,
    COUNTS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(LENGTH + head // Hkv).to(tl.int32)
    total = tl.minimum(tl.cdiv(length, UNIT), U)
    unit = chunk * CHUNK + tl.arange(0, CHUNK)
    out, tally = CHOSEN + head * stride, TALLY + head * WORDS
    if length < below:
        if chunk == 0:
            tl.store(COUNT + head, tl.zeros([], tl.int64))
        if not KEEPS:  # what no list uses names a unit too
            tl.store(out + unit, tl.zeros([CHUNK], tl.int64), mask=unit < width)
        return
    if KEEPS:
        made = tl.load(tally + YOUNG)
        if made > 0:  # read on, and what the row has grown by
            kept, then = tl.load(KEPT + head).to(tl.int32), tl.cdiv(made, UNIT)
            place = kept + unit - then
            grown = (unit >= then) & (unit < total) & (place < width)
            tl.store(out + place, unit.to(tl.int64), mask=grown)
            if chunk == 0:
                count = tl.minimum(kept + total - then, width)
                tl.store(COUNT + head, count.to(tl.int64))
                if COUNTS:
                    tl.atomic_add(READ + head % Hkv, keys_in(count, length, UNIT))
            return

    keys, near, far = KEYS + head * U, tl.arange(0, NEAR), tl.arange(0, BINS // NEAR)
    found = tl.load(tally + near[:, None] * (BINS // NEAR) + far[None, :])
    bins = far[None, :] * NEAR + near[:, None]
    forced, newest = forces(unit, length, Q, total, UNIT, EACH)
    budget, early = budget_of(total, newest, part, whole, fewest, EACH)
    key = tl.load(keys + unit, mask=unit < total, other=BINS).to(tl.int32)
    key = tl.where(forced, -1, key)
    if MASS:
        # As many as hold enough of all votes: those that are forced, bins that come short of it
        # even with them, and some of the next.
        at = tl.arange(0, NEW)
        new = tl.where(at < EACH, at, newest + at - EACH)
        known = (new < total) & ((at < EACH) | (new >= EACH))
        held = tl.load(keys + new, mask=known, other=0).to(tl.int32)
        held = tl.sum(tl.where(known, weight(1.0, rank_of(held)), 0), 0)
        mass = found.to(tl.int64) * weight(1.0, rank_of(bins))
        need = tl.cdiv((held + tl.sum(tl.sum(mass, 0), 0)) * votes, all_votes) - held
        last, before = _bin(mass, need)
        each = tl.maximum(weight(1.0, rank_of(last)), 1)
        enough = early + tl.sum(tl.sum(tl.where(bins < last, found, 0), 0), 0)
        enough += (tl.maximum(need - before + each - 1, 0) // each).to(tl.int32)
        least = tl.minimum(tl.maximum(fewest, early), total)
        budget = tl.minimum(tl.maximum(enough, least), budget)
    count = tl.minimum(budget, width).to(tl.int64)
    tl.store(out + unit, tl.zeros([CHUNK], tl.int64) + (U - 1), (unit >= budget) & (unit < width))
    if chunk == 0:
        tl.store(COUNT + head, count)
        if KEEPS:
            tl.store(KEPT + head, count)
            tl.store(MADE + head, length.to(tl.int64))
        if COUNTS:
            tl.atomic_add(READ + head % Hkv, keys_in(count, length, UNIT))
    if chunk * CHUNK >= total:
        return

    # All before the bin at which there are enough; of those in it the lower units, as many as are
    # due.
    edge, before = _bin(found, budget - early)
    due = budget - early - before
    seen = tl.cumsum(tl.where(key < edge, 1, tl.where(key == edge, 1 << 16, 0)), 0)
    # Each chunk tells the later ones, which wait for it, what it has; programs begin in order.
    mine = tl.sum(tl.where(key < edge, 1, tl.where(key == edge, 1 << 15, 0)), 0)
    tl.atomic_xchg(tally + BINS + chunk, mine + (1 << 30), sem="relaxed")
    nth = tl.arange(0, CHUNKS)
    told = tl.load(tally + BINS + nth, mask=nth < chunk, other=1 << 30, volatile=True)
    while tl.min(told, 0) == 0:
        told = tl.load(tally + BINS + nth, mask=nth < chunk, other=1 << 30, volatile=True)
    equal = tl.sum((told >> 15) & 0x7FFF, 0) + (seen >> 16)
    place = tl.sum(told & 0x7FFF, 0) + (seen & 0xFFFF) + tl.minimum(equal, due) - 1
    kept_here = (key < edge) | ((key == edge) & (equal <= due))
    tl.store(out + place, unit.to(tl.int64), mask=kept_here & (place < width))
