"""Labels of tokens in Triton: scored, the first half of a choice (`choose.py`), and written.

What labels are, `hfsparse.selectors.labels` says. Queries are projected by each program, which
costs less than a launch; their float32 numbers then meet labels, which float16 holds exactly, as
two float16 that sum up to them. Bound by memory: each label is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import LOG2E, await_previous, chained, is_nvidia
from hfsparse.kernels.triton.scores import Asked, units_of
from hfsparse.lists import PAGE
from hfsparse.lists.places import Place
from hfsparse.selectors.labels import Labelled

TOKENS = 256  # whose labels are read at once
RUN = 2048  # tokens that a program scores, where a tile has no more: it projects queries first
LARGE = tl.constexpr(0x6400)  # bits of 1024, a float16 whose last bits are units
# Four bytes t as two registers of two float16: 1024 and the bits, less what made them positive.
_FOUR = """{
.reg .b32 t, less;
%s
mov.b32 less, %s;
prmt.b32 $0, t, 0x64646464, 0x4140;
prmt.b32 $1, t, 0x64646464, 0x4342;
sub.f16x2 $0, $0, less;
sub.f16x2 $1, $1, less;
}"""
_HALF = "and.b32 t, t, 0x0f0f0f0f; xor.b32 t, t, 0x08080808;"
BYTES = tl.constexpr(_FOUR % ("xor.b32 t, $2, 0x80808080;", "0x64806480"))
LOW = tl.constexpr(_FOUR % (f"mov.b32 t, $2; {_HALF}", "0x64086408"))
HIGH = tl.constexpr(_FOUR % (f"shr.b32 t, $2, 4; {_HALF}", "0x64086408"))
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 that it is added to have no fraction
LEAST, MOST = tl.constexpr(2.0**-24), tl.constexpr(65504.0)  # of float16


def score(selector: Labelled, index: dict[str, Tensor], asked: Asked, scale: float) -> None:
    """Write what `selector.scores` says of labels `[B, Hkv, P, PAGE, ...]` and their scales."""
    (label, step), projection = _held(index), selector.asked.on(asked.q.device)
    rows = max(8, triton.next_power_of_2(min(asked.queries, 64)))
    run = max(1, RUN // (asked.tile * asked.budget.unit))
    _score[(triton.cdiv(asked.tiles, run), asked.programs, triton.cdiv(asked.queries, rows))](
        *(asked.q, projection, label, step, *asked.tensors()),
        *asked.q.stride()[:3],
        *(*label.stride()[:2], *step.stride()[:2]),
        *(*asked.numbers(), asked.tiles, scale * LOG2E.value),
        **_sizes(selector, projection),
        RUN=run,
        ROWS=rows,
        TOKENS=TOKENS,
        FOUR=is_nvidia(str(label.device)),
        **asked.settings(),
        num_warps=4,
        **chained(str(label.device)),
    )


def follow(part: Place, k: Tensor, heads: Tensor, query_pos: Tensor) -> None:
    """Write the labels of new tokens k `[B, Hkv, Q, D]`, of those heads [H] that the part has.

    query_pos [B, Q]: each token's position, -1 where there is none.
    """
    (label, step), projection = _held(part.index), part.selector.kept.on(k.device)
    k = k if k.stride(-1) == 1 else k.contiguous()
    (B, _, Q, _), H, room = k.shape, len(heads), label.shape[2] * PAGE
    _follow[(B * H,)](
        *(k, projection, label, step, heads, query_pos.contiguous(), part.k),
        *k.stride()[:3],
        *(*label.stride()[:2], *step.stride()[:2]),
        *(H, Q, room),
        **_sizes(part.selector, projection),
        ROWS=max(16, triton.next_power_of_2(Q)),
        num_warps=4,
        **chained(str(label.device)),
    )


def _held(index: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Labels and their scales, of 16 bits a stand-in that is not read."""
    return index["label"], index.get("scale", index["label"][..., 0])


def _sizes(selector: Labelled, projection: Tensor) -> dict[str, int]:
    """What kernels are compiled for: WIDE numbers, padded, lie in each of 1 or 2 halves."""
    _, D, rank = projection.shape
    wide = rank // 2 if selector.bits == 4 else rank
    wide_padded = max(16, triton.next_power_of_2(wide))
    depth = min(64, max(16, triton.next_power_of_2(D)))
    return {"D": D, "DEPTH": depth, "WIDE": wide, "PADDED": wide_padded, "BITS": selector.bits}


@triton.jit
def _project(
    at, PROJECTION, alive, first_column, RANK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
    WIDE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Rows `[ROWS, D]` that lie `at`, as KEPT holds them, times WIDE columns `[D, RANK]`."""
    column = tl.arange(0, PADDED)
    made = tl.zeros([ROWS, PADDED], tl.float32)
    for begin in range(0, D, DEPTH):
        d = begin + tl.arange(0, DEPTH)
        x = tl.load(at[:, None] + d[None, :], mask=alive[:, None] & (d < D)[None, :], other=0.0)
        inside = (d < D)[:, None] & (column < WIDE)[None, :]
        p = PROJECTION + d[:, None] * RANK + first_column + column[None, :]
        p = tl.load(p, mask=inside, other=0.0)
        made = tl.dot(x.to(KEPT).to(tl.float32), p, made, input_precision="ieee")
    return made


@triton.jit
def _halves(x):
    """x `[ROWS, PADDED]`, numbers between -1 and 1, as two float16 `[PADDED, ROWS]`: their sum."""
    x = tl.trans(x)
    near = x.to(tl.float16)
    return near, (x - near.to(tl.float32)).to(tl.float16)


@triton.jit
def _float16(label, SHIFT: tl.constexpr, BITS: tl.constexpr, FOUR: tl.constexpr):
    """BITS of bytes, from bit SHIFT on, signed, as float16: without a conversion, which is slow.

    What is added to make them positive are the last bits of a large number, which is taken away.
    FOUR: at once, which only a GPU does.
    """
    if FOUR:
        asm: tl.constexpr = BYTES if BITS == 8 else (LOW if SHIFT == 0 else HIGH)
        return tl.inline_asm_elementwise(asm, "=&r,=&r,r", [label], tl.float16, True, 4)
    HALF: tl.constexpr = 1 << (BITS - 1)
    bits = ((label.to(tl.int16) >> SHIFT) & (2 * HALF - 1)) ^ HALF
    return (bits | LARGE).to(tl.int16).to(tl.float16, bitcast=True) - (1024.0 + HALF)


@triton.jit(do_not_specialize="Hkv Q queries U below refresh tiles".split())
def _score(
    Q_, PROJECTION, LABEL, STEP, SCORES, TOTALS, LENGTH, MADE, HEADS,
    q_b: tl.int64, q_h: tl.int64, q_s, label_b: tl.int64, label_h: tl.int64,
    step_b: tl.int64, step_h: tl.int64,
    Hkv, Q, queries, U, below: tl.int64, refresh, tiles, times,
    D: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, PADDED: tl.constexpr,
    BITS: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    FOUR: tl.constexpr,
    TILE: tl.constexpr, UNIT: tl.constexpr, SOME: tl.constexpr, KEEPS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    first, head = tl.program_id(0) * RUN, tl.program_id(1).to(tl.int64)
    length, total = units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    if first * TILE >= total:
        return
    b, kv = head // Hkv, head % Hkv
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    alive = row < queries
    q_head = kv * (queries // Q) + row // Q
    if SOME:
        q_head = tl.load(HEADS + q_head, mask=alive, other=0)
    at = Q_ + b * q_b + q_head * q_h + (row % Q) * q_s
    RANK: tl.constexpr = 2 * WIDE if BITS == 4 else WIDE
    project = PROJECTION + kv * D * RANK
    kept: tl.constexpr = Q_.dtype.element_ty
    x = _project(at, project, alive, 0, RANK, D, DEPTH, WIDE, PADDED, ROWS, kept)
    most = tl.max(tl.abs(x), 1)
    if BITS == 4:
        z = _project(at, project, alive, WIDE, RANK, D, DEPTH, WIDE, PADDED, ROWS, kept)
        most = tl.maximum(most, tl.max(tl.abs(z), 1))
    most = tl.where(most == 0, 1.0, most)
    near, rest = _halves(x / most[:, None])
    if BITS == 4:
        near_z, rest_z = _halves(z / most[:, None])
    times *= most
    labels, steps = LABEL + b * label_b + kv * label_h, STEP + b * step_b + kv * step_h
    EACH: tl.constexpr = TOKENS // UNIT  # units of a part
    column = tl.arange(0, PADDED)
    for tile in range(first, tl.minimum(first + RUN, tl.cdiv(total, TILE))):
        out = (head * queries + row) * tiles + tile
        top = tl.full([EACH, ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([EACH, ROWS], tl.float32)
        for part in range(tl.cdiv(tl.minimum(length - tile * TILE * UNIT, TILE * UNIT), TOKENS)):
            token = tile * TILE * UNIT + part * TOKENS + tl.arange(0, TOKENS)
            real = token < length
            token = token.to(tl.int64)
            inside = real[:, None] & (column < WIDE)[None, :]
            label = tl.load(labels + token[:, None] * WIDE + column[None, :], mask=inside, other=0)
            if BITS == 16:
                s = tl.dot(label, rest, tl.dot(label, near))
            else:
                low = _float16(label, 0, BITS, FOUR)
                s = tl.dot(low, rest, tl.dot(low, near))
                if BITS == 4:
                    high = _float16(label, 4, BITS, FOUR)
                    s = tl.dot(high, rest_z, tl.dot(high, near_z, s))
                s *= tl.load(steps + token, mask=real, other=0.0).to(tl.float32)[:, None]
            s = tl.where(real[:, None], s, float("-inf"))
            if UNIT > 1:
                s = tl.max(tl.reshape(s, [EACH, UNIT, ROWS]), 1)
            s *= times[None, :]
            unit = part * EACH + tl.arange(0, EACH)
            tl.store(SCORES + out[None, :] * TILE + unit[:, None], s, mask=alive[None, :])
            new = tl.maximum(top, s)
            base = tl.where(new == float("-inf"), 0.0, new)
            mass = mass * tl.exp2(top - base) + tl.exp2(s - base)
            top = new
        new = tl.max(top, 0)
        base = tl.where(new == float("-inf"), 0.0, new)
        mass = tl.sum(mass * tl.exp2(top - base[None, :]), 0)
        tl.store(TOTALS + out, base + tl.log2(mass), mask=alive)


@triton.jit
def _rounded(x, step, END: tl.constexpr):
    """x `[ROWS, PADDED]` in whole steps, halves to even, between -END and END."""
    x = tl.div_rn(x, tl.broadcast_to(step[:, None], x.shape))
    return tl.minimum(tl.maximum(x + ROUND - ROUND, -1.0 * END), 1.0 * END).to(tl.int32)


@triton.jit(do_not_specialize="H Q room".split())
def _follow(
    K, PROJECTION, LABEL, STEP, HEADS, QUERY_POS, KEPT,
    k_b: tl.int64, k_h: tl.int64, k_s, label_b: tl.int64, label_h: tl.int64,
    step_b: tl.int64, step_h: tl.int64, H, Q, room,
    D: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, PADDED: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    position = tl.load(QUERY_POS + b * Q + row, mask=row < Q, other=-1)
    alive = (position >= 0) & (position < room)
    at = K + b * k_b + tl.load(HEADS + h) * k_h + row * k_s
    RANK: tl.constexpr = 2 * WIDE if BITS == 4 else WIDE
    project = PROJECTION + h * D * RANK
    kept: tl.constexpr = KEPT.dtype.element_ty
    x = _project(at, project, alive, 0, RANK, D, DEPTH, WIDE, PADDED, ROWS, kept)
    place = LABEL + b * label_b + h * label_h + position[:, None] * WIDE + column[None, :]
    inside = alive[:, None] & (column < WIDE)[None, :]
    if BITS == 16:
        tl.store(place, x.to(tl.float16), mask=inside)
    else:
        END: tl.constexpr = (1 << (BITS - 1)) - 1
        most = tl.max(tl.abs(x), 1)
        if BITS == 4:
            z = _project(at, project, alive, WIDE, RANK, D, DEPTH, WIDE, PADDED, ROWS, kept)
            most = tl.maximum(most, tl.max(tl.abs(z), 1))
        step = tl.div_rn(most, tl.full([ROWS], END, tl.float32))
        step = tl.minimum(tl.maximum(step, LEAST), MOST).to(tl.float16)
        label = _rounded(x, step.to(tl.float32), END)
        if BITS == 4:
            label = (_rounded(z, step.to(tl.float32), END) << 4) | (label & 15)
        tl.store(place, label.to(tl.int8), mask=inside)
        tl.store(STEP + b * step_b + h * step_h + position, step, mask=alive)
