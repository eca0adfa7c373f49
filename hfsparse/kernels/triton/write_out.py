"""A decode step's new tokens into host memory, beside the copy that the device keeps of them.

The fast form of what `HostFull.append` writes there. Positions are read on the device: a step can
be captured as a CUDA graph. One program a row, kv head and new token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import await_previous, chained
from hfsparse.lists.hot import Hot


def write_out(hot: Hot, k: Tensor, v: Tensor, heads: Tensor, query_pos: Tensor) -> None:
    """Store tokens k `[B, Hkv, Q, D]`, v `[B, Hkv, Q, Dv]` of some heads [H] in host memory.

    query_pos [B, Q]: each token's position; -1 where a row has none. Nothing is written behind the
    last place.
    """
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    (B, H, N, D), DV, Q = hot.host_k.shape, v.shape[3], k.shape[2]
    _write_out[(B * H, Q)](
        *(k, v, hot.host_k, hot.host_v, heads, query_pos.contiguous()),
        *(s for t in (k, v) for s in t.stride()[:3]),
        *(H, Q, N),
        D=D,
        DV=DV,
        DP=triton.next_power_of_2(D),
        DVP=triton.next_power_of_2(DV),
        num_warps=1,
        **chained(str(k.device)),
    )


@triton.jit(do_not_specialize="H Q N".split())
def _write_out(
    K, V, HOST_K, HOST_V, HEADS, QUERY_POS,
    k_b: tl.int64, k_h: tl.int64, k_s, v_b: tl.int64, v_h: tl.int64, v_s, H, Q, N,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    head, token = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // H, tl.load(HEADS + head % H)
    at = tl.load(QUERY_POS + b * Q + token).to(tl.int64)
    if (at >= 0) & (at < N):
        d, dv = tl.arange(0, DP), tl.arange(0, DVP)
        k = tl.load(K + b * k_b + h * k_h + token * k_s + d, mask=d < D, other=0.0)
        v = tl.load(V + b * v_b + h * v_h + token * v_s + dv, mask=dv < DV, other=0.0)
        tl.store(HOST_K + (head * N + at) * D + d, k.to(HOST_K.dtype.element_ty), mask=d < D)
        tl.store(HOST_V + (head * N + at) * DV + dv, v.to(HOST_V.dtype.element_ty), mask=dv < DV)
