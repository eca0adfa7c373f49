"""What the Triton kernels share: limits of devices, block sizes, rows of tensors, one tile of
attention, and the columns of the table that says where a head has its keys."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hfsparse.lists import Band, places

LOG2E = tl.constexpr(1.4426950408889634)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = (16, 32, 64, 128)
WIDEST = 512  # head and value dim
WIDEST_STORED = 256  # of stores that are read one by one
NEVER = tl.constexpr((1 << 31) - 1)  # the position of a key that no query reads
WIDTH = tl.constexpr(places.WIDTH)
(
    K_AT,
    V_AT,
    LOW_AT,
    HIGH_AT,
    ROW,
    SLOTS,
    SPAN_ROW,
    SPANS,
    SINK,
    SIZE,
    RECENT,
    RATE,
    CHUNKED,
    BELOW,
    LISTED,
    SPAN,
    DROPPED,
) = (tl.constexpr(i) for i in range(len(places.COLUMNS)))


@lru_cache
def shared_memory(device: str) -> int:
    """Bytes of shared memory that a program may take."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return 227 << 10


@lru_cache
def is_nvidia(device: str) -> bool:
    """Whether kernels are compiled for an NVIDIA GPU: neither for another, nor interpreted."""
    if triton.knobs.runtime.interpret or torch.version.hip is not None:
        return False
    return torch.device(device).type == "cuda"


@lru_cache
def has_tensor_memory(device: str) -> bool:
    """Whether products of many rows are summed up in tensor memory, as on a B200."""
    return is_nvidia(device) and torch.cuda.get_device_capability(device)[0] == 10


@lru_cache
def chained(device: str) -> dict[str, bool]:
    """Settings of a launch that may begin while the one before it ends, where devices can do that:
    programmatic dependent launch. Such a kernel begins with `await_previous`."""
    able = is_nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"CHAINED": able} | ({"launch_pdl": True} if able else {})


@triton.jit
def await_previous(CHAINED: tl.constexpr):
    """Wait until what earlier launches write is there; the next launch may get ready."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@lru_cache
def bands_on(bands: tuple[Band, ...], device: str) -> Tensor:
    """[H, 3] sink, recent and rate of each head; kept, so that a call copies nothing to the GPU."""
    return torch.tensor([(band.sink, band.recent, band.rate) for band in bands], device=device)


def units_of_logits(scale: float, softcap: float | None) -> tuple[float, float]:
    """`unit` and `inner` of `add_keys`: a logit in base 2 is a product of a query and a key times
    `unit`; under a softcap it is `unit` times the tanh of a product times `inner`."""
    if softcap:
        return softcap * LOG2E.value, scale / softcap
    return scale * LOG2E.value, 0.0


@triton.jit
def load_rows(base, stride, row, live, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """Rows of keys, values or queries `[rows, DP]`; zeros in dead rows and past the head dim."""
    d = tl.arange(0, DP)
    at = base + row[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    if D < DP:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _fold(acc, total, top, s, high, v, unit, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: logits `s * unit` in base 2, their row maxima `high`."""
    new = tl.maximum(top, high)
    base = new
    if MASKED:  # rows that have seen nothing yet
        base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s * unit - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, new


@triton.jit
def add_keys(
    acc, total, top, lost, q, k, v, kept, alive, unit, inner, skip,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to one tile: k, v `[KEYS, D]`, kept bool `[QUERIES, KEYS]`, alive `[QUERIES]`."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return add_logits(
        *(acc, total, top, lost, s, v, kept, alive, unit, inner, skip),
        *(MASKED, SOFTCAP, SKIP, PRECISION),
    )


@triton.jit
def add_logits(
    acc, total, top, lost, s, v, kept, alive, unit, inner, skip,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `add_keys`, of products of queries and keys s `[QUERIES, KEYS]`."""
    if SOFTCAP:
        s = 2 * tl.sigmoid(2 * inner * s) - 1  # tanh
    if MASKED:
        s = tl.where(kept, s, float("-inf"))
    high = tl.max(s, 1) * unit
    if SKIP:
        worth = alive & (high >= top - skip) & (high > float("-inf"))
        if tl.max(worth.to(tl.int32), 0) > 0:
            acc, total, top = _fold(acc, total, top, s, high, v, unit, MASKED, PRECISION)
        else:
            lost += 1
    else:
        acc, total, top = _fold(acc, total, top, s, high, v, unit, MASKED, PRECISION)
    return acc, total, top, lost


@triton.jit
def lost_by(TABLE, head, b):
    """How many keys row b of a head lacks."""
    at = look_up(TABLE, head, DROPPED)
    return tl.load(at.to(tl.pointer_type(tl.int64)) + b, mask=at != 0, other=0).to(tl.int32)


@triton.jit
def look_up(TABLE, head, COLUMN: tl.constexpr):
    return tl.load(TABLE + head * WIDTH + COLUMN)
