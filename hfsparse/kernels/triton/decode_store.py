"""A few new tokens over one store of a layer's cache: keys in fewer bits, or in host memory.

Reference: `reference.decode`, as `per_store.by_store` runs it. As `triton.decode`, which serves all
stores of a layer at once, a program reads a share of a head's pages, and shares are merged; packed
numbers are unpacked in registers, which is what takes its time (benchmarks/results/decode.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.decode import merge_shares, padded, splits_of, tile_of
from hfsparse.kernels.triton.limits import (
    DTYPES,
    LOG2E,
    NEVER,
    WIDEST_STORED,
    add_logits,
    await_previous,
    chained,
    load_rows,
)
from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.packed import NEWEST, steps, width_of
from hfsparse.lists.places import Place

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.latents:
        return "no latents"
    if need.lse:
        return "gives no LSE"
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    if max(need.head_dim, need.value_dim) > WIDEST_STORED:
        dims = f"head dim {need.head_dim}, value dim {need.value_dim}"
        return f"{dims}: at most {WIDEST_STORED} is supported"
    *_, width = padded(need.head_dim, need.value_dim, False)
    more = {"packed": True, "parts": True}
    if tile_of(1, width, need.dtype.itemsize, str(need.device), **more) is None:
        return f"{need.dtype} heads of {width}: too wide for this GPU's shared memory"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def decode(
    q: Tensor,
    part: Place,
    query_pos: Tensor,
    pages: PageLists | None = None,
    *,
    length: Tensor,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention `[B, H * ratio, Q, Dv]` of q `[B, H * ratio, Q, D]` over the H heads of a store.

    query_pos [B, Q]: positions in the row, -1 where a row has no query. length [B]: tokens in each
    row, the new ones included. pages: those that the store's heads read; None: every one. Of keys
    in host memory it reads the hot set, where `pages.lies` says.
    """
    (B, Hq, Q, D), H, Dv = q.shape, len(part.heads), part.v.shape[3]
    out = q.new_empty(B, Hq, Q, Dv, dtype=part.v.dtype)
    if out.numel() == 0:
        return out
    if part.dropped is not None:  # it reads as a row that is so much shorter
        length = length - part.dropped
        query_pos = torch.where(query_pos < 0, -1, query_pos - part.dropped[:, None])
    q = q if q.stride(-1) == 1 else q.contiguous()
    group, packed, band = Hq // H, part.packed, part.band
    DP, DVP, wide = padded(D, Dv, False)
    together = PAGE if pages is None else pages.unit
    device, more = str(q.device), {"packed": True, "parts": together < PAGE}
    rows, stages, warps = tile_of(group * Q, wide, q.element_size(), device, **more)
    tiles = triton.cdiv(group * Q, rows)
    splits = splits_of(B * H * tiles, device)
    listed, count, width = length, length, (0, 0, 0, 0)  # stand-ins that are not read
    moved = pages is not None and pages.lies is not None
    if pages is not None:
        plain = pages.pages.stride(-1) == 1 and not moved  # where units lie has the same strides
        listed = pages.pages if plain else pages.pages.contiguous()
        count, width = pages.count, (*listed.stride()[:2], *pages.count.stride())
    unit, inner = scale * LOG2E.value, 0.0
    if softcap:
        unit, inner = softcap * LOG2E.value, scale / softcap
    shared = out
    if splits > 1:
        shared = q.new_empty(B * H, splits, group * Q, Dv, dtype=torch.float32)
    weight = q.new_empty(B * H, splits, group * Q, dtype=torch.float32)
    slots, bits = part.k.shape[2], 16
    if packed is not None:
        slots, bits = packed.slots, packed.bits
    _decode_store[(B * H, splits, tiles)](
        *(q, *_held(part), shared, weight),
        *(query_pos.contiguous(), length.contiguous(), listed, count),
        pages.lies.contiguous() if moved else listed,
        weight if s_aux is None else s_aux.float().to(q.device).contiguous(),
        *q.stride()[:3],
        *(*width, H, Q, group * Q, slots, part.below),
        *(slots - part.size, part.size, band.sink, band.recent, band.rate, unit, inner),
        D=D,
        DV=Dv,
        DP=DP,
        DVP=DVP,
        BITS=width_of(bits),
        FLOAT=bits == "fp8",
        STEPS=steps(bits) if packed is not None else 0.0,
        ROWS=rows,
        PAGE=PAGE,
        NEWEST=NEWEST,
        TOGETHER=together,
        LISTED=pages is not None,
        MOVED=moved,
        RING=part.size > 0,
        CHUNKS=band.chunked,
        HAS_SINKS=s_aux is not None,
        SOFTCAP=bool(softcap),
        PRECISION="ieee",  # of float32 alone; memory is what bounds
        num_warps=warps,
        **chained(device),
        num_stages=stages,
    )
    if splits > 1:
        merge_shares(shared, weight, out)
    return out


def _held(part: Place) -> tuple[Any, ...]:
    """Keys and values as they lie, what tells packed ones, and the newest as they came."""
    if part.packed is None:
        return part.k, part.v, *(part.k,) * 6  # stand-ins that are not read
    return part.packed[1:]


@triton.jit
def _channels(W: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """The channel that each of DP columns of a tile has, and whether it has one: of 4 bits byte c
    has channel c, and in the tile's second half channel c + W / 2."""
    PARTS: tl.constexpr = 2 if BITS == 4 else 1
    d = tl.arange(0, DP)
    lane = d % (DP // PARTS)
    return d // (DP // PARTS) * (W // PARTS) + lane, lane < W // PARTS


@triton.jit
def _unpack(
    PACKED, LOW, HIGH, slot, held, W: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr,
    FLOAT: tl.constexpr, STEPS: tl.constexpr, BY_TOKEN: tl.constexpr, WHOLE: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Keys or values `[PAGE, DP]` of W dims at slots of a head, in float32; WHOLE: of one page."""
    BYTES: tl.constexpr = W * BITS // 8
    WIDE: tl.constexpr = DP * BITS // 8
    c = tl.arange(0, WIDE)
    inside = held[:, None] & (c < BYTES)[None, :]
    code = tl.load(PACKED + slot[:, None] * BYTES + c[None, :], mask=inside, other=0).to(tl.int32)
    if BITS == 4:
        code = tl.join(code & 15, code >> 4).permute(0, 2, 1).reshape(PAGE, DP)
    if BY_TOKEN:
        low = tl.load(LOW + slot, mask=held, other=0.0).to(tl.float32)[:, None]
        high = tl.load(HIGH + slot, mask=held, other=0.0).to(tl.float32)[:, None]
    elif WHOLE:
        channel, real = _channels(W, DP, BITS)
        at = tl.max(slot, 0) // PAGE * W + channel
        low = tl.load(LOW + at, mask=real, other=0.0).to(tl.float32)[None, :]
        high = tl.load(HIGH + at, mask=real, other=0.0).to(tl.float32)[None, :]
    else:
        channel, real = _channels(W, DP, BITS)
        at, real = (slot // PAGE * W)[:, None] + channel[None, :], held[:, None] & real[None, :]
        low = tl.load(LOW + at, mask=real, other=0.0).to(tl.float32)
        high = tl.load(HIGH + at, mask=real, other=0.0).to(tl.float32)
    if FLOAT:  # by its bits, as of a float32 whose exponents count from 120 less
        size = (((code & 127) << 20) | ((code & 128) << 24)).to(tl.float32, bitcast=True)
        return size * 1.329227995784916e36 * (tl.maximum(-low, high) * STEPS)
    return low + code.to(tl.float32) * ((high - low) * STEPS)


@triton.jit
def _newest(
    NEW, key, held, W: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, NEWEST: tl.constexpr,
):  # fmt: skip
    """Keys or values `[PAGE, DP]` that lie as they came, at positions of a head."""
    channel, real = _channels(W, DP, BITS)
    at = NEW + (key % NEWEST).to(tl.int64)[:, None] * W + channel[None, :]
    return tl.load(at, mask=held[:, None] & real[None, :], other=0.0)


@triton.jit(do_not_specialize="list_b list_h count_b count_h H Q rows slots below".split())
def _decode_store(
    Q_, K, V, LOW, HIGH, LEAST, MOST, NEW_K, NEW_V, PART, WEIGHT,
    QUERY_POS, LENGTH, PAGES, COUNT, LIES, SINKS,
    q_b: tl.int64, q_h: tl.int64, q_s,
    list_b: tl.int64, list_h: tl.int64, count_b: tl.int64, count_h: tl.int64,
    H, Q, rows, slots, below, keeps, size, sink, recent: tl.int64, rate: tl.int64, unit, inner,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BITS: tl.constexpr,
    FLOAT: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    NEWEST: tl.constexpr, TOGETHER: tl.constexpr, MOVED: tl.constexpr,
    LISTED: tl.constexpr, RING: tl.constexpr, CHUNKS: tl.constexpr, HAS_SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    # Rows: q head of the group * Q + new token. Tiles: as of `_decode`. A ring's first `keeps`
    # slots hold the positions of the same number.
    head = tl.program_id(0).to(tl.int64)
    b, kv = head // H, head % H
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    length = tl.load(LENGTH + b).to(tl.int32)
    live = length
    if MOVED == 0:
        live = tl.minimum(length, slots)  # slots that hold a key
    whole = length < below
    EACH: tl.constexpr = PAGE // TOGETHER  # units of a tile
    units = tl.cdiv(live, TOGETHER)
    chosen = whole == 0
    if LISTED:
        lists = PAGES + b * list_b + kv * list_h
        listed = tl.load(COUNT + b * count_b + kv * count_h).to(tl.int32)
        units = tl.where(chosen, listed, units)
    count = tl.cdiv(units, EACH)
    each = tl.cdiv(count, tl.num_programs(1))
    first = tl.program_id(1) * each
    place = (head * tl.num_programs(1) + tl.program_id(1)) * rows + row
    if (first >= count) & (tl.program_id(1) > 0):
        tl.store(WEIGHT + place, tl.full([ROWS], float("-inf"), tl.float32), mask=alive)
        return

    group = rows // Q
    at = tl.load(QUERY_POS + b * Q + row % Q, mask=alive, other=-1)
    queries = Q_ + b * q_b + (kv * group + row // Q) * q_h + (row % Q) * q_s
    channel, real = _channels(D, DP, BITS)
    inside = alive[:, None] & real[None, :]
    q = tl.load(queries[:, None] + channel[None, :], mask=inside, other=0.0)
    keys, values = K + head * slots * (D * BITS // 8), V + head * slots * (DV * BITS // 8)
    if BITS == 16:
        keys, values = K + head * slots * D, V + head * slots * DV
    pages = head * (slots // PAGE)
    if RING:
        turn, newest = (length - 1 - keeps) // size * size, keeps + (length - 1 - keeps) % size
        span = recent + (at * rate >> 16)  # as Band.span
        if CHUNKS:
            span = at % recent + 1
        start = tl.where(whole, 0, tl.maximum(at - span + 1, 0)).to(tl.int32)
    at = at.to(tl.int32)
    acc = tl.zeros([ROWS, DVP], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if HAS_SINKS:  # one more logit, of a key without a value: the first share has it
        bare = tl.load(SINKS + kv * group + row // Q, mask=alive, other=0.0) * LOG2E
        top = tl.where(tl.program_id(1) == 0, bare, top)
        total = tl.where(tl.program_id(1) == 0, 1.0, total)

    # A tile of one page is read packed, and behind all others what of it lies among the newest.
    WHOLE: tl.constexpr = (BITS < 16) & ((TOGETHER == PAGE) | (not LISTED))
    lane = tl.arange(0, PAGE)
    page = length // PAGE
    fresh = lane < 0
    for j in range(first, tl.minimum(first + each, count)):
        nth = j * EACH + lane // TOGETHER
        if LISTED:
            named = tl.load(lists + nth, mask=chosen & (nth < units), other=0).to(tl.int32)
            nth = tl.where(chosen, named, nth)
        slot = nth * TOGETHER + lane % TOGETHER
        held = (j * EACH + lane // TOGETHER < units) & (slot < live)
        key = slot
        if RING:
            key += tl.where(slot < keeps, 0, tl.where(slot > newest, turn - size, turn))
        lies = slot.to(tl.int64)
        if MOVED:
            seat = j * EACH + lane // TOGETHER
            lies = tl.load(LIES + b * list_b + kv * list_h + seat, mask=seat < units, other=0)
            lies = lies * TOGETHER + lane % TOGETHER
        if BITS == 16:
            k = load_rows(keys, D, lies, held, D, DP, True)
            v = load_rows(values, DV, lies, held, DV, DVP, True)
        else:
            new = held & (key // PAGE == page)
            old = held & (new == 0)
            k = _unpack(
                *(keys, LOW + pages * D, HIGH + pages * D, lies, old),
                *(D, DP, BITS, FLOAT, STEPS, False, WHOLE, PAGE),
            ).to(NEW_K.dtype.element_ty)
            v = _unpack(
                *(values, LEAST + head * slots, MOST + head * slots, lies, old),
                *(DV, DVP, BITS, FLOAT, STEPS, True, WHOLE, PAGE),
            ).to(NEW_V.dtype.element_ty)
            if WHOLE:
                held, fresh = old, fresh | new
            else:
                lies = _newest(NEW_K + head * NEWEST * D, key, new, D, DP, BITS, NEWEST)
                k = tl.where(new[:, None], lies, k)
                lies = _newest(NEW_V + head * NEWEST * DV, key, new, DV, DVP, BITS, NEWEST)
                v = tl.where(new[:, None], lies, v)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        kept = held[None, :] & (key[None, :] <= at[:, None])
        if RING:
            kept &= tl.where(key < sink, NEVER, key)[None, :] >= start[:, None]
        acc, total, top, _ = add_logits(
            *(acc, total, top, 0, s, v, kept, alive, unit, inner, 0.0),
            *(True, SOFTCAP, False, PRECISION),
        )

    if WHOLE:
        some = tl.max(fresh.to(tl.int32), 0)
        if some > 0:
            key = page * PAGE + lane
            k = _newest(NEW_K + head * NEWEST * D, key, fresh, D, DP, BITS, NEWEST)
            v = _newest(NEW_V + head * NEWEST * DV, key, fresh, DV, DVP, BITS, NEWEST)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            kept = fresh[None, :] & (key[None, :] <= at[:, None])
            if RING:
                kept &= tl.where(key < sink, NEVER, key)[None, :] >= start[:, None]
            acc, total, top, _ = add_logits(
                *(acc, total, top, 0, s, v, kept, alive, unit, inner, 0.0),
                *(True, SOFTCAP, False, PRECISION),
            )

    some = tl.where(total == 0, 1.0, total)
    channel, real = _channels(DV, DVP, BITS)
    inside = alive[:, None] & real[None, :]
    part = (acc / some[:, None]).to(PART.dtype.element_ty)
    tl.store(PART + place[:, None] * DV + channel[None, :], part, mask=inside)
    tl.store(WEIGHT + place, top + tl.log2(some), mask=alive)
