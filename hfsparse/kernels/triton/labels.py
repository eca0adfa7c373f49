"""Labels of tokens in Triton: scored, the first half of a choice (`choose.py`), and written.

What labels are, `hfsparse.selectors.labels` says. A launch projects the queries, whose numbers, in
16 bits, meet labels of 4 and 8 bits as integers: on an NVIDIA GPU four bytes at a time, as they lie
in memory. Labels of 16 bits are multiplied as float32. Each label is read once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import LOG2E, await_previous, chained, is_nvidia
from hfsparse.kernels.triton.scores import Asked, empty, units_of
from hfsparse.lists import PAGE
from hfsparse.lists.places import Place
from hfsparse.selectors.labels import Labelled

RUN = 2048  # tokens that a program scores
PART, FEW = 512, 128  # of which at once, where bytes are multiplied four at a time and where not
NUMBERS = 4096  # of a projection, held at once
MOST_Q = tl.constexpr(127.0 * 256)  # what the largest number of a query is in 16 bits
NIBBLES = tl.constexpr(-0x0F0F0F10)  # the high half of each of four bytes
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 that it is added to have no fraction
LEAST, MOST = tl.constexpr(2.0**-24), tl.constexpr(65504.0)  # of float16


def tile(unit: int) -> int:
    """How many units a program scores."""
    return RUN // unit


def score(selector: Labelled, index: dict[str, Tensor], asked: Asked, scale: float) -> None:
    """Write what `selector.scores` says of labels `[B, Hkv, P, PAGE, ...]` and their scales."""
    (label, step), projection = _held(index), selector.asked.on(asked.q.device)
    sizes = _sizes(selector, projection)
    four = sizes["WIDE"] % 4 == 0 and selector.bits < 16 and is_nvidia(str(label.device))
    rows = max(1, min(triton.next_power_of_2(asked.queries), 64 // sizes["PADDED"], 8))
    halves = 2 if selector.bits == 4 else 1
    new = {"dtype": torch.float32, "device": label.device}
    numbers = torch.empty(asked.programs, asked.queries, 4, sizes["PADDED"], **new)
    times = torch.empty(asked.programs, asked.queries, **new)
    more = {"FOUR": four, **asked.settings(), **chained(str(label.device))}
    _ask[(1, asked.programs, asked.queries)](
        *(asked.q, projection, numbers, times, *asked.tensors()[2:]),
        *asked.q.stride()[:3],
        *(*asked.numbers(), scale * LOG2E.value),
        **sizes,
        **more,
        num_warps=4,
    )
    _score[(asked.tiles, asked.programs, triton.cdiv(asked.queries, rows))](
        *(numbers, times, label, step, *asked.tensors()[:2], asked.length, asked.made),
        *(*label.stride()[:2], *step.stride()[:2]),
        *asked.numbers(),
        **{name: sizes[name] for name in ("WIDE", "PADDED", "BITS")},
        **_products(min(4, sizes["PADDED"] // 4), halves),
        ROWS=rows,
        TOKENS=PART if four else FEW,
        **more,
        num_warps=4,
    )


def follow(part: Place, k: Tensor, heads: Tensor, query_pos: Tensor) -> None:
    """Write the labels of new tokens k `[B, Hkv, Q, D]`, of those heads [H] that the part has.

    query_pos [B, Q]: each token's position, -1 where there is none.
    """
    (label, step), projection = _held(part.index), part.selector.kept.on(k.device)
    k = k if k.stride(-1) == 1 else k.contiguous()
    (B, _, Q, _), H, room = k.shape, len(heads), label.shape[2] * PAGE
    _follow[(B * H, Q)](
        *(k, projection, label, step, heads, query_pos.contiguous(), part.k),
        *k.stride()[:3],
        *(*label.stride()[:2], *step.stride()[:2]),
        *(H, Q, room),
        **_sizes(part.selector, projection),
        num_warps=4,
        **chained(str(label.device)),
    )


@lru_cache
def _products(words: int, halves: int) -> dict[str, Any]:
    """What sums up products of four bytes at a time, of so many words at once, in the first of as
    many results: of each half words of labels, and the high and low bytes of a query's numbers."""
    lines, first = ["mov.b32 s, 0;"], words
    for byte in (1, 2):
        for half in range(halves):
            for word in range(words):
                label = first + 3 * half * words + word
                lines += [f"dp4a.s32.s32 s, ${label}, ${label + byte * words}, s;"]
        lines += ["shl.b32 s, s, 8;" if byte == 1 else "mov.b32 $0, s;"]
    lines += [f"mov.b32 ${word}, 0;" for word in range(1, words)]
    text = "{.reg .b32 s; " + " ".join(lines) + "}"
    registers = ",".join(["=r"] * words + ["r"] * 3 * halves * words)
    return {"ASM": text, "REGISTERS": registers, "PACK": words}


def _held(index: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Labels and their scales, of 16 bits a stand-in that is not read."""
    return index["label"], index.get("scale", index["label"][..., 0])


def _sizes(selector: Labelled, projection: Tensor) -> dict[str, int]:
    """What kernels are compiled for: WIDE numbers, padded, lie in each of 1 or 2 halves."""
    _, D, rank = projection.shape
    wide = rank // 2 if selector.bits == 4 else rank
    wide_padded = max(4, triton.next_power_of_2(wide))
    depth = min(triton.next_power_of_2(D), max(1, NUMBERS // wide_padded))
    return {"D": D, "DEPTH": depth, "WIDE": wide, "PADDED": wide_padded, "BITS": selector.bits}


@triton.jit
def _project(
    at, PROJECTION, first_column, RANK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
    WIDE: tl.constexpr, PADDED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """What lies `at` [D], as KEPT holds it, times WIDE columns of `[D, RANK]`."""
    column = tl.arange(0, PADDED)
    made = tl.zeros([PADDED], tl.float32)
    for begin in range(0, D, DEPTH):
        d = begin + tl.arange(0, DEPTH)
        x = tl.load(at + d[:, None], mask=(d < D)[:, None], other=0.0)
        inside = (d < D)[:, None] & (column < WIDE)[None, :]
        p = PROJECTION + d[:, None] * RANK + first_column + column[None, :]
        p = tl.load(p, mask=inside, other=0.0)
        made += tl.sum(x.to(KEPT).to(tl.float32) * p, 0)
    return made


@triton.jit
def _store_bytes(out, n, PADDED: tl.constexpr):
    """Store the high and the low bytes, both signed, of integers n [PADDED], four to a word."""
    word, shift = tl.arange(0, PADDED // 4), tl.arange(0, 4) * 8
    high = (n + 128) >> 8
    low = n - (high << 8)
    high = tl.reshape(high & 255, [PADDED // 4, 4]) << shift[None, :]
    low = tl.reshape(low & 255, [PADDED // 4, 4]) << shift[None, :]
    tl.store(out + word, tl.sum(high, 1))
    tl.store(out + PADDED + word, tl.sum(low, 1))


@triton.jit(do_not_specialize="Hkv Q queries U below refresh".split())
def _ask(
    Q_, PROJECTION, NUMBERS_, TIMES, TALLY, LENGTH, MADE, HEADS,
    q_b: tl.int64, q_h: tl.int64, q_s,
    Hkv, Q, queries, U, below: tl.int64, refresh, times,
    D: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, PADDED: tl.constexpr,
    BITS: tl.constexpr, FOUR: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
    SOME: tl.constexpr, KEEPS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    # Of each row numbers in halves of PADDED, or bytes in quarters, and what they are times.
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2)
    empty(TALLY, head)
    _, total = units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    if total == 0:
        return
    b, kv = head // Hkv, head % Hkv
    q_head = kv * (queries // Q) + row // Q
    if SOME:
        q_head = tl.load(HEADS + q_head)
    at = Q_ + b * q_b + q_head * q_h + (row % Q) * q_s
    RANK: tl.constexpr = 2 * WIDE if BITS == 4 else WIDE
    project = PROJECTION + kv * D * RANK
    kept: tl.constexpr = Q_.dtype.element_ty
    column = tl.arange(0, PADDED)
    out = NUMBERS_ + (head * queries + row) * 4 * PADDED
    x = _project(at, project, 0, RANK, D, DEPTH, WIDE, PADDED, kept)
    if BITS == 16:
        tl.store(out + column, x)
    else:
        out = out.to(tl.pointer_type(tl.int32))
        most = tl.max(tl.abs(x), 0)
        if BITS == 4:
            z = _project(at, project, WIDE, RANK, D, DEPTH, WIDE, PADDED, kept)
            most = tl.maximum(most, tl.max(tl.abs(z), 0))
        step = tl.where(most == 0, 1.0, most) / MOST_Q
        x = (x / step + ROUND - ROUND).to(tl.int32)
        if FOUR:
            _store_bytes(out, x, PADDED)
        else:
            tl.store(out + column, x)
        if BITS == 4:
            z = (z / step + ROUND - ROUND).to(tl.int32)
            if FOUR:
                _store_bytes(out + 2 * PADDED, z, PADDED)
                step /= 16
            else:
                tl.store(out + PADDED + column, z)
        times *= step
    tl.store(TIMES + head * queries + row, times)


@triton.jit(do_not_specialize="Hkv Q queries U below refresh".split())
def _score(
    NUMBERS_, TIMES, LABEL, STEP, SCORES, TOTALS, LENGTH, MADE,
    label_b: tl.int64, label_h: tl.int64, step_b: tl.int64, step_h: tl.int64,
    Hkv, Q, queries, U, below: tl.int64, refresh,
    WIDE: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr, REGISTERS: tl.constexpr, PACK: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, FOUR: tl.constexpr,
    TILE: tl.constexpr, UNIT: tl.constexpr, SOME: tl.constexpr, KEEPS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length, total = units_of(LENGTH, MADE, head, Hkv, U, below, refresh, UNIT, KEEPS)
    if tile * TILE >= total:
        return
    b, kv = head // Hkv, head % Hkv
    # A part of the tokens: a thread has several of a unit that lie side by side, since it reduces
    # them by itself, and single ones as they come.
    SIDE: tl.constexpr = 1 if UNIT == 1 else TOKENS // 128
    nth = tl.arange(0, TOKENS)
    token = tile * TILE * UNIT + nth % (TOKENS // SIDE) * SIDE + nth // (TOKENS // SIDE)
    end = tl.minimum(length, (tile + 1) * TILE * UNIT)
    labels, steps = LABEL + b * label_b + kv * label_h, STEP + b * step_b + kv * step_h
    if FOUR:
        labels = labels.to(tl.pointer_type(tl.int32))
    W: tl.constexpr = WIDE // 4 if FOUR else WIDE
    column = tl.arange(0, PADDED // 4 if FOUR else PADDED)
    labels += token.to(tl.int64)[:, None, None] * W + column[None, None, :]
    steps += token
    inside = (token < end)[:, None, None] & (column < W)[None, None, :]
    label = tl.load(labels, mask=inside, other=0)
    step = tl.load(steps, mask=token < end, other=0.0)

    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    alive = row < queries
    times = tl.load(TIMES + head * queries + row, mask=alive, other=0.0)
    numbers = NUMBERS_ + (head * queries + row)[None, :, None] * 4 * PADDED + column[None, None, :]
    if BITS < 16:
        numbers = numbers.to(tl.pointer_type(tl.int32))
    asked = alive[None, :, None] & (column < W)[None, None, :]
    x = tl.load(numbers, mask=asked, other=0)
    if FOUR:
        x_low = tl.load(numbers + PADDED, mask=asked, other=0)
    if BITS == 4:
        z = tl.load(numbers + (2 if FOUR else 1) * PADDED, mask=asked, other=0)
        if FOUR:
            z_low = tl.load(numbers + 3 * PADDED, mask=asked, other=0)

    EACH: tl.constexpr = TOKENS // UNIT  # units of a part
    SLOTS: tl.constexpr = TOKENS // 4 if UNIT == 1 else EACH
    out = (head * queries + row) * tl.num_programs(0) + tile
    unit = tl.arange(0, EACH)
    top = tl.full([SLOTS, ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([SLOTS, ROWS], tl.float32)
    for part in range(tl.cdiv(end - tile * TILE * UNIT, TOKENS)):
        real, now, by = token < end, label, step
        token += TOKENS
        labels += TOKENS * W
        steps += TOKENS
        inside = (token < end)[:, None, None] & (column < W)[None, None, :]
        label = tl.load(labels, mask=inside, other=0)
        step = tl.load(steps, mask=token < end, other=0.0)
        if BITS == 16:
            s = now.to(tl.float32) * x
        elif FOUR:
            now += tl.zeros([TOKENS, ROWS, PADDED // 4], tl.int32)
            none = tl.zeros([TOKENS, ROWS, PADDED // 4], tl.int32)
            if BITS == 4:  # numbers times 16: in the high halves of bytes
                low, high = (now << 4) & NIBBLES, now & NIBBLES
                given = [low, x + none, x_low + none, high, z + none, z_low + none]
            else:
                given = [now, x + none, x_low + none]
            s = tl.inline_asm_elementwise(ASM, REGISTERS, given, tl.int32, True, PACK)
        else:
            now = now.to(tl.int32)
            s = (now << 28 >> 28) * x + (now >> 4) * z if BITS == 4 else now * x
        s = tl.sum(s, 2)
        if BITS < 16:
            s = s.to(tl.float32) * by.to(tl.float32)[:, None]
        s += tl.where(real, 0.0, float("-inf"))[:, None]
        if UNIT > 1:
            s = tl.max(tl.reshape(s, [SIDE, TOKENS // SIDE, ROWS]), 0)
            s = tl.max(tl.reshape(s, [EACH, UNIT // SIDE, ROWS]), 1)
        s *= times[None, :]
        place = SCORES + out[None, :] * TILE + (part * EACH + unit)[:, None]
        tl.store(place, s, mask=alive[None, :])
        s = tl.reshape(s, [EACH // SLOTS, SLOTS, ROWS])
        new = tl.maximum(top, tl.max(s, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[None, :, :]), 0)
        top = new
    new = tl.max(top, 0)
    base = tl.where(new == float("-inf"), 0.0, new)
    mass = tl.sum(mass * tl.exp2(top - base[None, :]), 0)
    tl.store(TOTALS + out, base + tl.log2(mass), mask=alive)


@triton.jit
def _rounded(x, step, END: tl.constexpr):
    """x [PADDED] in whole steps, halves to even, between -END and END."""
    x = tl.div_rn(x, tl.full(x.shape, step, tl.float32))
    return tl.minimum(tl.maximum(x + ROUND - ROUND, -1.0 * END), 1.0 * END).to(tl.int32)


@triton.jit(do_not_specialize="H Q room".split())
def _follow(
    K, PROJECTION, LABEL, STEP, HEADS, QUERY_POS, KEPT,
    k_b: tl.int64, k_h: tl.int64, k_s, label_b: tl.int64, label_h: tl.int64,
    step_b: tl.int64, step_h: tl.int64, H, Q, room,
    D: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, PADDED: tl.constexpr,
    BITS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    position = tl.load(QUERY_POS + b * Q + tl.program_id(1))
    if (position < 0) | (position >= room):
        return
    at = K + b * k_b + tl.load(HEADS + h) * k_h + tl.program_id(1) * k_s
    RANK: tl.constexpr = 2 * WIDE if BITS == 4 else WIDE
    project = PROJECTION + h * D * RANK
    kept: tl.constexpr = KEPT.dtype.element_ty
    x = _project(at, project, 0, RANK, D, DEPTH, WIDE, PADDED, kept)
    column = tl.arange(0, PADDED)
    place = LABEL + b * label_b + h * label_h + position * WIDE + column
    if BITS == 16:
        tl.store(place, x.to(tl.float16), mask=column < WIDE)
    else:
        END: tl.constexpr = (1 << (BITS - 1)) - 1
        most = tl.max(tl.abs(x), 0)
        if BITS == 4:
            z = _project(at, project, WIDE, RANK, D, DEPTH, WIDE, PADDED, kept)
            most = tl.maximum(most, tl.max(tl.abs(z), 0))
        step = tl.div_rn(most, tl.full([], END, tl.float32))
        step = tl.minimum(tl.maximum(step, LEAST), MOST).to(tl.float16)
        label = _rounded(x, step.to(tl.float32), END)
        if BITS == 4:
            label = (_rounded(z, step.to(tl.float32), END) << 4) | (label & 15)
        tl.store(place, label.to(tl.int8), mask=column < WIDE)
        tl.store(STEP + b * step_b + h * step_h + position, step)
