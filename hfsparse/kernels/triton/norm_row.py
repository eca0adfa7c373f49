"""RMS norms in Triton, in one launch, whose sums are PyTorch's.

As `norm.py`, but a program adds the squares of its row in the order in which PyTorch's mean does:
each thread of a block reads four numbers side by side, a stride apart, into four sums, which it
adds; then threads add in halves. That order is no promise of PyTorch's, so whoever asks compares.
Bound by latency. Several long rows are left to `norm.py`: for each few of them PyTorch has another
number of threads, and we would compile another kernel.
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

THREADS, WARP = 512, 32  # of a block of PyTorch's
LEAST, SHORT, MOST = 128, 512, 1 << 16  # numbers of a row; of shorter ones PyTorch reads one by one


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.head_dim % 4 or not LEAST <= need.head_dim < MOST:
        return f"rows of {need.head_dim}: multiples of 4 from {LEAST} to {MOST} are supported"
    return norm.why_not(need)


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    """As `plain.rms_norm`."""
    N = x.shape[-1]
    rows = x.numel() // N
    if rows > 1 and N > SHORT:
        return norm.rms_norm(x, weight, eps, form)
    x = x.contiguous()
    out = torch.empty_like(x)
    _norm[(rows,)](
        *(x, weight, out, eps, 1 / N),
        N=N,
        WIDTH=_threads(rows, N),
        ROUNDED=form == "rounded",
        MORE=form == "one more",
        num_warps=4,
        enable_fp_fusion=False,
        **chained(str(x.device)),
    )
    return out


def _threads(rows: int, N: int) -> int:
    """How many threads of PyTorch's add up a row."""
    width = min(_power(N // 4), THREADS)
    beside = min(_power(rows), THREADS // min(width, WARP))  # rows of a block
    return min(width, THREADS // beside)


def _power(n: int) -> int:
    """The largest power of 2 that is not above n."""
    return 1 << (n.bit_length() - 1)


@triton.jit
def _norm(
    X,
    W,
    OUT,
    eps,
    part,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDED: tl.constexpr,
    MORE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    X += tl.program_id(0).to(tl.int64) * N
    OUT += tl.program_id(0).to(tl.int64) * N
    own = tl.arange(0, 4 * WIDTH)
    await_previous(CHAINED)
    sums = tl.zeros([4 * WIDTH], tl.float32)
    for first in range(0, N, 4 * WIDTH):
        at = first + own
        x = tl.load(X + at, mask=at < N, other=0.0).to(tl.float32)
        sums += x * x
    root = tl.rsqrt(_total(sums, WIDTH) * part + eps)
    for first in range(0, N, 4 * WIDTH):
        at = first + own
        x = tl.load(X + at, mask=at < N, other=0.0).to(tl.float32) * root
        w = tl.load(W + at, mask=at < N, other=0.0).to(tl.float32)
        if ROUNDED:
            x = x.to(OUT.dtype.element_ty).to(tl.float32)
        if MORE:
            w += 1.0
        tl.store(OUT + at, (x * w).to(OUT.dtype.element_ty), mask=at < N)


@triton.jit
def _total(sums, WIDTH: tl.constexpr):
    even, odd = tl.split(tl.reshape(sums, [WIDTH, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    total = first + second + third + fourth
    for bit in tl.static_range(1, 10):
        if WIDTH >> bit:
            total = tl.sum(tl.reshape(total, [2, WIDTH >> bit]), 0)
    return tl.sum(total, 0)
