"""A step's new tokens, or a prompt's, into all stores of a layer's cache, in one Triton launch.

The fast form of `Full.append` and `Ring.append` where the stores have room already. What changes
from step to step, the positions, is read on the device: a step can be captured as a CUDA graph,
and a new length compiles nothing. A program serves one kv head and a part of its channels. Bound
by latency: of old keys it reads those of a page, or of a smaller span, that new ones join, to renew
its minima and maxima, and nothing that the same launch writes. At most 16 new tokens a row, or a
prompt of a program a page; no gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import (
    DTYPES,
    HIGH_AT,
    K_AT,
    LOW_AT,
    NEVER,
    ROW,
    SINK,
    SIZE,
    SLOTS,
    SPAN,
    SPAN_ROW,
    SPANS,
    V_AT,
    WIDEST_STORED,
    await_previous,
    chained,
    look_up,
    lost_by,
)
from hfsparse.lists import PAGE
from hfsparse.lists.places import Places

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

QUERIES = 16  # new tokens of a step's row, at most
WIDE = 64  # channels of a program


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    if need.packed and max(need.head_dim, need.value_dim) > WIDEST_STORED:
        dims = f"head dim {need.head_dim}, value dim {need.value_dim}"
        return f"{dims}: at most {WIDEST_STORED} is supported in fewer bits"
    if need.prompt and not need.plain:
        return "a prompt that is packed, lies in host memory, passes a ring or has a PyTorch index"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def append(k: Tensor, v: Tensor, into: Places, query_pos: Tensor, prompt: bool = False) -> None:
    """Store new tokens k `[B, Hkv, Q, D]`, v `[B, Hkv, Q, Dv]` where each kv head has its own.

    query_pos [B, Q]: each token's position, rising by one along a row; -1, behind the others,
    where a row has none: it is not stored. Of tokens that share a ring's slot the newest is stored,
    nothing beyond a store's last slot. Minima and maxima of the spans with new tokens are renewed,
    over what the rows now hold. prompt: the first is at position 0, no two share a slot, and there
    may be more than 16.
    """
    B, H, Q, D = k.shape
    Dv = v.shape[3]
    if not 0 < Q <= QUERIES and not prompt:
        raise ValueError(f"{Q} new tokens: 1 to {QUERIES} are supported behind a past")
    rows = min(triton.next_power_of_2(Q), PAGE)
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    _append[(B * H, triton.cdiv(max(D, Dv), WIDE), triton.cdiv(Q, rows))](
        *(k, v, into.k, into.v, into.cells, query_pos.contiguous()),
        *(s for t in (k, v) for s in t.stride()[:3]),
        *(H, Q),
        D=D,
        DV=Dv,
        STEP=into.value_step,
        WIDE=WIDE,
        ROWS=rows,
        PAGE=PAGE,
        UNIT=into.unit,
        SUMMARIES=into.summaries,
        DROPS=into.drops,
        num_warps=4,
        **chained(str(k.device)),
    )


@triton.jit(do_not_specialize="H Q".split())
def _append(
    K, V, INTO_K, INTO_V, TABLE, QUERY_POS,
    k_b: tl.int64, k_h: tl.int64, k_s, v_b: tl.int64, v_h: tl.int64, v_s, H, Q,
    D: tl.constexpr, DV: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, SUMMARIES: tl.constexpr, DROPS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    row, lane = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAGE)
    at = tl.load(QUERY_POS + b * Q + row, mask=row < Q, other=-1).to(tl.int32)
    if DROPS:
        at = tl.where(at < 0, at, at - lost_by(TABLE, h, b))
    sink, size = look_up(TABLE, h, SINK).to(tl.int32), look_up(TABLE, h, SIZE).to(tl.int32)
    slots, begin = look_up(TABLE, h, SLOTS), b * look_up(TABLE, h, ROW)
    keys = INTO_K + look_up(TABLE, h, K_AT) * UNIT + begin * D
    values = INTO_V + look_up(TABLE, h, V_AT) * UNIT + begin * STEP
    last = tl.max(at, 0)
    new = at >= 0
    slot = tl.where(at < sink, at, sink + (at - sink) % size)
    stored = new & (slot < slots) & ((at < sink) | (at > last - size))  # a slot's newest
    d = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    whole, some = d < D, d < DV
    k = K + b * k_b + h * k_h + row[:, None] * k_s + d[None, :]
    k = tl.load(k, mask=new[:, None] & whole[None, :], other=0.0).to(INTO_K.dtype.element_ty)
    v = V + b * v_b + h * v_h + row[:, None] * v_s + d[None, :]
    v = tl.load(v, mask=new[:, None] & some[None, :], other=0.0).to(INTO_V.dtype.element_ty)

    if SUMMARIES:  # of old keys in the cache and new ones in k: what is stored below is not read
        spans, begin = look_up(TABLE, h, SPANS).to(tl.int32), b * look_up(TABLE, h, SPAN_ROW)
        low = INTO_K + look_up(TABLE, h, LOW_AT) * UNIT + begin * D
        high = INTO_K + look_up(TABLE, h, HIGH_AT) * UNIT + begin * D
        width = look_up(TABLE, h, SPAN).to(tl.int32)
        first = tl.min(tl.where(new, at, NEVER), 0)
        fresh = k.to(tl.float32)
        for span in range(first // width, tl.minimum(last // width + 1, spans)):
            held = span * width + lane
            before = (lane < width) & (held < first)
            old = keys + (held % size).to(tl.int64)[:, None] * D + d[None, :]  # it has no sink
            old = tl.load(old, mask=before[:, None] & whole[None, :], other=0.0).to(tl.float32)
            here = (new & (at // width == span))[:, None]
            least = tl.min(tl.where(before[:, None], old, float("inf")), 0)
            most = tl.max(tl.where(before[:, None], old, float("-inf")), 0)
            least = tl.minimum(least, tl.min(tl.where(here, fresh, float("inf")), 0))
            most = tl.maximum(most, tl.max(tl.where(here, fresh, float("-inf")), 0))
            place = span * D + d
            tl.store(low + place, least.to(INTO_K.dtype.element_ty), mask=whole)
            tl.store(high + place, most.to(INTO_K.dtype.element_ty), mask=whole)

    place = slot.to(tl.int64)[:, None]
    tl.store(keys + place * D + d[None, :], k, mask=stored[:, None] & whole[None, :])
    tl.store(values + place * STEP + d[None, :], v, mask=stored[:, None] & some[None, :])
