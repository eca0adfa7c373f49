"""What a step names of pages in host memory, fetched by the device into the slots of a hot set.

Reference: `fetch.fetch`. One program a row and kv head looks its units up, stamps the slots that
hold some and, for the others, takes the slots of the lowest stamps; programs of a second launch
copy what is missing, out of memory of the host's that is mapped for the device. All that differs
from step to step is read on the device: a step can be captured as a CUDA graph. Bound by the bus to
the host; what share of that it reaches was not measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import DTYPES, NEVER, await_previous, chained
from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.hot import Hot
from hfsparse.lists.packed import NEWEST

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

MOST = 1 << 15  # units in a list, and slots: one program holds as many
COPIES = 64  # programs that copy what a row's head misses
WIDE = tl.constexpr(8192)  # elements that a program copies at once


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    if need.slots > MOST:
        return f"a hot set of {need.slots:,} slots: at most {MOST:,} are supported"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def fetch(
    hot: Hot, lists: PageLists | None, length: Tensor, read: Tensor | None = None
) -> PageLists:
    """As `fetch.fetch`."""
    lists = hot.wanted(lists, length)
    units = lists.pages.contiguous()
    (B, H, W), S = units.shape, hot.owner.shape[2]
    lies, missing = torch.empty_like(units), units.new_empty(B, H, dtype=torch.int32)
    claims = units.new_empty(2, B, H, min(W, S), dtype=torch.int32)
    most = triton.next_power_of_2(max(W, S))
    more = {"UNIT": hot.unit, "PAGE": PAGE, "NEWEST": NEWEST, "LEAD": hot.lead}
    device = str(units.device)
    _claim[(B * H,)](
        *(units, lists.count.contiguous(), length, hot.table, hot.owner, hot.stamp, hot.clock),
        *(lies, claims, missing, missing if read is None else read),
        *(H, W, S, hot.table.shape[2]),
        WIDE=triton.next_power_of_2(W),
        SLOTS=triton.next_power_of_2(S),
        COUNTED=read is not None,
        num_warps=16 if most > 4096 else 8 if most > 1024 else 4,
        **more,
        **chained(device),
    )
    pairs, packed = hot.pairs, hot.pages is not None
    sizes = [host[0, 0].numel() // hot.table.shape[2] for _, host in pairs]  # of a unit
    given = [t for pair in pairs for t in pair]
    _copy[(B * H, min(W, S, COPIES))](
        *given,
        *([] if packed else given * 2),  # stand-ins that are not read
        *(claims, missing),
        *(min(W, S), S, hot.table.shape[2], B * H * min(W, S)),
        KEY=sizes[0],
        VALUE=sizes[1],
        BOUND=sizes[2] if packed else 0,
        END=sizes[4] if packed else 0,
        LEAD=hot.lead,
        num_warps=4,
        **chained(device),
    )
    return replace(lists, lies=lies)


@triton.jit(do_not_specialize="H W S U".split())
def _claim(
    UNITS, COUNT, LENGTH, TABLE, OWNER, STAMP, CLOCK, LIES, CLAIMS, MISSING, READ, H, W, S, U,
    WIDE: tl.constexpr, SLOTS: tl.constexpr, COUNTED: tl.constexpr, UNIT: tl.constexpr,
    PAGE: tl.constexpr, NEWEST: tl.constexpr, LEAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    head = tl.program_id(0).to(tl.int64)
    EACH: tl.constexpr = PAGE // UNIT
    nth = tl.arange(0, WIDE)
    count = tl.load(COUNT + head).to(tl.int32)
    used = nth < tl.minimum(count, W)
    unit = tl.load(UNITS + head * W + nth, mask=used, other=0).to(tl.int32)
    length = tl.load(LENGTH + head // H).to(tl.int32)
    page = unit // EACH
    # As `Hot.newest`: of packed pages that one which is not full.
    newest = page >= (length // PAGE if LEAD == 0 else (length + PAGE - 1) // PAGE - 2)
    table, owner, stamps = TABLE + head * U, OWNER + head * S, STAMP + head * S
    held = tl.load(table + unit, mask=used & (newest == 0), other=0)
    missing = used & (newest == 0) & (held < 0)
    now = tl.load(CLOCK + head) + 1
    tl.debug_barrier()  # every thread has read what one of them writes now
    tl.store(CLOCK + head, now)
    tl.store(
        stamps + held, tl.zeros([WIDE], tl.int32) + now, mask=used & (newest == 0) & (held >= 0)
    )
    misses = tl.sum(missing.to(tl.int32), 0)
    tl.store(MISSING + head, misses)
    if COUNTED:
        tl.atomic_add(READ + head % H * 2, misses.to(tl.int64))
        tl.atomic_add(READ + head % H * 2 + 1, tl.minimum(count, W).to(tl.int64))
    most = tl.minimum(W, S)
    into = CLAIMS + head * most
    taken = held
    if misses > 0:
        tl.debug_barrier()  # stamps are read by other threads than wrote them
        slot = tl.arange(0, SLOTS)
        stamp = tl.load(stamps + slot, mask=slot < S, other=NEVER)
        low, high = now * 0 - 1, now  # of `high` and less there are enough, of `low` too few
        while high - low > 1:
            middle = low + (high - low) // 2
            enough = tl.sum((stamp <= middle).to(tl.int32), 0) >= misses
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle)
        older, same = stamp < high, (stamp == high).to(tl.int32)
        rest = misses - tl.sum(older.to(tl.int32), 0)
        given = older | ((same > 0) & (tl.cumsum(same, 0) <= rest))
        tl.store(into + tl.cumsum(given.to(tl.int32), 0) - 1, slot, mask=given)
        tl.debug_barrier()
        rank = tl.cumsum(missing.to(tl.int32), 0) - 1
        taken = tl.load(into + rank, mask=missing, other=0)
        before = tl.load(owner + taken, mask=missing, other=-1)
        tl.store(table + before, tl.full([WIDE], -1, tl.int32), mask=missing & (before >= 0))
        tl.store(table + unit, taken, mask=missing)
        tl.store(owner + taken, unit, mask=missing)
        tl.store(stamps + taken, tl.zeros([WIDE], tl.int32) + now, mask=missing)
        behind = into + tl.num_programs(0).to(tl.int64) * most
        tl.store(behind + rank, unit, mask=missing)
        taken = tl.where(missing, taken, held)
    at = LEAD + taken
    if LEAD:
        at = tl.where(newest, page % (NEWEST // PAGE) * EACH + unit % EACH, at)
    else:
        at = tl.where(newest, 0, at)
    tl.store(LIES + head * W + nth, tl.where(used, at, 0).to(tl.int64), mask=nth < W)


@triton.jit
def _move(TO, FROM, to, of, SIZE: tl.constexpr, MOST: tl.constexpr):
    """Copy so many elements that lie together."""
    for first in tl.static_range(0, SIZE, MOST):
        at = first + tl.arange(0, MOST)
        t = tl.load(FROM + of * SIZE + at, mask=at < SIZE, other=0)
        tl.store(TO + to * SIZE + at, t, mask=at < SIZE)


@triton.jit(do_not_specialize="most S U".split())
def _copy(
    K, HOST_K, V, HOST_V, LOW, HOST_LOW, HIGH, HOST_HIGH, LEAST, HOST_LEAST, MOST_, HOST_MOST,
    CLAIMS, MISSING, most, S, U, behind: tl.int64,
    KEY: tl.constexpr, VALUE: tl.constexpr, BOUND: tl.constexpr, END: tl.constexpr,
    LEAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    head = tl.program_id(0).to(tl.int64)
    for nth in range(tl.program_id(1), tl.load(MISSING + head), tl.num_programs(1)):
        to = head * (LEAD + S) + LEAD + tl.load(CLAIMS + head * most + nth)
        of = head * U + tl.load(CLAIMS + behind + head * most + nth)
        _move(K, HOST_K, to, of, KEY, WIDE if KEY > WIDE else triton.next_power_of_2(KEY))
        _move(V, HOST_V, to, of, VALUE, WIDE if VALUE > WIDE else triton.next_power_of_2(VALUE))
        if BOUND:
            _move(LOW, HOST_LOW, to, of, BOUND, triton.next_power_of_2(BOUND))
            _move(HIGH, HOST_HIGH, to, of, BOUND, triton.next_power_of_2(BOUND))
            _move(LEAST, HOST_LEAST, to, of, END, triton.next_power_of_2(END))
            _move(MOST_, HOST_MOST, to, of, END, triton.next_power_of_2(END))
