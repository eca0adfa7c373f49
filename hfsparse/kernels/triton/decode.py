"""A few new queries over a cache in Triton, on any CUDA GPU: the fast form of `reference.decode`.

One launch serves all heads of a layer, full ones with listed pages or without and rings of any
size: a table says where each has its keys (`places.py`). Latents (MLA), whose values are the first
dims of their keys, are read once for both. A program serves one kv head's queries, the q heads of
its group as rows of one tile, over a share of the pages that the head reads (split-KV, as in
Flash-Decoding); a second kernel merges the shares, if there are several. Bound by memory: each key
and value is read once where one tile holds the queries (not yet measured). How the pages are split
depends on the batch, the plan and the device, never on the cache's length or capacity, and lengths
are read on the device: a step of the same pages gives the same bits however much room the cache
has, a new length compiles nothing, and a CUDA graph of a step serves every later one that the cache
has room for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import (
    BELOW,
    CHUNKED,
    DTYPES,
    K_AT,
    LOG2E,
    NEVER,
    RATE,
    RECENT,
    ROW,
    SINK,
    SIZE,
    SLOTS,
    V_AT,
    WIDEST,
    add_logits,
    await_previous,
    chained,
    has_tensor_memory,
    load_rows,
    look_up,
    lost_by,
    shared_memory,
    units_of_logits,
)
from hfsparse.kernels.triton.limits import LISTED as LISTED_AT
from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.places import Places

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

ROWS = (16, 32, 64)  # queries of a tile: q heads of a group times new tokens
# Of latents rows, stages and warps, the best first: on sm_90 32 rows spill 44 bytes, others none.
# Of 64 rows, for wgmma, shared memory holds as many pages as there are stages, else one less.
LATENT_TILES = ((64, 2, 8), (32, 3, 8), (32, 2, 8), (16, 3, 4), (16, 2, 8))
SINGLE_TILE = (16, 1, 8)  # of float32, for tests: its products take all registers
WIDEST_LATENT = 1024  # of a key
SPLITS = 64  # at most so many shares of a head's pages
LATENT_SPLITS = 128  # of latents, which are one head
MERGED = 256, 128, 8192  # shares and dims that a program merges at once, and both together
UNITS = 8  # processors of a device that is no GPU (the interpreter)


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.packed:
        return "no keys in fewer bits"
    if need.hosted:
        return "no keys in host memory"
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    most = WIDEST_LATENT if need.latents else WIDEST
    if max(need.head_dim, need.value_dim) > most:
        return f"head dim {need.head_dim}, value dim {need.value_dim}: at most {most} is supported"
    *_, width = padded(need.head_dim, need.value_dim, need.latents)
    if tile_of(1, width, need.dtype.itemsize, str(need.device), need.latents) is None:
        return f"{need.dtype} heads of {width}: too wide for this GPU's shared memory"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def decode(
    q: Tensor,
    places: Places,
    query_pos: Tensor,
    pages: PageLists | None = None,
    *,
    length: Tensor,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    span: tuple[int, int] | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention `[B, Hq, Q, Dv]` of q `[B, Hq, Q, D]` over all stores of a layer's cache.

    query_pos [B, Q]: positions in the row, -1 where a row has no query. length [B]: tokens in each
    row, the new ones included. A key is read if it is held, not after the query, in its head's band
    (rows under `below`: in any case) and, of heads that `pages` lists, in a listed page or unit of
    it. pages: those of the listed heads, in the places' order; None: they read every page. span:
    of all these keys those at positions from the first on and before the second, multiples of a
    page. lse `[B, Hq, Q]` float32: as `reference.decode`. Rows may lie in the pages of a pool.
    """
    B, Hq, Q, D = q.shape
    Hkv, Dv = len(places.cells), places.v.shape[3]
    out = q.new_empty(B, Hq, Q, Dv, dtype=places.v.dtype)
    if out.numel() == 0:
        return out
    q = q if q.stride(-1) == 1 else q.contiguous()
    group = Hq // Hkv
    latents = places.pool is None and places.value_step > Dv
    DP, DVP, wide = padded(D, Dv, latents)
    rows, stages, warps = tile_of(group * Q, wide, q.element_size(), str(q.device), latents)
    tiles = triton.cdiv(group * Q, rows)
    most = LATENT_SPLITS if latents else SPLITS
    splits = splits_of(B * places.long * tiles, str(q.device), most)
    listed, count, width = length, length, (0, 0, 0, 0)  # stand-ins that are not read
    if pages is not None:
        listed = pages.pages if pages.pages.stride(-1) == 1 else pages.pages.contiguous()
        count, width = pages.count, (*listed.stride()[:2], *pages.count.stride())
    unit, inner = units_of_logits(scale, softcap)
    part = out
    if splits > 1:
        part = q.new_empty(B * Hkv, splits, group * Q, Dv, dtype=torch.float32)
    weight = q.new_empty(B * Hkv, splits, group * Q, dtype=torch.float32)
    pool = length if places.pool is None else places.pool.contiguous()
    _decode[(B * Hkv, splits, tiles)](
        *(q, places.k, places.v, places.cells, part, weight),
        *(query_pos.contiguous(), length.contiguous(), listed, count, pool),
        weight if s_aux is None else s_aux.float().to(q.device).contiguous(),
        *q.stride()[:3],
        *(*width, Hkv, Q, group * Q, pool.stride(0), unit, inner, *(span or (0, 0))),
        D=D,
        DV=Dv,
        DP=DP,
        DVP=DVP,
        KEY_STEP=places.key_step,
        STEP=places.value_step,
        POOL=places.pool is not None,
        LATENTS=latents,
        ROWS=rows,
        PAGE=PAGE,
        UNIT=places.unit,
        TOGETHER=PAGE if pages is None else pages.unit,
        LISTED=pages is not None,
        RINGS=places.rings,
        DROPS=places.drops,
        SPAN=span is not None,
        HAS_SINKS=s_aux is not None,
        SOFTCAP=bool(softcap),
        PRECISION="ieee",  # of float32 alone; memory is what bounds
        num_warps=warps,
        **chained(str(q.device)),
        num_stages=stages,
    )
    if splits > 1:
        merge_shares(part, weight, out, lse)
    elif lse is not None:
        torch.div(weight.view(B, Hq, Q), LOG2E.value, out=lse)
    return out


def merge_shares(part: Tensor, weight: Tensor, out: Tensor, lse: Tensor | None = None) -> None:
    """Write what shares `[B * Hkv, splits, rows, Dv]` come to together."""
    heads, splits, rows, Dv = part.shape
    shares = min(MERGED[0], max(16, triton.next_power_of_2(splits)))
    width = max(16, triton.next_power_of_2(Dv))
    wide = min(width, MERGED[1], MERGED[2] // shares)
    given = part, weight, out, weight if lse is None else lse, splits, rows
    more = {"LSE": lse is not None, "num_warps": 4, **chained(str(part.device))}
    _merge[(heads, rows, width // wide)](*given, DV=Dv, WIDE=wide, SHARES=shares, **more)


def padded(D: int, Dv: int, latents: bool) -> tuple[int, int, int]:
    """Dims of keys and values in tiles, and how wide these are; of latents' keys those dims that
    are no value's."""
    DP, DVP = (max(16, triton.next_power_of_2(d)) for d in (D - Dv * latents, Dv))
    return DP, DVP, DP + DVP if latents else max(DP, DVP)


@lru_cache
def tile_of(
    queries: int, width: int, itemsize: int, device: str, latents: bool = False
) -> tuple[int, int, int] | None:
    """Rows of a tile, stages and warps, for heads `width` wide: the first that fits, if any."""
    room, most = shared_memory(device), max(16, triton.next_power_of_2(queries))
    if latents:
        return _latent_tile(most, width, itemsize, room, has_tensor_memory(device))
    most = 16 if itemsize == 4 else most  # float32 takes many registers
    wide = width * itemsize >= 1024  # float32 heads of 256: registers are what is short
    for stages in (1,) if wide else (3, 2, 1):
        for rows in sorted((r for r in ROWS if r <= most), reverse=True):
            pages = 1 if stages == 1 and itemsize == 2 else 2 * max(1, stages - 1)
            shared = width * (rows * (2 * itemsize + 4) + pages * PAGE * itemsize)
            if shared <= room:
                return rows, stages, 8 if wide or rows * width > 1 << 13 else 4
    return None


def _latent_tile(
    most: int, width: int, itemsize: int, room: int, turned: bool
) -> tuple[int, int, int] | None:
    """As `tile_of`, of at most so many rows; whether 64 have a page turned round for the values."""
    for rows, stages, warps in LATENT_TILES if itemsize == 2 else [SINGLE_TILE]:
        pages = stages + turned if rows == 64 else max(1, stages - 1)
        shared = itemsize * (width * (rows + pages * PAGE) + rows * PAGE)
        if rows <= most and shared <= room:
            return rows, stages, warps
    return None


@lru_cache
def splits_of(programs: int, device: str, most: int = SPLITS, fill: int = 2) -> int:
    """Shares of a head's pages, so that each processor has about `fill` of so many `programs`."""
    units = UNITS
    if torch.device(device).type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, fill * units // programs))


@triton.jit(do_not_specialize="list_b list_h count_b count_h Hkv Q rows pool_b low high".split())
def _decode(
    Q_, K, V, TABLE, PART, WEIGHT, QUERY_POS, LENGTH, PAGES, COUNT, WHERE, SINKS,
    q_b: tl.int64, q_h: tl.int64, q_s,
    list_b: tl.int64, list_h: tl.int64, count_b: tl.int64, count_h: tl.int64,
    Hkv, Q, rows, pool_b, unit, inner, low, high,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    KEY_STEP: tl.constexpr, STEP: tl.constexpr, POOL: tl.constexpr, LATENTS: tl.constexpr,
    ROWS: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, TOGETHER: tl.constexpr,
    LISTED: tl.constexpr, RINGS: tl.constexpr, DROPS: tl.constexpr, SPAN: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    # Rows: q head of the group * Q + new token. Tiles: this program's share of those of its head,
    # each a page, or PAGE / TOGETHER units of so many tokens that lists name.
    # Of latents the first DV dims of a key are read as its value, and only the others as a key.
    FROM: tl.constexpr = DV if LATENTS else 0
    head = tl.program_id(0)
    b, kv = (head // Hkv).to(tl.int64), (head % Hkv).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    length = tl.load(LENGTH + b).to(tl.int32)
    lost = 0
    if DROPS:
        lost = lost_by(TABLE, kv, b)
        length -= lost
    live = tl.minimum(length, look_up(TABLE, kv, SLOTS).to(tl.int32))  # slots that hold a key
    whole = length < look_up(TABLE, kv, BELOW)
    EACH: tl.constexpr = PAGE // TOGETHER  # units of a tile
    units = tl.cdiv(live, TOGETHER)
    passed = 0  # units that are read in order and lie before the span
    if SPAN:
        ring = look_up(TABLE, kv, SIZE) < NEVER
        passed = tl.where(ring, 0, low // TOGETHER)
        units = tl.where(ring, units, tl.cdiv(tl.minimum(live, high), TOGETHER) - passed)
        units = tl.maximum(units, 0)
    if LISTED:
        mine = look_up(TABLE, kv, LISTED_AT)
        chosen = (mine >= 0) & (whole == 0)
        lists = PAGES + b * list_b + mine * list_h
        listed = tl.load(COUNT + b * count_b + mine * count_h, mask=chosen, other=0)
        units = tl.where(chosen, listed.to(tl.int32), units)
    count = tl.cdiv(units, EACH)
    each = tl.cdiv(count, tl.num_programs(1))
    first = tl.program_id(1) * each
    place = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * rows + row
    if (first >= count) & (tl.program_id(1) > 0):  # no page is left for it, as of most of a ring's
        tl.store(WEIGHT + place, tl.full([ROWS], float("-inf"), tl.float32), mask=alive)
        return

    group = rows // Q
    at = tl.load(QUERY_POS + b * Q + row % Q, mask=alive, other=-1)
    if DROPS:
        at = tl.where(at < 0, at, at - lost)
    queries = Q_ + b * q_b + (kv * group + row // Q) * q_h + (row % Q) * q_s
    d = tl.arange(0, DP)
    inside = alive[:, None] & (d < D - FROM)[None, :]
    q = tl.load(queries[:, None] + FROM + d[None, :], mask=inside, other=0.0)
    if LATENTS:
        d = tl.arange(0, DVP)
        inside = alive[:, None] & (d < DV)[None, :]
        q_latent = tl.load(queries[:, None] + d[None, :], mask=inside, other=0.0)
    begin = b * look_up(TABLE, kv, ROW)
    keys = K + look_up(TABLE, kv, K_AT) * UNIT + begin * KEY_STEP
    values = V + look_up(TABLE, kv, V_AT) * UNIT + begin * STEP
    if RINGS:
        # Beyond the sink a ring's slot holds its place in the newest turn; past the newest key, in
        # the turn before. Without a ring this is turn 0, and the window begins before every key.
        sink, size = look_up(TABLE, kv, SINK).to(tl.int32), look_up(TABLE, kv, SIZE).to(tl.int32)
        turn, newest = (length - 1 - sink) // size * size, sink + (length - 1 - sink) % size
        recent, rate = look_up(TABLE, kv, RECENT), look_up(TABLE, kv, RATE)
        span = recent + (at * rate >> 16)  # as Band.span
        span = tl.where(look_up(TABLE, kv, CHUNKED) != 0, at % recent + 1, span)
        start = tl.maximum(at - span + 1, 0)
        start = tl.where(whole, 0, start).to(tl.int32)
    at = at.to(tl.int32)
    acc = tl.zeros([ROWS, DVP], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if HAS_SINKS:  # one more logit, of a key without a value: the first share has it
        bare = tl.load(SINKS + kv * group + row // Q, mask=alive, other=0.0) * LOG2E
        top = tl.where(tl.program_id(1) == 0, bare, top)
        total = tl.where(tl.program_id(1) == 0, 1.0, total)

    lane = tl.arange(0, PAGE)
    for j in range(first, tl.minimum(first + each, count)):
        if TOGETHER == PAGE:
            page = first.to(tl.int64) + (j - first) + passed
            if LISTED:
                page = tl.load(lists + j, mask=chosen, other=page)
            base, slot = page * PAGE, lane
            key = page.to(tl.int32) * PAGE + lane
            held = key < live
            if POOL:
                base = tl.load(WHERE + b * pool_b + page).to(tl.int64) * PAGE
        else:
            nth = j * EACH + lane // TOGETHER
            named = tl.load(lists + nth, mask=chosen & (nth < units), other=0).to(tl.int32)
            key = tl.where(chosen, named, nth + passed) * TOGETHER + lane % TOGETHER
            base, slot = 0, key.to(tl.int64)
            held = (nth < units) & (key < live)
            if POOL:
                home = tl.load(WHERE + b * pool_b + key // PAGE, mask=held, other=0)
                slot = home.to(tl.int64) * PAGE + key % PAGE
        k = load_rows(keys + base * KEY_STEP + FROM, KEY_STEP, slot, held, D - FROM, DP, True)
        v = load_rows(values + base * STEP, STEP, slot, held, DV, DVP, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if LATENTS:
            s = tl.dot(q_latent, tl.trans(v), s, input_precision=PRECISION)
        if RINGS:
            key += tl.where(key < sink, 0, tl.where(key > newest, turn - size, turn))
        if SPAN:
            held &= (key >= low) & (key < high)
        kept = held[None, :] & (key[None, :] <= at[:, None])
        if RINGS:
            kept &= tl.where(key < sink, NEVER, key)[None, :] >= start[:, None]
        acc, total, top, _ = add_logits(
            *(acc, total, top, 0, s, v, kept, alive, unit, inner, 0.0),
            *(True, SOFTCAP, False, PRECISION),
        )

    # A share's output and, in base 2, the logarithm of its weight; the whole one's is not needed.
    some = tl.where(total == 0, 1.0, total)
    d = tl.arange(0, DVP)
    inside = alive[:, None] & (d < DV)[None, :]
    part = (acc / some[:, None]).to(PART.dtype.element_ty)
    tl.store(PART + place[:, None] * DV + d[None, :], part, mask=inside)
    tl.store(WEIGHT + place, top + tl.log2(some), mask=alive)


@triton.jit(do_not_specialize="splits rows".split())
def _merge(
    PART, WEIGHT, OUT, SUMS, splits, rows,
    DV: tl.constexpr, WIDE: tl.constexpr, SHARES: tl.constexpr, LSE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    await_previous(CHAINED)
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    top, total = float("-inf"), 0.0
    for begin in range(0, splits, SHARES):
        split = begin + tl.arange(0, SHARES)
        at = WEIGHT + (head * splits + split) * rows + row
        weight = tl.load(at, mask=split < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(weight, 0))
    top = tl.where(top == float("-inf"), 0.0, top)  # a query that reads nothing
    out = tl.zeros([WIDE], tl.float32)
    for begin in range(0, splits, SHARES):
        split = begin + tl.arange(0, SHARES)
        place = (head * splits + split) * rows + row
        weight = tl.load(WEIGHT + place, mask=split < splits, other=float("-inf"))
        share = tl.exp2(weight - top)
        total += tl.sum(share, 0)
        inside = (weight > float("-inf"))[:, None] & (d < DV)[None, :]  # else nothing is written
        part = tl.load(PART + place[:, None] * DV + d[None, :], mask=inside, other=0.0)
        out += tl.sum(part * share[:, None], 0)
    out /= tl.where(total == 0, 1.0, total)
    out_at = OUT + (head * rows + row) * DV + d
    tl.store(out_at, out.to(OUT.dtype.element_ty), mask=d < DV)
    if LSE:
        sums = tl.where(total > 0, (top + tl.log2(total)) / LOG2E, float("-inf"))
        tl.store(SUMS + head * rows + row, sums)
