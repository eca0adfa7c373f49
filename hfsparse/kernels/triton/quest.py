"""Quest's choice of pages in two Triton kernels: `pages(quest, ...)` for `quest.pages(...)`.

The first reads every page's summary once and writes bounds, and how much softmax weight each tile
of pages has in all. The second, a program a kv head, adds the tiles up, so that bounds become
votes, finds the vote at which enough pages are kept by trying two float32 bit patterns at a time
(ties go to the lower page, as a stable sort has it) and writes them in ascending order. Nothing is
sorted, no host waits. Votes lie in registers, so the second kernel compiles once for each of six
sizes of cache. Lengths are read on the device, and what is chosen does not depend on the room there
is for more pages, so that a CUDA graph over a cache's whole room serves every step. A row whose
last choice is young (`refresh`), or that is too short for one, leaves both early.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import DTYPES, LOG2E
from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.choice import Choice
from hfsparse.selectors.quest import Quest
from hfsparse.shares import ratio

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

SIZES = tuple(1 << n for n in range(10, 16))  # pages
MOST = SIZES[-1] - 1  # pages; two counts of them fit into an int32
WIDEST_KEY = 1024  # dims; latents (MLA) are 576 wide
EARLY = tl.constexpr(1 << 13)  # pages up to which four rows of bounds fit into registers
TILE = 64  # pages whose bounds one program computes
FIRST, LAST = tl.constexpr(0x3F800000), tl.constexpr(0x43160000)  # bits of 1.0 and 150.0
SUM_ONE = tl.constexpr(float(1 << 32))  # what a weight of 1 is in sums


def why_not(need: Need) -> str | None:
    """Why these kernels can't choose a selector's pages; None: they can."""
    if need.chooser is not Quest:
        return f"{need.chooser.kind} is not fused"
    if need.head_dim > WIDEST_KEY:
        return f"head dim {need.head_dim}: at most {WIDEST_KEY} is supported"
    if need.dtype not in DTYPES or need.index_dtype not in (None, need.dtype):
        return f"queries of {need.dtype} and a cache of {need.index_dtype or need.dtype}"
    if (pages := need.tokens // PAGE) > MOST:
        return f"{pages} pages: at most {MOST} are supported"
    return None


def pages(
    quest: Quest,
    q: Tensor,
    index: dict[str, Tensor],
    length: Tensor,
    scale: float,
    heads: slice | Tensor = slice(None),
    below: int = 0,
    choice: Choice | None = None,
    read: Tensor | None = None,
) -> PageLists:
    """As Quest.pages: q `[B, Hq, Q, D]`, index low and high `[B, Hkv, P, D]`, length [B].

    heads, below, choice and read: as the table SELECT has them; lists of a choice lie in its own
    tensors.
    """
    q, low, high = q.detach(), index["low"], index["high"]
    q, heads = (q, heads) if isinstance(heads, Tensor) else (q[:, heads], None)
    B, Hq, Q, D = q.shape
    Hq = Hq if heads is None else len(heads)
    Hkv, P = low.shape[1:3]
    q, low, high = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, low, high))
    queries, tiles = Hq // Hkv * Q, triton.cdiv(P, TILE)
    bounds = q.new_empty(B * Hkv, queries, tiles * TILE, dtype=torch.float32)
    totals = q.new_empty(B * Hkv, queries, tiles, dtype=torch.float32)
    rows = max(16, triton.next_power_of_2(min(queries, 64)))
    length = length.contiguous()
    made = length if choice is None else choice.length  # a stand-in that is not read
    _bounds[(tiles, B * Hkv, triton.cdiv(queries, rows))](
        *(q, low, high, bounds, totals, length, made, length if heads is None else heads),
        *(s for t in (q, low, high) for s in t.stride()[:3]),
        *(Hkv, Q, queries, P, below, quest.refresh, scale * LOG2E.value),
        D=D,
        DEPTH=min(64, max(16, triton.next_power_of_2(D) // 2)),
        ROWS=rows,
        TILE=TILE,
        PAGE=PAGE,
        SOME=heads is not None,
        KEEPS=choice is not None,
        num_warps=4,
    )
    width = quest.budget.width(P, Q)
    if choice is None:
        chosen = torch.empty(B, Hkv, width, dtype=torch.int64, device=q.device)
    else:
        chosen = choice.pages[..., :width]
    count = torch.empty(B, Hkv, dtype=torch.int64, device=q.device)
    size = next(size for size in SIZES if size >= P)
    _choose[(B * Hkv,)](
        *(bounds, totals, chosen, count, length, made),
        *(count if choice is None else choice.count, count if read is None else read),
        *(Hkv, Q, queries, P, tiles, width, chosen.stride(1), quest.min_pages),
        *(below, quest.refresh, *ratio(quest.share), *ratio(quest.top_p)),
        SIZE=size,
        TILE=TILE,
        PAGE=PAGE,
        MASS=quest.top_p > 0,
        KEEPS=choice is not None,
        COUNTS=read is not None,
        num_warps=max(4, min(32, size // 512)),
    )
    return PageLists(chosen, count)


@triton.jit
def _young(length, MADE, head, refresh):
    """Whether a row's last choice is read on, and how long the row was then."""
    made = tl.load(MADE + head).to(tl.int32)
    return (made > 0) & (length >= made) & (length - made < refresh), made


@triton.jit(do_not_specialize="Hkv Q queries P below refresh".split())
def _bounds(
    Q_, LOW, HIGH, BOUNDS, TOTALS, LENGTH, MADE, HEADS,
    q_b: tl.int64, q_h: tl.int64, q_s, low_b: tl.int64, low_h: tl.int64, low_p,
    high_b: tl.int64, high_h: tl.int64, high_p,
    Hkv, Q, queries, P, below: tl.int64, refresh, unit,
    D: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr, SOME: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, kv = head // Hkv, head % Hkv
    length = tl.load(LENGTH + b).to(tl.int32)
    total = tl.where(length < below, 0, tl.minimum(tl.cdiv(length, PAGE), P))
    if KEEPS:
        young, _ = _young(length, MADE, head, refresh)
        total = tl.where(young, 0, total)
    if tile * TILE >= total:
        return
    page = tile * TILE + tl.arange(0, TILE)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real, alive = page < total, row < queries
    q_head = kv * (queries // Q) + row // Q
    if SOME:
        q_head = tl.load(HEADS + q_head, mask=alive, other=0)
    at = Q_ + b * q_b + q_head * q_h + (row % Q) * q_s
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
    at = (head * queries + row) * tl.num_programs(0) + tile
    tl.store(BOUNDS + at[:, None] * TILE + tl.arange(0, TILE)[None, :], bound, mask=alive[:, None])
    top = tl.max(bound, 1)
    mass = tl.sum(tl.exp2(bound - top[:, None]), 1)
    tl.store(TOTALS + at, top + tl.log2(mass), mask=alive)


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
def _keys(count, length, PAGE: tl.constexpr):
    """Keys in pages of which the last is the row's last."""
    return count.to(tl.int64) * PAGE - (tl.cdiv(length, PAGE) * PAGE - length)


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


NUMBERS = "Hkv Q queries P tiles width stride min_pages short refresh part whole votes all_votes"


@triton.jit(do_not_specialize=NUMBERS.split())
def _choose(
    BOUNDS, TOTALS, CHOSEN, COUNT, LENGTH, MADE, KEPT, READ,
    Hkv, Q, queries, P, tiles, width, stride, min_pages, short: tl.int64, refresh,
    part: tl.int64, whole: tl.int64, votes: tl.int64, all_votes: tl.int64,
    SIZE: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr,
    MASS: tl.constexpr, KEEPS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTH + head // Hkv).to(tl.int32)
    total = tl.minimum(tl.cdiv(length, PAGE), P)
    page, tile = tl.arange(0, SIZE), tl.arange(0, SIZE // TILE)
    out = CHOSEN + head * stride

    if length < short:
        tl.store(COUNT + head, tl.zeros([], tl.int64))
        if not KEEPS:  # what no list uses names a page too
            tl.store(out + page, tl.zeros([SIZE], tl.int64), mask=page < width)
        return
    if KEEPS:
        young, made = _young(length, MADE, head, refresh)
        if young:  # read on, and what the row has grown by
            kept, then = tl.load(KEPT + head).to(tl.int32), tl.cdiv(made, PAGE)
            place = kept + page - then
            grown = (page >= then) & (page < total) & (place < width)
            tl.store(out + place, page.to(tl.int64), mask=grown)
            count = tl.minimum(kept + total - then, width)
            tl.store(COUNT + head, count.to(tl.int64))
            if COUNTS:
                tl.atomic_add(READ + head % Hkv, _keys(count, length, PAGE))
            return

    # A page's cost is how often 1 is halved to give its vote, the largest of its shares of the
    # queries' softmax. Of a vote that float32 has as 0 it is 149.
    cost = tl.full([SIZE], 149.0, tl.float32)
    for first in range(0, queries, 4):
        a = head * queries + first
        b = head * queries + tl.minimum(first + 1, queries - 1)
        c = head * queries + tl.minimum(first + 2, queries - 1)
        d = head * queries + tl.minimum(first + 3, queries - 1)
        if SIZE <= EARLY:  # registers hold four rows: they come while totals are made
            bound_a = _row(BOUNDS, a, page, tiles * TILE)
            bound_b = _row(BOUNDS, b, page, tiles * TILE)
            bound_c = _row(BOUNDS, c, page, tiles * TILE)
            bound_d = _row(BOUNDS, d, page, tiles * TILE)
        whole_a, whole_b, whole_c, whole_d = _totals(
            tl.where(tile * TILE < total, _row(TOTALS, a, tile, tiles), float("-inf")),
            tl.where(tile * TILE < total, _row(TOTALS, b, tile, tiles), float("-inf")),
            tl.where(tile * TILE < total, _row(TOTALS, c, tile, tiles), float("-inf")),
            tl.where(tile * TILE < total, _row(TOTALS, d, tile, tiles), float("-inf")),
        )
        if SIZE <= EARLY:
            cost = tl.minimum(cost, tl.minimum(whole_a - bound_a, whole_b - bound_b))
            cost = tl.minimum(cost, tl.minimum(whole_c - bound_c, whole_d - bound_d))
        else:
            cost = tl.minimum(cost, whole_a - _row(BOUNDS, a, page, tiles * TILE))
            cost = tl.minimum(cost, whole_b - _row(BOUNDS, b, page, tiles * TILE))
            cost = tl.minimum(cost, whole_c - _row(BOUNDS, c, page, tiles * TILE))
            cost = tl.minimum(cost, whole_d - _row(BOUNDS, d, page, tiles * TILE))

    # Pages by cost, as integers from FIRST to LAST; the forced ones, which are the first and those
    # of the new queries, come before.
    newest = tl.maximum(length - Q, 0) // PAGE
    rank = tl.maximum(cost, 0.0) + 1.0
    order = rank.to(tl.int32, bitcast=True)
    order = tl.where((page == 0) | (page >= newest), 0, order)
    order = tl.where(page < total, order, 0x7FFFFFFF)
    forced = tl.where(newest > 0, total - newest + 1, total)
    budget = tl.cdiv(total * part, whole).to(tl.int32)
    budget = tl.minimum(tl.maximum(tl.maximum(budget, min_pages), forced), total)

    # Before `low` come `below` pages, no more than the budget; up to `high` no fewer. Each pass
    # leaves about a third of what lies between, until as many as the budget come before `low`.
    low, high, below = tl.full([], FIRST, tl.int32), tl.full([], LAST, tl.int32), forced
    if MASS:
        # As many as hold enough of all votes: the cost at which, searched for as that below.
        vote = tl.where(page < total, _weight(1.0, rank), 0)
        need = tl.cdiv(tl.sum(vote, 0) * votes, all_votes)
        need -= tl.sum(tl.where(order == 0, vote, 0), 0)
        while low < high:
            third = (high - low) // 3
            near, far = low + third, low + 2 * third
            nearer = tl.sum(tl.where((order > 0) & (order <= near), vote, 0), 0)
            farther = tl.sum(tl.where((order > 0) & (order <= far), vote, 0), 0)
            low = tl.where(farther < need, far + 1, tl.where(nearer < need, near + 1, low))
            high = tl.where(nearer >= need, near, tl.where(farther >= need, far, high))
        below += tl.sum(tl.where((order > 0) & (order < low), 1, 0), 0)
        need -= tl.sum(tl.where((order > 0) & (order < low), vote, 0), 0)
        each = tl.maximum(_weight(1.0, low.to(tl.float32, bitcast=True)), 1)
        enough = below + (tl.maximum(need + each - 1, 0) // each).to(tl.int32)
        least = tl.minimum(tl.maximum(min_pages, forced), total)
        if (enough < least) | (enough > budget):  # the cost for another number is searched for
            low, high, below = tl.full([], FIRST, tl.int32), tl.full([], LAST, tl.int32), forced
        budget = tl.minimum(tl.maximum(enough, least), budget)
    while (below < budget) & (low < high):
        third = (high - low) // 3
        near, far = low + third, low + 2 * third
        counts = tl.sum(tl.where(order <= near, 1, 0) + tl.where(order <= far, 1 << 16, 0), 0)
        nearer, farther = counts & 0xFFFF, counts >> 16
        low = tl.where(farther <= budget, far + 1, tl.where(nearer <= budget, near + 1, low))
        below = tl.where(farther <= budget, farther, tl.where(nearer <= budget, nearer, below))
        high = tl.where(nearer > budget, near, tl.where(farther > budget, far, high))

    # All before `low`; of those at it, the lower pages, as many as are due.
    due = budget - below
    kind = tl.where(order < low, 1, tl.where(order == low, 1 << 16, 0))
    seen = tl.cumsum(kind, 0)
    kept = (kind == 1) | ((kind > 1) & (seen >> 16 <= due))
    place = (seen & 0xFFFF) + tl.minimum(seen >> 16, due) - 1
    tl.store(out + place, page.to(tl.int64), mask=kept & (place < width))
    unused = (page >= budget) & (page < width)
    tl.store(out + page, tl.zeros([SIZE], tl.int64) + (P - 1), mask=unused)
    count = tl.minimum(budget, width)
    tl.store(COUNT + head, count.to(tl.int64))
    if KEEPS:
        tl.store(KEPT + head, count.to(tl.int64))
        tl.store(MADE + head, length.to(tl.int64))
    if COUNTS:
        tl.atomic_add(READ + head % Hkv, _keys(count, length, PAGE))
