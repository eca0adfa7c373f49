"""Quest's bounds in Triton: the first half of its choice of units (`choose.py`).

Each span's minima and maxima are read once; of a unit's bounds the best counts. Bound by memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import LOG2E, await_previous, chained
from hfsparse.kernels.triton.scores import Asked, store_scores, units_of
from hfsparse.selectors.quest import Quest


def score(quest: Quest, index: dict[str, Tensor], asked: Asked, scale: float) -> None:
    """Write what `quest.scores` says of index low and high `[B, Hkv, P, ...]`."""
    low, high = (t if t.ndim == 4 else t.flatten(2, 3) for t in (index["low"], index["high"]))
    low, high = (t if t.stride(-1) == 1 else t.contiguous() for t in (low, high))
    D, rows = low.shape[3], max(16, triton.next_power_of_2(min(asked.queries, 64)))
    _bounds[(asked.tiles, asked.programs, triton.cdiv(asked.queries, rows))](
        *(asked.q, low, high, *asked.tensors()),
        *(s for t in (asked.q, low, high) for s in t.stride()[:3]),
        *(*asked.numbers(), scale * LOG2E.value),
        D=D,
        DEPTH=min(64, max(16, triton.next_power_of_2(D) // 2)),
        ROWS=rows,
        SPANS=quest.unit // quest.span,
        **asked.settings(),
        num_warps=4,
        **chained(str(low.device)),
    )


@triton.jit(do_not_specialize="Hkv Q queries U below refresh".split())
def _bounds(
    Q_, LOW, HIGH, SCORES, TOTALS, LENGTH, MADE, HEADS,
    q_b: tl.int64, q_h: tl.int64, q_s, low_b: tl.int64, low_h: tl.int64, low_p,
    high_b: tl.int64, high_h: tl.int64, high_p,
    Hkv, Q, queries, U, below: tl.int64, refresh, times,
    D: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNIT: tl.constexpr, SPANS: tl.constexpr, SOME: tl.constexpr, KEEPS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length, total = units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    if tile * TILE >= total:
        return
    b, kv = head // Hkv, head % Hkv
    unit = tile * TILE + tl.arange(0, TILE)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    alive = row < queries
    total_spans = tl.minimum(tl.cdiv(length, UNIT // SPANS), U * SPANS)
    q_head = kv * (queries // Q) + row // Q
    if SOME:
        q_head = tl.load(HEADS + q_head, mask=alive, other=0)
    at = Q_ + b * q_b + q_head * q_h + (row % Q) * q_s
    low, high = LOW + b * low_b + kv * low_h, HIGH + b * high_b + kv * high_h
    best = tl.full([ROWS, TILE], float("-inf"), tl.float32)
    for nth in range(SPANS):  # of a unit's bounds the best counts
        span = unit * SPANS + nth
        # Of a row's last unit some spans may lie beyond the row, whose bounds are of no keys.
        real = span < total_spans
        bound = tl.zeros([ROWS, TILE], tl.float32)
        for first in range(0, D, DEPTH):
            d = first + tl.arange(0, DEPTH)
            q = tl.load(at[:, None] + d[None, :], mask=alive[:, None] & (d < D)[None, :], other=0.0)
            inside = real[:, None] & (d < D)[None, :]
            least = tl.load(low + span[:, None] * low_p + d[None, :], mask=inside, other=0.0)
            most = tl.load(high + span[:, None] * high_p + d[None, :], mask=inside, other=0.0)
            up = tl.maximum(q, 0.0).to(most.dtype)
            down = tl.minimum(q, 0.0).to(least.dtype)
            bound = tl.dot(up, tl.trans(most), bound, input_precision="ieee")
            bound = tl.dot(down, tl.trans(least), bound, input_precision="ieee")
        best = tl.maximum(best, tl.where(real[None, :], bound * times, float("-inf")))
    store_scores(SCORES, TOTALS, best, head, queries, row, tile, alive, TILE)
