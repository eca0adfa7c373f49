"""A few new tokens over one store of a layer's cache: keys in fewer bits, or in host memory.

Reference: `reference.decode`, as `per_store.by_store` runs it. As `triton.decode`, which serves all
stores of a layer at once, a program reads a share of a head's pages, and shares are merged.

Bound by memory (of an H200's 4.8 TB/s, 3.2 were measured in 4 bits and 3.8 in 8, at 131,072
tokens), so that a packed number may cost few instructions: whole pages are not unpacked. Codes are
read two bytes at a time and become the last bits of float16 numbers, two of them at once.
A page's keys are low + code * step by channel, and so `q . key` is `(q * step) . code + q . low`: a
page's queries are scaled, and its codes multiplied as they are. Steps of values, which go by token,
are worked into the weights of these. Both are rounded to float16, relative to the largest step of
the page's keys, or of all values so far; what that takes from a sum of codes is given back for
their middle, which is most of it. Values are summed up about that middle: tensor cores cut sums
off, and long ones of large numbers drift. Units that are parts of pages come from many pages, and
are unpacked.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.decode import merge_shares, splits_of
from hfsparse.kernels.triton.limits import (
    DTYPES,
    LOG2E,
    NEVER,
    WIDEST_STORED,
    await_previous,
    chained,
    is_nvidia,
    shared_memory,
    units_of_logits,
)
from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.packed import NEWEST, steps, width_of
from hfsparse.lists.places import Place

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

SPLITS = 512  # at most so many shares of a head's pages
FEW = tl.constexpr(16)  # of the newest tokens, which lie as they came, at once
LARGE, TINY = tl.constexpr(32768.0), tl.constexpr(1e-30)  # what float16 has room for; no step
# Of two words of 16 bits in a register, one number of both: the lower or the upper of two bytes or
# fp8 numbers, or the half bytes in order; of keys in 4 bits those bits of a byte that a mask says.
BYTE_0 = tl.constexpr("and.b32 $0, $1, 0x00ff00ff;")
BYTE_1 = tl.constexpr("prmt.b32 $0, $1, 0, 0x4341;")
MASK_0 = tl.constexpr("and.b32 $0, $1, $2;")
MASK_1 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, $2; }")
HALF_0 = tl.constexpr("and.b32 $0, $1, 0x000f000f;")
HALF_1 = tl.constexpr("and.b32 $0, $1, 0x00f000f0;")
HALF_2 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x000f000f; }")
HALF_3 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x00f000f0; }")
_FLOAT = """{
.reg .b32 sign, rest;
%s
and.b32 rest, rest, 0x3f803f80;
lop3.b32 $0, sign, 0x80008000, rest, 0xea;
}"""
FLOAT_0 = tl.constexpr(_FLOAT % "shl.b32 sign, $1, 8; shl.b32 rest, $1, 7;")
FLOAT_1 = tl.constexpr(_FLOAT % "mov.b32 sign, $1; shr.b32 rest, $1, 1;")


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.latents:
        return "no latents"
    if need.pooled:
        return "no pages of a pool"
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    dims = f"head dim {need.head_dim}, value dim {need.value_dim}"
    if max(need.head_dim, need.value_dim) > WIDEST_STORED:
        return f"{dims}: at most {WIDEST_STORED} is supported"
    if need.packed and (need.head_dim % 4 or need.value_dim % 4):
        return f"{dims}: in fewer bits multiples of 4 are supported"
    width = max(need.head_dim, need.value_dim)
    if tile_of(16, width, need.dtype.itemsize, str(need.device), 16, False) is None:
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
    lse: Tensor | None = None,
) -> Tensor:
    """Attention `[B, H * ratio, Q, Dv]` of q `[B, H * ratio, Q, D]` over the H heads of a store.

    query_pos [B, Q]: positions in the row, -1 where a row has no query. length [B]: tokens in each
    row, the new ones included. pages: those that the store's heads read; None: every one. Of keys
    in host memory it reads the hot set, where `pages.lies` says. lse `[B, H * ratio, Q]` float32:
    as `reference.decode`.
    """
    (B, Hq, Q, D), H, Dv = q.shape, len(part.heads), part.v.shape[3]
    out = q.new_empty(B, Hq, Q, Dv, dtype=part.v.dtype)
    if out.numel() == 0:
        return out
    if part.dropped is not None:  # it reads as a row that is so much shorter
        length = length - part.dropped
        query_pos = torch.where(query_pos < 0, -1, query_pos - part.dropped[:, None])
    q = q if q.stride(-1) == 1 else q.contiguous()
    group, packed, band, device = Hq // H, part.packed, part.band, str(q.device)
    together = PAGE if pages is None else pages.unit
    slots, bits = part.k.shape[2], 16
    if packed is not None:
        slots, bits = packed.slots, packed.bits
    parts, whole = 16 // width_of(bits), packed is not None and together == PAGE
    given = group * Q, max(D, Dv), q.element_size(), device, width_of(bits), whole
    rows, stages, warps, fill = tile_of(*given)
    tiles = triton.cdiv(group * Q, rows)
    splits = splits_of(B * H * tiles, device, SPLITS, fill)
    listed, count, width = length, length, (0, 0, 0, 0)  # stand-ins that are not read
    moved = pages is not None and pages.lies is not None
    if pages is not None:
        plain = pages.pages.stride(-1) == 1 and not moved  # where units lie has the same strides
        listed = pages.pages if plain else pages.pages.contiguous()
        count, width = pages.count, (*listed.stride()[:2], *pages.count.stride())
    unit, inner = units_of_logits(scale, softcap)
    shared = out
    if splits > 1:
        shared = q.new_empty(B * H, splits, group * Q, Dv, dtype=torch.float32)
    weight = q.new_empty(B * H, splits, group * Q, dtype=torch.float32)
    _decode_store[(B * H, splits, tiles)](
        *(q, *_held(part), shared, weight),
        *(query_pos.contiguous(), length.contiguous(), listed, count),
        pages.lies.contiguous() if moved else listed,
        weight if s_aux is None else s_aux.float().to(q.device).contiguous(),
        *q.stride()[:3],
        *(*width, H, Q, group * Q, slots, part.below, slots - part.size, part.size),
        *(band.sink, band.recent, band.rate, unit, inner),
        D=D,
        DV=Dv,
        WIDE=max(16, triton.next_power_of_2(D // parts)),
        WIDE_V=max(16, triton.next_power_of_2(Dv // parts)),
        PARTS=parts,
        FLOAT=bits == "fp8",
        STEPS=steps(bits) if packed is not None else 0.0,
        TWO=is_nvidia(device),
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
        merge_shares(shared, weight, out, lse)
    elif lse is not None:
        torch.div(weight.view(B, Hq, Q), LOG2E.value, out=lse)
    return out


def _held(part: Place) -> tuple[Any, ...]:
    """Keys and values as they lie, what tells packed ones, and the newest as they came."""
    if part.packed is None:
        return part.k, part.v, *(part.k,) * 6  # stand-ins that are not read
    return part.packed[1:]


@lru_cache
def tile_of(
    queries: int, width: int, itemsize: int, device: str, bits: int, whole: bool
) -> tuple[int, int, int, int] | None:
    """Rows of a tile, stages, warps, and programs of a processor, for heads `width` wide: the first
    that fits, if any. whole: tiles are packed pages, as few warps work on one as have registers for
    it, and many programs are better than many stages."""
    room, width = shared_memory(device), max(16, triton.next_power_of_2(width))
    rows, packed, fits = min(16, triton.next_power_of_2(queries)), whole and itemsize == 2, []
    warps = max(1, width // 128, rows * width // 1024) if packed else 2 * itemsize
    for stages in (3, 2, 1) if itemsize == 2 else (1,):
        if packed:
            page = PAGE * (width * bits // 4 + 16)  # of keys and values, and ends
            shared = max(1, stages - 1) * page + 4 * rows * width
        else:
            shared = width * itemsize * ((stages + 1) * PAGE + 2 * rows)
        if shared <= room:
            fits.append((min(8 // warps, room // shared), stages))
    if not fits:
        return None
    programs, stages = max(fits) if packed else fits[0]
    return rows, stages, warps, programs


@triton.jit
def _channels(W: tl.constexpr, WIDE: tl.constexpr, part: tl.constexpr, PARTS: tl.constexpr):
    """The channels that numbers `part` of WIDE words have; of 4 bits as `packed.of_bytes`."""
    channel = tl.arange(0, WIDE)
    if PARTS > 1:
        channel = 2 * channel + part // (PARTS // 2)
    if PARTS == 4 and part % 2 == 1:
        channel = 2 * W + (channel + W // 2 * 2) % (2 * W)
    return channel


@triton.jit
def _load(at, alive, W: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):
    """Rows that lie `at`, in the parts that words have: each `[rows, WIDE]`, zeros in dead rows."""
    inside = alive[:, None] & (tl.arange(0, WIDE) < W)[None, :]
    made = ()
    for part in tl.static_range(PARTS):
        channel = _channels(W, WIDE, part, PARTS)[None, :]
        made += (tl.load(at[:, None] + channel, mask=inside, other=0.0),)
    return made


@triton.jit
def _up(part: tl.constexpr, PARTS: tl.constexpr):
    """How many times as large a part's numbers are: upper halves of bytes stay where they lie."""
    return 16.0 if PARTS == 4 and part % 2 == 1 else 1.0


@triton.jit
def _number(word, part: tl.constexpr, PARTS: tl.constexpr, FLOAT: tl.constexpr, TWO: tl.constexpr):
    """One part of words as float16: codes times `_up` times 2^-24, of fp8 numbers times 2^-8.

    TWO: at once, which only a GPU does.
    """
    if TWO:
        if FLOAT:
            asm: tl.constexpr = FLOAT_0 if part == 0 else FLOAT_1
        elif PARTS == 2:
            asm: tl.constexpr = BYTE_0 if part == 0 else BYTE_1
        elif part < 2:
            asm: tl.constexpr = HALF_0 if part == 0 else HALF_1
        else:
            asm: tl.constexpr = HALF_2 if part == 2 else HALF_3
        number = tl.inline_asm_elementwise(asm, "=r,r", [word], tl.float16, True, 2)
    else:
        mask: tl.constexpr = 15 << (part % 2 * 4) if PARTS == 4 else 255
        bits = (word >> (part // (PARTS // 2) * 8)) & mask
        if FLOAT:
            bits = ((bits & 127) << 7) | ((bits & 128) << 8)
        number = bits.to(tl.float16, bitcast=True)
    return number


@triton.jit
def _numbers(word, PARTS: tl.constexpr, FLOAT: tl.constexpr, TWO: tl.constexpr):
    """All parts of words."""
    made = ()
    for part in tl.static_range(PARTS):
        made += (_number(word, part, PARTS, FLOAT, TWO),)
    return made


@triton.jit
def _first_is_wide(low, high, PARTS: tl.constexpr):
    """Of both bytes of a word of keys, whether the lower channel has 5 bits; nothing of 8 bits."""
    made = ()
    for byte in tl.static_range(PARTS // 4 * 2):
        first = high[2 * byte] - low[2 * byte]
        made += (first > high[2 * byte + 1] - low[2 * byte + 1],)
    return made


@triton.jit
def _masked(word, mask, part: tl.constexpr, TWO: tl.constexpr):
    """Those bits of a byte of words, as float16: as `_number`."""
    if TWO:
        asm: tl.constexpr = MASK_0 if part < 2 else MASK_1
        number = tl.inline_asm_elementwise(asm, "=r,r,r", [word, mask], tl.float16, True, 2)
    else:
        number = ((word >> (part // 2 * 8)) & mask).to(tl.float16, bitcast=True)
    return number


@triton.jit
def _key_numbers(word, wide, PARTS: tl.constexpr, FLOAT: tl.constexpr, TWO: tl.constexpr):
    """As `_numbers`, of keys: those of 4 bits have 5 or 3, as wide `[.., WIDE]` says."""
    made = ()
    for part in tl.static_range(PARTS):
        if PARTS == 4:
            mask = tl.where(wide[part // 2], 31, 7)
            if part % 2 == 1:
                mask = 255 - mask
            mask = tl.broadcast_to(mask.to(tl.uint16), word.shape)
            made += (_masked(word, mask, part, TWO),)
        else:
            made += (_number(word, part, PARTS, FLOAT, TWO),)
    return made


@triton.jit
def _key_share(wide, part: tl.constexpr, PARTS: tl.constexpr):
    """What a step is of its ends' distance, by steps of 3 bits, once numbers are `_up` as they are:
    an upper number of 5 bits is 8 times as large, one of 3 bits 32 times."""
    if PARTS == 2:
        share = 1.0
    elif part % 2 == 0:
        share = tl.where(wide[part // 2], 7 / 31, 1.0)
    else:
        share = tl.where(wide[part // 2], 1 / 32, 7 / 248)
    return share


@triton.jit
def _span(low, high, FLOAT: tl.constexpr):
    """What all steps between two ends come to; of fp8 the end that is farther from zero."""
    return tl.maximum(-low, high) if FLOAT else high - low


@triton.jit
def _ends(at, W: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):
    """The ends of a page's channels, part by part, float32 `[WIDE]`; of 16 bits two at a time."""
    kind: tl.constexpr = at.dtype.element_ty
    word = tl.arange(0, WIDE)
    made = ()
    if kind == tl.float32:
        for part in tl.static_range(PARTS):
            channel = _channels(W, WIDE, part, PARTS)
            made += (tl.load(at + channel, mask=word < W, other=0.0),)
    else:
        at = at.to(tl.pointer_type(tl.uint32))
        for odd in tl.static_range(2):
            for half in tl.static_range(PARTS // 2):
                two = tl.load(at + half * W + (word + half * (W // 2)) % W, mask=word < W, other=0)
                one = (two >> (16 * odd)).to(tl.uint16).to(kind, bitcast=True)
                made += (one.to(tl.float32),)
    return made


@triton.jit
def _words(at, W: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr):
    """A page's codes `[PAGE, WIDE]`."""
    word = tl.arange(0, WIDE)[None, :]
    at = at + tl.arange(0, PAGE)[:, None] * W + word
    return tl.load(at) if W == WIDE else tl.load(at, mask=word < W, other=0)


@triton.jit
def _scaled(q, low, high, FLOAT: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr):
    """Parts of queries `[WIDE, ROWS]`, at most 1, as codes of a page's keys meet them.

    Also which channels have more bits, how large the page's widest is, and what `[ROWS]` products
    of codes lack.
    """
    wide = _first_is_wide(low, high, PARTS)
    widest = _span(low[0], high[0], FLOAT)
    for part in tl.static_range(1, PARTS):
        widest = tl.maximum(widest, _span(low[part], high[part], FLOAT))
    widest = tl.maximum(tl.max(widest, 0), TINY)
    fit, made = LARGE / widest, ()
    lack, off = tl.zeros_like(q[0]), tl.zeros_like(q[0])
    for part in tl.static_range(PARTS):
        share, span = _key_share(wide, part, PARTS), _span(low[part], high[part], FLOAT)
        y = (q[part] * (span * (fit * share))[:, None]).to(KIND)
        made += (y,)
        if not FLOAT:
            lack += q[part] * (low[part] + 0.5 * span)[:, None]
            back = y.to(tl.float32)
            off += back / share[:, None] if PARTS == 4 else back
    lack -= off * (widest * (0.5 / LARGE))
    return made, wide, widest, tl.sum(lack, 0)


@triton.jit
def _unpack(
    PACKED, LOW, HIGH, slot, held, KIND: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr, FLOAT: tl.constexpr, UNIT: tl.constexpr, BY_TOKEN: tl.constexpr,
    PAGE: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Keys or values at slots, part by part `[PAGE, WIDE]`."""
    word = tl.arange(0, WIDE)[None, :]
    inside = held[:, None] & (word < W)
    numbers = tl.load(PACKED + slot[:, None] * W + word, mask=inside, other=0)
    lows, highs = (), ()
    for part in tl.static_range(PARTS):
        at = slot[:, None]
        if not BY_TOKEN:
            at = at // PAGE * (W * PARTS) + _channels(W, WIDE, part, PARTS)[None, :]
        lows += (tl.load(LOW + at, mask=inside, other=0.0).to(tl.float32),)
        highs += (tl.load(HIGH + at, mask=inside, other=0.0).to(tl.float32),)
    wide = _first_is_wide(lows, highs, PARTS)
    if BY_TOKEN:
        numbers = _numbers(numbers, PARTS, FLOAT, TWO)
    else:
        numbers = _key_numbers(numbers, wide, PARTS, FLOAT, TWO)
    made = ()
    for part in tl.static_range(PARTS):
        share = 1 / _up(part, PARTS) if BY_TOKEN else _key_share(wide, part, PARTS)
        x = numbers[part].to(tl.float32) * (_span(lows[part], highs[part], FLOAT) * (UNIT * share))
        made += ((x if FLOAT else lows[part] + x).to(KIND),)
    return made


@triton.jit
def _either(first, a, b, PARTS: tl.constexpr):
    """Of parts a in those rows that are told, of parts b in others."""
    made = ()
    for part in tl.static_range(PARTS):
        made += (tl.where(first[:, None], a[part], b[part]),)
    return made


@triton.jit
def _products(k, q, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Of keys `[PAGE, WIDE]` and queries `[WIDE, ROWS]`, over all parts."""
    s = tl.dot(k[0].to(q[0].dtype), q[0], input_precision=PRECISION)
    for part in tl.static_range(1, PARTS):
        s = tl.dot(k[part].to(q[part].dtype), q[part], s, input_precision=PRECISION)
    return s


@triton.jit
def _capped(s, unit, inner):
    """Products as logits in base 2, under a softcap."""
    return (2 * tl.sigmoid(2 * inner * s) - 1) * unit  # tanh


@triton.jit
def _weigh(total, top, s, kept):
    """One step of the online softmax, in base 2: weights of logits s `[keys, ROWS]`, what those
    before lose, and the new totals and maxima `[ROWS]`."""
    s = tl.where(kept, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 0))
    base = tl.where(new == float("-inf"), 0.0, new)  # queries that have seen nothing yet
    p, fade = tl.exp2(s - base[None, :]), tl.exp2(top - base)
    return p, fade, total * fade + tl.sum(p, 0), new


@triton.jit
def _attend(
    acc, lows, total, top, q, k, v, kept, unit, inner,
    PARTS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to keys and values as they are."""
    s = _products(k, q, PARTS, PRECISION)
    s = _capped(s, unit, inner) if SOFTCAP else s * unit
    p, fade, total, top = _weigh(total, top, s, kept)
    p = tl.trans(p.to(v[0].dtype))
    made = ()
    for part in tl.static_range(PARTS):
        faded = acc[part] * fade[:, None]
        made += (tl.dot(p, v[part], faded, input_precision=PRECISION),)
    return made, lows * fade, total, top


@triton.jit
def _queries(at, alive, W: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):
    """Queries `[WIDE, ROWS]`, part by part."""
    made = ()
    for part in tl.static_range(PARTS):
        channel = _channels(W, WIDE, part, PARTS)[:, None]
        inside = (tl.arange(0, WIDE) < W)[:, None] & alive[None, :]
        made += (tl.load(at[None, :] + channel, mask=inside, other=0.0),)
    return made


@triton.jit
def _at_most_one(q, PARTS: tl.constexpr):
    """Parts of queries in float32, divided by the largest of each query `[ROWS]`, and that."""
    most = tl.max(tl.abs(q[0].to(tl.float32)), 0)
    for part in tl.static_range(1, PARTS):
        most = tl.maximum(most, tl.max(tl.abs(q[part].to(tl.float32)), 0))
    most = tl.where(most == 0, 1.0, most)
    made = ()
    for part in tl.static_range(PARTS):
        made += (q[part].to(tl.float32) / most[None, :],)
    return made, most


@triton.jit(do_not_specialize="list_b list_h count_b count_h H Q rows slots below".split())
def _decode_store(
    Q_, K, V, LOW, HIGH, LEAST, MOST, NEW_K, NEW_V, PART, WEIGHT,
    QUERY_POS, LENGTH, PAGES, COUNT, LIES, SINKS,
    q_b: tl.int64, q_h: tl.int64, q_s,
    list_b: tl.int64, list_h: tl.int64, count_b: tl.int64, count_h: tl.int64,
    H, Q, rows, slots, below, keeps, size, sink, recent: tl.int64, rate: tl.int64, unit, inner,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    PARTS: tl.constexpr, FLOAT: tl.constexpr, STEPS: tl.constexpr, TWO: tl.constexpr,
    ROWS: tl.constexpr, PAGE: tl.constexpr, NEWEST: tl.constexpr, TOGETHER: tl.constexpr,
    MOVED: tl.constexpr, LISTED: tl.constexpr, RING: tl.constexpr, CHUNKS: tl.constexpr,
    HAS_SINKS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    # Rows: q head of the group * Q + new token. Tiles: as of `_decode`. A ring's first `keeps`
    # slots hold the positions of the same number.
    W: tl.constexpr = D // PARTS  # words of a key
    WV: tl.constexpr = DV // PARTS
    # What undoes `_numbers`, in steps; what products are of.
    UNIT: tl.constexpr = STEPS * (256.0 if FLOAT else 16777216.0)
    KEY_UNIT: tl.constexpr = 16777216.0 / 7 if PARTS == 4 else UNIT  # of keys of 3 bits
    dtype: tl.constexpr = Q_.dtype.element_ty
    kind: tl.constexpr = dtype if dtype == tl.float32 else tl.float16
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
    q = _queries(queries, alive, W, WIDE, PARTS)
    if RING:
        turn, newest = (length - 1 - keeps) // size * size, keeps + (length - 1 - keeps) % size
        span = recent + (at * rate >> 16)  # as Band.span
        if CHUNKS:
            span = at % recent + 1
        start = tl.where(whole, 0, tl.maximum(at - span + 1, 0)).to(tl.int32)
    at = at.to(tl.int32)
    acc = ()
    for _ in tl.static_range(PARTS):
        acc += (tl.zeros([ROWS, WIDE_V], tl.float32),)
    lows = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if HAS_SINKS:  # one more logit, of a key without a value: the first share has it
        bare = tl.load(SINKS + kv * group + row // Q, mask=alive, other=0.0) * LOG2E
        top = tl.where(tl.program_id(1) == 0, bare, top)
        total = tl.where(tl.program_id(1) == 0, 1.0, total)

    lane, end = tl.arange(0, PAGE), tl.minimum(first + each, count)
    page = length // PAGE  # the newest, which lies as it came
    if PARTS > 1:
        keys, values = K.to(tl.pointer_type(tl.uint16)), V.to(tl.pointer_type(tl.uint16))
        new_k, new_v = NEW_K + head * NEWEST * D, NEW_V + head * NEWEST * DV
    if (PARTS > 1) & (TOGETHER == PAGE):
        # Tiles of one page. Where the newest is to lie once it is full, an older one may lie.
        q, most = _at_most_one(q, PARTS)
        if not SOFTCAP:
            most *= unit
        begun, seat = page * PAGE, page
        older = begun < 0
        if RING:
            ahead = begun - keeps
            seat = tl.where(ahead < 0, page, (keeps + ahead % size) // PAGE)
            older = ahead >= size
        limit, fresh, largest = tl.minimum(at + 1, begun), begun < 0, TINY + 0.0
        for j in range(first, end):
            named = j
            if LISTED:
                named = tl.load(lists + j, mask=chosen, other=named).to(tl.int32)
            sound = (named != seat) | older
            fresh |= named == seat
            stored = named.to(tl.int64)
            if MOVED:  # of the newest it names any slot, which is not weighed
                stored = tl.load(LIES + b * list_b + kv * list_h + j)
            stored += head * (slots // PAGE)
            low = _ends(LOW + stored * D, W, WIDE, PARTS)
            high = _ends(HIGH + stored * D, W, WIDE, PARTS)
            ends = stored * PAGE + lane
            least = tl.load(LEAST + ends, mask=sound, other=0.0).to(tl.float32)
            width = _span(least, tl.load(MOST + ends, mask=sound, other=0.0).to(tl.float32), FLOAT)
            k = _words(keys + stored * (PAGE * W), W, WIDE, PAGE)

            scaled, wide, widest, lack = _scaled(q, low, high, FLOAT, kind, PARTS)
            across = ()
            for byte in tl.static_range(PARTS // 4 * 2):
                across += (wide[byte][None, :],)
            k = _key_numbers(k, across, PARTS, FLOAT, TWO)
            s = _products(k, scaled, PARTS, PRECISION)
            s *= (most * (widest * (KEY_UNIT / LARGE)))[None, :]
            if not FLOAT:
                s += (lack * most)[None, :]
            key = named * PAGE + lane
            if RING:
                key += tl.where(key < keeps, 0, tl.where(key > newest, turn - size, turn))
            kept = key[:, None] < limit[None, :]
            if RING:
                kept &= sound & (tl.where(key < sink, NEVER, key)[:, None] >= start[None, :])
            if SOFTCAP:
                s = _capped(s, unit, inner)
            p, fade, total, top = _weigh(total, top, s, kept)
            widest = tl.maximum(tl.max(width, 0), largest)
            y = (p * (width * (LARGE / widest))[:, None]).to(kind)
            if not FLOAT:
                lows = lows * fade + tl.sum(p * (least + 0.5 * width)[:, None], 0)
                middle = tl.sum(y.to(tl.float32), 0) * (0.5 / UNIT)
            fade *= largest / widest
            largest = widest
            v = _words(values + stored * (PAGE * WV), WV, WIDE_V, PAGE)
            v, y = _numbers(v, PARTS, FLOAT, TWO), tl.trans(y)
            made = ()
            for part in tl.static_range(PARTS):
                o = acc[part] * fade[:, None]
                if not FLOAT:
                    o -= (middle * _up(part, PARTS))[:, None]
                made += (tl.dot(y, v[part].to(kind), o, input_precision=PRECISION),)
            acc = made
        made = ()
        for part in tl.static_range(PARTS):
            made += (acc[part] * (largest * (UNIT / LARGE / _up(part, PARTS))),)
        acc = made
        own = _queries(queries, alive, W, WIDE, PARTS)
        for begin in range(begun, tl.where(fresh, length, begun), FEW):
            key = begin + tl.arange(0, FEW)
            new, lies = key < length, (key % NEWEST).to(tl.int64)
            k = _load(new_k + lies * D, new, W, WIDE, PARTS)
            v = _load(new_v + lies * DV, new, WV, WIDE_V, PARTS)
            kept = new[:, None] & (key[:, None] <= at[None, :])
            if RING:
                kept &= tl.where(key < sink, NEVER, key)[:, None] >= start[None, :]
            acc, lows, total, top = _attend(
                *(acc, lows, total, top, own, k, v, kept, unit, inner),
                *(PARTS, SOFTCAP, PRECISION),
            )
    else:
        for j in range(first, end):
            seat = j * EACH + lane // TOGETHER
            named = seat
            if LISTED:
                given = tl.load(lists + seat, mask=chosen & (seat < units), other=0)
                named = tl.where(chosen, given.to(tl.int32), named)
            slot = named * TOGETHER + lane % TOGETHER
            held = (seat < units) & (slot < live)
            key = slot
            if RING:
                key += tl.where(slot < keeps, 0, tl.where(slot > newest, turn - size, turn))
            kept = held[:, None] & (key[:, None] <= at[None, :])
            if RING:
                kept &= tl.where(key < sink, NEVER, key)[:, None] >= start[None, :]
            lies = slot.to(tl.int64)
            if MOVED:
                lies = tl.load(LIES + b * list_b + kv * list_h + seat, mask=seat < units, other=0)
                lies = lies * TOGETHER + lane % TOGETHER
            lies += head * slots
            if PARTS == 1:
                k = _load(K + lies * D, held, W, WIDE, PARTS)
                v = _load(V + lies * DV, held, WV, WIDE_V, PARTS)
            else:
                new = held & (key // PAGE == page)
                old, at_new = held & (new == 0), (key % NEWEST).to(tl.int64)
                k = _unpack(
                    *(keys, LOW, HIGH, lies, old, dtype),
                    *(W, WIDE, PARTS, FLOAT, KEY_UNIT, False, PAGE, TWO),
                )
                v = _unpack(
                    *(values, LEAST, MOST, lies, old, dtype),
                    *(WV, WIDE_V, PARTS, FLOAT, UNIT, True, PAGE, TWO),
                )
                k = _either(new, _load(new_k + at_new * D, new, W, WIDE, PARTS), k, PARTS)
                v = _either(new, _load(new_v + at_new * DV, new, WV, WIDE_V, PARTS), v, PARTS)
            acc, lows, total, top = _attend(
                *(acc, lows, total, top, q, k, v, kept, unit, inner),
                *(PARTS, SOFTCAP, PRECISION),
            )

    some = tl.where(total == 0, 1.0, total)
    inside = alive[:, None] & (tl.arange(0, WIDE_V) < WV)[None, :]
    for part in tl.static_range(PARTS):
        made = ((acc[part] + lows[:, None]) / some[:, None]).to(PART.dtype.element_ty)
        channel = _channels(WV, WIDE_V, part, PARTS)[None, :]
        tl.store(PART + place[:, None] * DV + channel, made, mask=inside)
    tl.store(WEIGHT + place, top + tl.log2(some), mask=alive)
