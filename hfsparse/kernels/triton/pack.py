"""Pages that a step's new tokens fill, packed in Triton, one store of the cache after another.

Reference: `hfsparse.lists.packed.pack`, bit for bit. `append` has stored the tokens among the
newest, which lie as they came; a program looks whether those of one kv head end a page, and packs
its keys or its values. In most steps there is none, and a launch is what it costs: positions are
read on the device, so that a step can be captured as a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import NEVER, await_previous, chained
from hfsparse.lists import PAGE
from hfsparse.lists.packed import LARGEST, NARROW, NEWEST, TINY, WIDE, steps, width_of
from hfsparse.lists.places import Place

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 that it is added to have no fraction
LEAST, MOST = tl.constexpr(TINY), tl.constexpr(LARGEST)
WIDE_STEP, NARROW_STEP = tl.constexpr(WIDE), tl.constexpr(NARROW)


def pack(part: Place, query_pos: Tensor) -> None:
    """Pack the pages of a store that tokens at positions query_pos `[B, Q]` have filled.

    Positions rise by one along a row; -1, behind the others, where a row has none. At most 16.
    """
    (B, Q), H, packed = query_pos.shape, len(part.heads), part.packed
    D, DV = packed.newest_k.shape[3], packed.newest_v.shape[3]
    _pack[(B * H, 2)](
        *packed[1:],
        query_pos.contiguous(),
        *(H, Q, packed.slots // PAGE, part.size // PAGE),
        D=D,
        DV=DV,
        BITS=width_of(packed.bits),
        FLOAT=packed.bits == "fp8",
        STEPS=steps(packed.bits),
        PAGE=PAGE,
        NEWEST=NEWEST,
        ROWS=triton.next_power_of_2(Q),
        num_warps=8 if max(D, DV) > 128 else 4,
        **chained(str(query_pos.device)),
    )


@triton.jit
def _encode(t, low, high, BITS: tl.constexpr, FLOAT: tl.constexpr, STEPS: tl.constexpr):
    """The code of each number of t, as `packed.pack` has it; low and high are as wide as t."""
    if FLOAT:  # by its bits: not every GPU, nor the interpreter, rounds to fp8 alike
        x = tl.div_rn(t, tl.maximum(tl.maximum(-low, high) * STEPS, LEAST))
        size = tl.minimum(tl.abs(x), MOST)
        bits = size.to(tl.int32, bitcast=True)
        code = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        fine = (size * 512 + ROUND - ROUND).to(tl.int32)  # under 2^-6 all steps are of 2^-9
        code = tl.where(size < 0.015625, fine, code)
        return code | ((x.to(tl.int32, bitcast=True) >> 24) & 128)
    return _code(t, low, (high - low) * STEPS, (1 << BITS) - 1)


@triton.jit
def _code(t, low, step, last):
    """How many steps above low t is, from 0 to last."""
    code = tl.div_rn(t - low, tl.maximum(step, LEAST)) + ROUND - ROUND  # halves to even
    return tl.minimum(tl.maximum(code, 0.0), last * 1.0).to(tl.int32)


@triton.jit
def _channels(d, part: tl.constexpr, W: tl.constexpr, BYTES: tl.constexpr):
    """The channels of bytes d, as `packed.of_bytes` has them."""
    return d if part == 0 else BYTES + (d + W // 8 * 2) % BYTES


@triton.jit
def _pack_uneven(NEW, CODE, LOW, HIGH, W: tl.constexpr, PAGE: tl.constexpr):
    """Pack a page of keys `[PAGE, W]` in 4 bits: 5 and 3 of a byte's two channels."""
    BYTES: tl.constexpr = W // 2
    token, d = tl.arange(0, PAGE)[:, None], tl.arange(0, triton.next_power_of_2(BYTES))
    other = _channels(d, 1, W, BYTES)
    inside = (d < BYTES)[None, :] & (token >= 0)
    first = tl.load(NEW + token * W + d[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(NEW + token * W + other[None, :], mask=inside, other=0.0).to(tl.float32)
    low, high = tl.min(first, 0), tl.max(first, 0)
    least, most = tl.min(second, 0), tl.max(second, 0)
    tl.store(LOW + d, low.to(LOW.dtype.element_ty), mask=d < BYTES)
    tl.store(LOW + other, least.to(LOW.dtype.element_ty), mask=d < BYTES)
    tl.store(HIGH + d, high.to(HIGH.dtype.element_ty), mask=d < BYTES)
    tl.store(HIGH + other, most.to(HIGH.dtype.element_ty), mask=d < BYTES)
    wide = high - low > most - least
    step = (high - low) * tl.where(wide, WIDE_STEP, NARROW_STEP)
    code = _code(first, low[None, :], step[None, :], tl.where(wide, 31, 7)[None, :])
    step = (most - least) * tl.where(wide, NARROW_STEP, WIDE_STEP)
    upper = _code(second, least[None, :], step[None, :], tl.where(wide, 7, 31)[None, :])
    code |= upper << tl.where(wide, 5, 3)[None, :]
    tl.store(CODE + token * BYTES + d[None, :], code.to(tl.uint8), mask=inside)


@triton.jit
def _pack_page(
    NEW, CODE, LOW, HIGH,
    W: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, STEPS: tl.constexpr,
    BY_TOKEN: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Pack a page `[PAGE, W]` of keys, whose ends are by channel, or of values, by token."""
    PARTS: tl.constexpr = 8 // BITS  # channels of a byte
    BYTES: tl.constexpr = W * BITS // 8
    WIDE: tl.constexpr = triton.next_power_of_2(BYTES)
    token, d = tl.arange(0, PAGE), tl.arange(0, WIDE)
    inside = (d < BYTES)[None, :] & (token >= 0)[:, None]
    least = tl.full([PAGE], float("inf"), tl.float32)
    most = tl.full([PAGE], float("-inf"), tl.float32)
    if BY_TOKEN:
        for part in tl.static_range(PARTS):
            at = token[:, None] * W + _channels(d, part, W, BYTES)[None, :]
            t = tl.load(NEW + at, mask=inside, other=0.0).to(tl.float32)
            least = tl.minimum(least, tl.min(tl.where(inside, t, float("inf")), 1))
            most = tl.maximum(most, tl.max(tl.where(inside, t, float("-inf")), 1))
        tl.store(LOW + token, least.to(LOW.dtype.element_ty))
        tl.store(HIGH + token, most.to(HIGH.dtype.element_ty))
    code = tl.zeros([PAGE, WIDE], tl.int32)
    for part in tl.static_range(PARTS):
        place = _channels(d, part, W, BYTES)
        t = tl.load(NEW + token[:, None] * W + place[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        if BY_TOKEN:
            low, high = least[:, None], most[:, None]
        else:
            low, high = tl.min(t, 0), tl.max(t, 0)
            tl.store(LOW + place, low.to(LOW.dtype.element_ty), mask=d < BYTES)
            tl.store(HIGH + place, high.to(HIGH.dtype.element_ty), mask=d < BYTES)
            low, high = low[None, :], high[None, :]
        low, high = tl.broadcast_to(low, t.shape), tl.broadcast_to(high, t.shape)
        code |= _encode(t, low, high, BITS, FLOAT, STEPS) << (part * BITS)
    place = token[:, None] * BYTES + d[None, :]
    tl.store(CODE + place, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize="H Q pages turn".split())
def _pack(
    K, V, LOW, HIGH, LEAST_, MOST_, NEW_K, NEW_V, QUERY_POS, H, Q, pages, turn,
    D: tl.constexpr, DV: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, STEPS: tl.constexpr,
    PAGE: tl.constexpr, NEWEST: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    head = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    at = tl.load(QUERY_POS + head // H * Q + row, mask=row < Q, other=-1).to(tl.int32)
    page = tl.min(tl.where(at < 0, NEVER, at), 0) // PAGE
    lies = page
    if (turn > 0) & (page >= pages - turn):  # a ring's last so many pages take turns
        lies = pages - turn + (page - pages + turn) % turn
    if ((tl.max(at, 0) + 1) // PAGE > page) & (lies < pages):
        place = head * pages + lies
        new = head * NEWEST + page * PAGE % NEWEST
        if tl.program_id(1) == 0:
            new_k, code = NEW_K + new * D, K + place * PAGE * (D * BITS // 8)
            low, high = LOW + place * D, HIGH + place * D
            if BITS == 4:
                _pack_uneven(new_k, code, low, high, D, PAGE)
            else:
                _pack_page(new_k, code, low, high, D, BITS, FLOAT, STEPS, False, PAGE)
        else:
            _pack_page(
                *(NEW_V + new * DV, V + place * PAGE * (DV * BITS // 8)),
                *(LEAST_ + place * PAGE, MOST_ + place * PAGE, DV, BITS, FLOAT, STEPS, True, PAGE),
            )
