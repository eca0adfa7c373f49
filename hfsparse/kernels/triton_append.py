"""A decode step's new tokens into one store of a layer's cache, in one Triton launch.

The fast form of `Full.append` and `Ring.append` where the store has room already. What changes
from step to step, the positions, is read on the device: a step can be captured as a CUDA graph,
and a new length compiles nothing. A program serves one kv head and a part of its channels. Bound
by latency: it reads at most a page of old keys a head, to renew the page's minima and maxima, and
nothing that the same launch writes. At most 16 new tokens a row; no gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton_prefill import DTYPES, NEVER
from hfsparse.lists import PAGE

if TYPE_CHECKING:
    from hfsparse.kernels import Need

QUERIES = 16  # new tokens of a row, at most
WIDE = 64  # channels of a program


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def append(
    k: Tensor,
    v: Tensor,
    into_k: Tensor,
    into_v: Tensor,
    query_pos: Tensor,
    *,
    sink: int = 0,
    size: int = 0,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> None:
    """Store new tokens k `[B, H, Q, D]`, v `[B, H, Q, Dv]` in into_k, into_v `[B, H, N, D or Dv]`.

    query_pos [B, Q]: each token's position, rising by one along a row; -1, behind the others,
    where a row has none: it is not stored. size = 0: position p lies in slot p; else in a ring's,
    p if that is under `sink`, else `sink + (p - sink) % size`. Nothing is stored beyond slot N - 1.

    low, high `[B, H, P, D]`: minima and maxima a page of a store without a ring. Those of the
    pages with new tokens are renewed, over what the rows now hold. The buffers are contiguous.
    """
    B, H, Q, D = k.shape
    N, Dv = into_k.shape[2], v.shape[3]
    if not 0 < Q <= QUERIES:
        raise ValueError(f"{Q} new tokens: 1 to {QUERIES} are supported")
    held = (into_k, into_v) if low is None else (into_k, into_v, low, high)
    if not all(t.is_contiguous() for t in held):
        raise ValueError("the cache's buffers must be contiguous")
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    _append[(B * H, triton.cdiv(max(D, Dv), WIDE))](
        *(k, v, into_k, into_v, query_pos.contiguous()),
        *((into_k, into_k) if low is None else (low, high)),
        *(s for t in (k, v) for s in t.stride()[:3]),
        *(H, N, 0 if low is None else low.shape[2], Q, sink, size),
        D=D,
        DV=Dv,
        WIDE=WIDE,
        ROWS=triton.next_power_of_2(Q),
        PAGE=PAGE,
        RING=size > 0,
        SUMMARIES=low is not None,
        num_warps=4,
    )


@triton.jit(do_not_specialize="H N P Q sink size".split())
def _append(
    K, V, INTO_K, INTO_V, QUERY_POS, LOW, HIGH,
    k_b: tl.int64, k_h: tl.int64, k_s, v_b: tl.int64, v_h: tl.int64, v_s,
    H, N, P, Q, sink, size,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, RING: tl.constexpr, SUMMARIES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    row, lane = tl.arange(0, ROWS), tl.arange(0, PAGE)
    at = tl.load(QUERY_POS + b * Q + row, mask=row < Q, other=-1).to(tl.int32)
    last = tl.max(at, 0)
    slot, new = at, at >= 0
    if RING:
        slot = tl.where(at < sink, at, sink + (at - sink) % size)
        stored = new & ((at < sink) | (at > last - size))  # one token a slot: the newest
    else:
        stored = new & (slot < N)
    d = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    whole, some = d < D, d < DV
    k = K + b * k_b + h * k_h + row[:, None] * k_s + d[None, :]
    k = tl.load(k, mask=new[:, None] & whole[None, :], other=0.0).to(INTO_K.dtype.element_ty)
    v = V + b * v_b + h * v_h + row[:, None] * v_s + d[None, :]
    v = tl.load(v, mask=new[:, None] & some[None, :], other=0.0).to(INTO_V.dtype.element_ty)

    if SUMMARIES:  # of old keys in the cache and new ones in k: what is stored below is not read
        first = tl.min(tl.where(new, at, NEVER), 0)
        fresh = k.to(tl.float32)
        for page in range(first // PAGE, tl.minimum(last // PAGE + 1, P)):
            before = page * PAGE + lane < first
            old = tl.load(
                INTO_K + (head * N + page * PAGE + lane)[:, None] * D + d[None, :],
                mask=before[:, None] & whole[None, :],
                other=0.0,
            ).to(tl.float32)
            here = (new & (at // PAGE == page))[:, None]
            least = tl.min(tl.where(before[:, None], old, float("inf")), 0)
            most = tl.max(tl.where(before[:, None], old, float("-inf")), 0)
            least = tl.minimum(least, tl.min(tl.where(here, fresh, float("inf")), 0))
            most = tl.maximum(most, tl.max(tl.where(here, fresh, float("-inf")), 0))
            out = (head * P + page) * D + d
            tl.store(LOW + out, least.to(LOW.dtype.element_ty), mask=whole)
            tl.store(HIGH + out, most.to(HIGH.dtype.element_ty), mask=whole)

    place = head * N + slot
    tl.store(INTO_K + place[:, None] * D + d[None, :], k, mask=stored[:, None] & whole[None, :])
    tl.store(INTO_V + place[:, None] * DV + d[None, :], v, mask=stored[:, None] & some[None, :])
