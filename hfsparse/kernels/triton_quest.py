"""Quest's choice of pages in two Triton kernels: `pages(quest, ...)` for `quest.pages(...)`.

The first reads every page's summary once and writes bounds; the second, a program a kv head, turns
a head's bounds into votes, finds the vote at which enough pages are kept by bisecting float32 bit
patterns (ties go to the lower page, as a stable sort has it) and writes them in ascending order.
Nothing is sorted, no host waits. Votes lie in registers, so the second kernel compiles once for
each of three sizes of cache. Lengths are read on the device, and what is chosen does not depend on
the room there is for more pages, so that a CUDA graph over a cache's whole room serves every step.
"""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton_prefill import DTYPES, LOG2E
from hfsparse.kernels.triton_select import LOWEST, _ordered
from hfsparse.lists import PAGE, PageLists
from hfsparse.selectors.quest import EXACT, Quest

SIZES = (1 << 10, 1 << 12, 1 << 14)  # pages
TILE = 64  # pages whose bounds one program computes
SUM_ONE = tl.constexpr(float(1 << 32))  # what a weight of 1 is in sums


def why_not(selector, q: Tensor, low: Tensor) -> str | None:
    """Why these kernels can't choose a selector's pages; None: they can."""
    if type(selector) is not Quest:
        return f"{selector.kind} is not fused"
    if q.shape[-1] > 256:
        return f"head dim {q.shape[-1]}: at most 256 is supported"
    if q.dtype not in DTYPES or low.dtype != q.dtype:
        return f"queries of {q.dtype} and a cache of {low.dtype}"
    if (pages := low.shape[2]) > SIZES[-1]:
        return f"{pages} pages: at most {SIZES[-1]} are supported"
    return None


def pages(
    quest: Quest, q: Tensor, low: Tensor, high: Tensor, length: Tensor, scale: float
) -> PageLists:
    """As Quest.pages: q `[B, Hq, Q, D]`, low and high `[B, Hkv, P, D]`, length [B]."""
    B, Hq, Q, D = q.shape
    Hkv, P = low.shape[1:3]
    q, low, high = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, low, high))
    queries = Hq // Hkv * Q
    bounds = q.new_empty(B * Hkv, queries, P, dtype=torch.float32)
    rows = max(16, triton.next_power_of_2(min(queries, 64)))
    _bounds[(triton.cdiv(P, TILE), B * Hkv, triton.cdiv(queries, rows))](
        *(q, low, high, bounds, length.contiguous()),
        *(s for t in (q, low, high) for s in t.stride()[:3]),
        *(Hkv, Q, queries, P, scale * LOG2E.value),
        D=D,
        DEPTH=min(64, max(16, triton.next_power_of_2(D))),
        ROWS=rows,
        TILE=TILE,
        PAGE=PAGE,
        num_warps=4,
    )
    width = min(P, max(quest.min_pages, ceil(P * quest.share)) + 2 + -(-Q // PAGE))
    chosen = torch.empty(B, Hkv, width, dtype=torch.int64, device=q.device)
    count = torch.empty(B, Hkv, dtype=torch.int64, device=q.device)
    size = next(size for size in SIZES if size >= P)
    _choose[(B * Hkv,)](
        *(bounds, chosen, count, length.contiguous()),
        *(Hkv, Q, queries, P, width, quest.min_pages, quest.units),
        EXACT=EXACT,
        SIZE=size,
        PAGE=PAGE,
        num_warps=max(4, min(16, size // 1024)),
    )
    return PageLists(chosen, count)


@triton.jit(do_not_specialize="Hkv Q queries P".split())
def _bounds(
    Q_, LOW, HIGH, BOUNDS, LENGTH,
    q_b: tl.int64, q_h: tl.int64, q_s, low_b: tl.int64, low_h: tl.int64, low_p,
    high_b: tl.int64, high_h: tl.int64, high_p,
    Hkv, Q, queries, P, unit,
    D: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, kv = head // Hkv, head % Hkv
    total = tl.cdiv(tl.load(LENGTH + b).to(tl.int32), PAGE)
    page = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real, alive = page < tl.minimum(total, P), row < queries
    at = Q_ + b * q_b + kv * (queries // Q) * q_h + (row // Q) * q_h + (row % Q) * q_s
    low, high = LOW + b * low_b + kv * low_h, HIGH + b * high_b + kv * high_h
    bound = tl.zeros([ROWS, TILE], tl.float32)
    for first in range(0, D, DEPTH):
        d = first + tl.arange(0, DEPTH)
        q = tl.load(at[:, None] + d[None, :], mask=alive[:, None] & (d < D)[None, :], other=0.0)
        inside = real[:, None] & (d < D)[None, :]
        least = tl.load(low + page[:, None] * low_p + d[None, :], mask=inside, other=0.0)
        most = tl.load(high + page[:, None] * high_p + d[None, :], mask=inside, other=0.0)
        up = tl.maximum(q, 0.0).to(most.dtype)
        down = tl.minimum(q, 0.0).to(least.dtype)
        bound = tl.dot(up, tl.trans(most), bound, input_precision="ieee")
        bound = tl.dot(down, tl.trans(least), bound, input_precision="ieee")
    bound = tl.where(real[None, :], bound * unit, float("-inf"))
    out = BOUNDS + (head * queries + row[:, None]) * P + page[None, :]
    tl.store(out, bound, mask=alive[:, None] & (page < P)[None, :])


@triton.jit(do_not_specialize="Hkv Q queries P width min_pages units".split())
def _choose(
    BOUNDS, CHOSEN, COUNT, LENGTH, Hkv, Q, queries, P, width, min_pages, units: tl.int64,
    EXACT: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTH + head // Hkv).to(tl.int32)
    total = tl.minimum(tl.cdiv(length, PAGE), P)
    page = tl.arange(0, SIZE)

    # A page's vote: the largest of its shares of the queries' softmax; forced pages come first.
    vote = tl.zeros([SIZE], tl.float32)
    for row in range(0, queries):
        bound = tl.load(BOUNDS + (head * queries + row) * P + page, page < P, float("-inf"))
        weight = tl.exp2(bound - tl.max(bound, 0))
        # Summed as integers: whatever the order, hence the size, votes have the same bits.
        mass = tl.sum((weight * SUM_ONE).to(tl.int64), 0).to(tl.float32)
        vote = tl.maximum(vote, weight * SUM_ONE / mass)
    newest = tl.maximum(length - Q, 0) // PAGE  # pages that hold the new queries
    forced = (page < total) & ((page == 0) | (page >= newest))
    vote = tl.where(forced, float("inf"), tl.where(page < total, vote, float("-inf")))
    budget = ((total * units + (1 << EXACT) - 1 - (1 << EXACT - 20)) >> EXACT).to(tl.int32)
    budget = tl.maximum(tl.maximum(budget, min_pages), tl.sum(forced.to(tl.int32), 0))
    budget = tl.minimum(budget, total)

    # The lowest bound above which lie fewer pages than the budget; then as many at it as are due.
    order = _ordered(vote)
    low, high = tl.full([], LOWEST, tl.int64), tl.full([], 0x7FFFFFFF, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        few = tl.sum((order > middle.to(tl.int32)).to(tl.int32), 0) < budget
        low, high = tl.where(few, low, middle + 1), tl.where(few, middle, high)
    above = order > high.to(tl.int32)
    tie = (order == high.to(tl.int32)) & (page < total)
    rank = tl.cumsum(tie.to(tl.int32), 0)
    kept = above | (tie & (rank <= budget - tl.sum(above.to(tl.int32), 0)))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    out = CHOSEN + head * width
    tl.store(out + place, page.to(tl.int64), mask=kept & (place < width))
    unused = (page >= budget) & (page < width)
    tl.store(out + page, tl.zeros([SIZE], tl.int64) + (P - 1), mask=unused)
    tl.store(COUNT + head, tl.minimum(budget, width).to(tl.int64))
