"""RMS norms of a few rows in Triton, in one launch, whose sums are PyTorch's.

As `norm.py`, but a program adds the squares of its row in the order in which PyTorch's mean does:
four sums a thread, side by side or a block apart, then the threads' in halves. That order is no
promise of PyTorch's, so whoever asks compares. Bound by latency.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton import norm
from hfsparse.kernels.triton.limits import await_previous, chained

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

THREADS = 512  # of a block of PyTorch's
WARP = 32
RISING = False
SUMS = 4  # of a thread
LEAST, MOST = 128, 8192  # numbers of a row; of longer ones more than a warp adds up a part


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.head_dim % SUMS or not LEAST <= need.head_dim < MOST:
        return f"rows of {need.head_dim}: multiples of {SUMS} from {LEAST} to {MOST} are supported"
    return norm.why_not(need)


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    """As `plain.rms_norm`."""
    x, N = x.contiguous(), x.shape[-1]
    rows, out = x.numel() // N, torch.empty_like(x)
    beside = rows == 1 and N > LEAST
    width = min(_power(N // SUMS if beside else N), THREADS)
    width = min(width, THREADS // min(_power(rows), THREADS // min(width, WARP)))
    _norm[(rows,)](
        *(x, weight, out, eps, 1 / N),
        N=N,
        WIDTH=width,
        BESIDE=beside,
        ROUNDED=form == "rounded",
        MORE=form == "one more",
        RISING=RISING,
        num_warps=4,
        enable_fp_fusion=False,
        **chained(str(x.device)),
    )
    return out


def _power(n: int) -> int:
    """The largest power of 2 that is not above n."""
    return 1 << (n.bit_length() - 1)


@triton.jit
def _norm(
    X,
    W,
    OUT,
    eps,
    factor,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BESIDE: tl.constexpr,
    ROUNDED: tl.constexpr,
    MORE: tl.constexpr,
    RISING: tl.constexpr,
    CHAINED: tl.constexpr,
):
    thread, part = tl.arange(0, WIDTH)[:, None], tl.arange(0, 4)[None, :]
    own = thread * 4 + part if BESIDE else part * WIDTH + thread
    X += tl.program_id(0).to(tl.int64) * N
    OUT += tl.program_id(0).to(tl.int64) * N
    await_previous(CHAINED)
    sums = tl.zeros([WIDTH, 4], tl.float32)
    for first in range(0, N, 4 * WIDTH):
        x = tl.load(X + first + own, mask=first + own < N, other=0.0).to(tl.float32)
        sums += x * x
    scale = tl.rsqrt(_total(sums, WIDTH, RISING) * factor + eps)
    for first in range(0, N, 4 * WIDTH):
        at = first + own
        x = tl.load(X + at, mask=at < N, other=0.0).to(tl.float32) * scale
        w = tl.load(W + at, mask=at < N, other=0.0).to(tl.float32)
        if ROUNDED:
            x = x.to(OUT.dtype.element_ty).to(tl.float32)
        if MORE:
            w += 1.0
        tl.store(OUT + at, (x * w).to(OUT.dtype.element_ty), mask=at < N)


@triton.jit
def _total(sums, WIDTH: tl.constexpr, RISING: tl.constexpr):
    even, odd = tl.split(tl.reshape(sums, [WIDTH, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    total = a + b + c + d
    for bit in tl.static_range(1, 10):
        if WIDTH >> bit:
            if RISING and (WIDTH >> bit) < 32:
                total = tl.sum(tl.reshape(total, [WIDTH >> bit, 2]), 1)
            else:
                total = tl.sum(tl.reshape(total, [2, WIDTH >> bit]), 0)
    return tl.sum(total, 0)
