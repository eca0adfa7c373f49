"""The best of many units in Triton, several programs a kv head: what `choose.py` does of few.

Each program has a chunk of a row's units. A vote is an integer of 26 bits, its key, of which the
highest 8, then 11 more, then the last 7 of the one at which enough are kept are found by counting
how many keys lie in which bin; a launch ends each count. Of the last bins each chunk has its own,
so that the last launch knows where each program's units go: in ascending order, of equal ones the
lower. Counts are integers: whatever the order of the programs, they are the same. As many bins are
added to as keys agree with those that are found already: few, if not all votes are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import await_previous, chained
from hfsparse.kernels.triton.scores import Asked, is_young, units_of
from hfsparse.kernels.triton.votes import FIRST, budget_of, keys_in, newest_unit, ranks
from hfsparse.lists import PageLists
from hfsparse.shares import ratio

MOST = (1 << 18) - 1  # units
CHUNK, CHUNKS = 1024, 32  # units of a program, of so many programs at most
# The keys of what is read in any case, where those of others begin, and of what is no unit.
FORCED, NEXT, BEYOND = (tl.constexpr(bin << 18) for bin in (0, 1, 255))
COARSE, FINE, LAST = tl.constexpr(256), tl.constexpr(2048), tl.constexpr(128)  # bins
FINE_BITS, LAST_BITS = tl.constexpr(11), tl.constexpr(7)
# What programs of a head tell those of later launches.
BIN, EARLY, START, BEFORE, YOUNG, WORDS = (tl.constexpr(i) for i in range(6))


def choose(asked: Asked, lists: PageLists, read: Tensor | None, size: int) -> None:
    """Write lists of the units whose votes are best; there is room for no more than `size`."""
    budget, choice, U, length = asked.budget, asked.choice, asked.units, asked.length
    chunk, heads = max(CHUNK, size // CHUNKS), asked.programs
    chunks = size // chunk
    new = {"dtype": torch.int32, "device": length.device}
    keys, state = torch.empty(heads, U, **new), torch.empty(heads, WORDS.value, **new)
    coarse, fine = (
        torch.empty(heads, chunks, COARSE.value, **new),
        torch.empty(heads, FINE.value, **new),
    )
    last, less = torch.empty(heads, chunks, LAST.value, **new), torch.empty(heads, chunks, **new)
    numbers = *asked.numbers(), budget.fewest, *ratio(budget.share)
    more = {"EACH": budget.per_page, "CHUNK": chunk, "CHUNKS": chunks, **asked.settings()}
    grid, warps = (triton.cdiv(U, chunk), heads), {"num_warps": 4 if chunk < 4096 else 8}
    warps |= chained(str(length.device))
    given = keys, state, coarse, fine, last, less, length, asked.made
    _vote[grid](
        asked.scores, asked.totals, *given, *numbers, asked.tiles, SIZE=size, **more, **warps
    )
    _narrow[grid](*given, *numbers, **more, **warps)
    _count[grid](*given, *numbers, **more, **warps)
    kept = lists.count if choice is None else choice.count
    _write[grid](
        *(*given, lists.pages, lists.count, kept, lists.count if read is None else read),
        *(*numbers, lists.pages.shape[2], lists.pages.stride(1)),
        COUNTS=read is not None,
        **more,
        **warps,
    )


NUMBERS = "Hkv Q queries U below refresh fewest part whole"


@triton.jit(do_not_specialize=[*NUMBERS.split(), "tiles"])
def _vote(
    SCORES, TOTALS, KEYS, STATE, COARSE_, FINE_, LAST_, LESS, LENGTH, MADE,
    Hkv, Q, queries, U, below: tl.int64, refresh, fewest, part: tl.int64, whole: tl.int64, tiles,
    SIZE: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SOME: tl.constexpr, KEEPS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    # Keys and how many of them begin alike; bins of later counts are emptied.
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length, total = units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    if chunk == 0:
        if KEEPS:  # asked now: the last launch writes when the choice was made
            young, made = is_young(length, MADE, head, refresh)
            tl.store(STATE + head * WORDS + YOUNG, tl.where(young, made, 0))
        bins = tl.arange(0, FINE)
        tl.store(FINE_ + head * FINE + bins, tl.zeros([FINE], tl.int32))
    if chunk * CHUNK >= total:
        return
    bins = tl.arange(0, LAST)
    tl.store(LAST_ + (head * CHUNKS + chunk) * LAST + bins, tl.zeros([LAST], tl.int32))
    unit = chunk * CHUNK + tl.arange(0, CHUNK)
    rank = ranks(SCORES, TOTALS, head, unit, total, queries, tiles, SIZE, TILE)
    # The first bin is that of what is forced.
    key = rank.to(tl.int32, bitcast=True) - FIRST + NEXT
    newest = newest_unit(length, Q, UNIT * EACH, EACH)
    key = tl.where((unit < EACH) | (unit >= newest), FORCED, key)
    key = tl.where(unit < total, key, BEYOND)
    tl.store(KEYS + head * U + unit, key, mask=unit < U)
    found = tl.histogram(key >> (FINE_BITS + LAST_BITS), COARSE)
    tl.store(COARSE_ + (head * CHUNKS + chunk) * COARSE + tl.arange(0, COARSE), found)


@triton.jit
def _bin(found, early, budget, bins):
    """Of bins that hold `found` keys, behind `early` ones, that of the last one within the budget,
    and how many come before it."""
    here = tl.sum(tl.where(early + tl.cumsum(found, 0) < budget, 1, 0), 0)
    return here, early + tl.sum(tl.where(bins < here, found, 0), 0)


@triton.jit(do_not_specialize=NUMBERS.split())
def _narrow(
    KEYS, STATE, COARSE_, FINE_, LAST_, LESS, LENGTH, MADE,
    Hkv, Q, queries, U, below: tl.int64, refresh, fewest, part: tl.int64, whole: tl.int64,
    TILE: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SOME: tl.constexpr, KEEPS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    # The bin of the highest bits, and how many of its keys go on alike.
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length, total = units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    if chunk * CHUNK >= total:
        return
    unit, bins, row = (
        chunk * CHUNK + tl.arange(0, CHUNK),
        tl.arange(0, COARSE),
        tl.arange(0, CHUNKS),
    )
    key = tl.load(KEYS + head * U + unit, mask=unit < total, other=BEYOND)
    found = COARSE_ + (head * CHUNKS + row)[:, None] * COARSE + bins[None, :]
    found = tl.sum(tl.load(found, mask=(row * CHUNK < total)[:, None], other=0), 0)
    newest = newest_unit(length, Q, UNIT * EACH, EACH)
    budget, _ = budget_of(total, newest, part, whole, fewest, EACH)
    here, early = _bin(found, 0, budget, bins)
    if chunk == 0:
        tl.store(STATE + head * WORDS + BIN, here)
        tl.store(STATE + head * WORDS + EARLY, early)
    place = FINE_ + head * FINE + ((key >> LAST_BITS) & (FINE - 1))
    tl.atomic_add(place, 1, mask=key >> (FINE_BITS + LAST_BITS) == here, sem="relaxed")


@triton.jit(do_not_specialize=NUMBERS.split())
def _count(
    KEYS, STATE, COARSE_, FINE_, LAST_, LESS, LENGTH, MADE,
    Hkv, Q, queries, U, below: tl.int64, refresh, fewest, part: tl.int64, whole: tl.int64,
    TILE: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SOME: tl.constexpr, KEEPS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    # The bits after those, how many of a chunk's keys are less, and how those that agree end.
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length, total = units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    if chunk * CHUNK >= total:
        return
    unit, bins = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, FINE)
    key = tl.load(KEYS + head * U + unit, mask=unit < total, other=BEYOND)
    found = tl.load(FINE_ + head * FINE + bins)
    begin = tl.load(STATE + head * WORDS + BIN) << FINE_BITS
    newest = newest_unit(length, Q, UNIT * EACH, EACH)
    budget, _ = budget_of(total, newest, part, whole, fewest, EACH)
    here, early = _bin(found, tl.load(STATE + head * WORDS + EARLY), budget, bins)
    here += begin
    if chunk == 0:  # in other words than those that are read here
        tl.store(STATE + head * WORDS + START, here)
        tl.store(STATE + head * WORDS + BEFORE, early)
    tl.store(LESS + head * CHUNKS + chunk, tl.sum(tl.where(key >> LAST_BITS < here, 1, 0), 0))
    place = LAST_ + (head * CHUNKS + chunk) * LAST + (key & (LAST - 1))
    tl.atomic_add(place, 1, mask=key >> LAST_BITS == here, sem="relaxed")


@triton.jit(do_not_specialize=[*NUMBERS.split(), "width", "stride"])
def _write(
    KEYS, STATE, COARSE_, FINE_, LAST_, LESS, LENGTH, MADE, CHOSEN, COUNT, KEPT, READ,
    Hkv, Q, queries, U, below: tl.int64, refresh, fewest, part: tl.int64, whole: tl.int64,
    width, stride,
    TILE: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SOME: tl.constexpr, KEEPS: tl.constexpr,
    COUNTS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(LENGTH + head // Hkv).to(tl.int32)
    total = tl.minimum(tl.cdiv(length, UNIT), U)
    unit = chunk * CHUNK + tl.arange(0, CHUNK)
    out = CHOSEN + head * stride
    if length < below:
        if chunk == 0:
            tl.store(COUNT + head, tl.zeros([], tl.int64))
        if not KEEPS:  # what no list uses names a unit too
            tl.store(out + unit, tl.zeros([CHUNK], tl.int64), mask=unit < width)
        return
    if KEEPS:
        made = tl.load(STATE + head * WORDS + YOUNG)
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

    newest = newest_unit(length, Q, UNIT * EACH, EACH)
    budget, _ = budget_of(total, newest, part, whole, fewest, EACH)
    unused = (unit >= budget) & (unit < width)
    tl.store(out + unit, tl.zeros([CHUNK], tl.int64) + (U - 1), mask=unused)
    if chunk == 0:
        count = tl.minimum(budget, width)
        tl.store(COUNT + head, count.to(tl.int64))
        if KEEPS:
            tl.store(KEPT + head, count.to(tl.int64))
            tl.store(MADE + head, length.to(tl.int64))
        if COUNTS:
            tl.atomic_add(READ + head % Hkv, keys_in(count, length, UNIT))
    if chunk * CHUNK >= total:
        return
    bins, row = tl.arange(0, LAST), tl.arange(0, CHUNKS)
    used = row * CHUNK < total
    found = LAST_ + (head * CHUNKS + row)[:, None] * LAST + bins[None, :]
    found = tl.load(found, mask=used[:, None], other=0)
    less = tl.load(LESS + head * CHUNKS + row, mask=used, other=0)
    key = tl.load(KEYS + head * U + unit, mask=unit < total, other=BEYOND)
    before = tl.load(STATE + head * WORDS + BEFORE)
    here, early = _bin(tl.sum(found, 0), before, budget, bins)
    edge = (tl.load(STATE + head * WORDS + START) << LAST_BITS) + here
    # All that are less; of those that are equal the lower units, as many as are due.
    due = budget - early
    less += tl.sum(tl.where((bins < here)[None, :], found, 0), 1)
    equal = tl.sum(tl.where((bins == here)[None, :], found, 0), 1)
    seen = tl.cumsum(tl.where(key < edge, 1, tl.where(key == edge, 1 << 16, 0)), 0)
    nth = tl.sum(tl.where(row < chunk, equal, 0), 0) + (seen >> 16)
    place = tl.sum(tl.where(row < chunk, less, 0), 0) + (seen & 0xFFFF)
    place += tl.minimum(nth, due) - 1
    kept_here = (key < edge) | ((key == edge) & (nth <= due))
    tl.store(out + place, unit.to(tl.int64), mask=kept_here & (place < width))
