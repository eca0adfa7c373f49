"""A few new queries over a cache in Triton, on any CUDA GPU: the fast form of `reference.decode`.

A program serves one kv head's queries, the q heads of its group as rows of one tile, over a share
of the pages that the head reads (split-KV, as in Flash-Decoding); a second kernel merges the
shares, if there are several. Bound by memory: each key and value is read once where one tile holds
the queries (not yet measured). How the pages are split depends on the batch and the device, never
on the cache's length or capacity, and lengths are read on the device: a step of the same pages
gives the same bits however much room the cache has, a new length compiles nothing, and a CUDA
graph of a step serves every later one that the cache has room for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton_prefill import (
    DTYPES,
    LOG2E,
    NEVER,
    WIDEST,
    _add,
    _rows,
    shared_memory,
)
from hfsparse.lists import PAGE, PageLists

if TYPE_CHECKING:
    from hfsparse.kernels import Need

ROWS = (16, 32, 64)  # queries of a tile: q heads of a group times new tokens
SPLITS = 64  # at most so many shares of a head's pages
UNITS = 8  # processors of a device that is no GPU (the interpreter)


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    if max(need.head_dim, need.value_dim) > WIDEST:
        return (
            f"head dim {need.head_dim}, value dim {need.value_dim}: at most {WIDEST} is supported"
        )
    width = max(16, triton.next_power_of_2(max(need.head_dim, need.value_dim)))
    if tile_of(1, width, need.dtype.itemsize, str(need.device)) is None:
        return f"{need.dtype} heads of {width}: too wide for this GPU's shared memory"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_pos: Tensor,
    key_pos: Tensor | None = None,
    pages: PageLists | None = None,
    *,
    length: Tensor,
    scale: float,
    start: Tensor | None = None,
    sink: int = 0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention `[B, Hq, Q, Dv]` of q `[B, Hq, Q, D]` over a cache k, v `[B, Hkv, S, D]`.

    Arguments as `reference.decode` has them.
    """
    B, Hq, Q, D = q.shape
    Hkv, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    out = q.new_empty(B, Hq, Q, Dv, dtype=v.dtype)
    if out.numel() == 0:
        return out
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    query_pos, length = query_pos.contiguous(), length.contiguous()
    group = Hq // Hkv
    DP, DVP = (max(16, triton.next_power_of_2(d)) for d in (D, Dv))
    rows, stages, warps = tile_of(group * Q, max(DP, DVP), q.element_size(), str(q.device))
    tiles = triton.cdiv(group * Q, rows)
    splits = splits_of(B * Hkv * tiles, str(q.device))
    listed, count, width = length, length, (0, 0, 0, 0)  # stand-ins that are not read
    if pages is not None:
        listed = pages.pages if pages.pages.stride(-1) == 1 else pages.pages.contiguous()
        count, width = pages.count, (*listed.stride()[:2], *pages.count.stride())
    unit, inner = scale * LOG2E.value, 0.0
    if softcap:
        unit, inner = softcap * LOG2E.value, scale / softcap
    part = out
    if splits > 1:
        part = q.new_empty(B * Hkv, splits, group * Q, Dv, dtype=torch.float32)
    weight = q.new_empty(B * Hkv, splits, group * Q, dtype=torch.float32)
    _decode[(B * Hkv, splits, tiles)](
        *(q, k, v, part, weight, query_pos, length, listed, count),
        query_pos if key_pos is None else key_pos.contiguous(),
        query_pos if start is None else start.contiguous(),
        weight if s_aux is None else s_aux.float().to(q.device).contiguous(),
        *(s for t in (q, k, v) for s in t.stride()[:3]),
        *(*width, S, Hkv, sink, Q, group * Q),
        *(unit, inner),
        D=D,
        DV=Dv,
        DP=DP,
        DVP=DVP,
        ROWS=rows,
        PAGE=PAGE,
        LISTED=pages is not None,
        HAS_KEY_POS=key_pos is not None,
        HAS_START=start is not None,
        HAS_SINKS=s_aux is not None,
        SOFTCAP=bool(softcap),
        PRECISION="ieee",  # of float32 alone; memory is what bounds
        num_warps=warps,
        num_stages=stages,
    )
    if splits > 1:
        _merge[(B * Hkv, group * Q)](
            *(part, weight, out, splits, group * Q),
            DV=Dv,
            DVP=DVP,
            SPLITS=SPLITS,
            num_warps=4,
        )
    return out


@lru_cache
def tile_of(queries: int, width: int, itemsize: int, device: str) -> tuple[int, int, int] | None:
    """Rows of a tile, stages and warps, for heads `width` wide: the first that fits, if any."""
    room, most = shared_memory(device), max(16, triton.next_power_of_2(queries))
    most = 16 if itemsize == 4 else most  # float32 takes many registers
    for stages in (3, 2, 1):
        for rows in sorted((r for r in ROWS if r <= most), reverse=True):
            pages = 1 if stages == 1 and itemsize == 2 else 2 * max(1, stages - 1)
            shared = width * (rows * (2 * itemsize + 4) + pages * PAGE * itemsize)
            if shared <= room:
                return rows, stages, 4 if rows * width <= 1 << 13 else 8
    return None


@lru_cache
def splits_of(programs: int, device: str) -> int:
    """Shares of a head's pages, so that `programs` of them fill the device about twice."""
    units = UNITS
    if torch.device(device).type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(SPLITS, 2 * units // programs))


@triton.jit(do_not_specialize="list_b list_h count_b count_h S Hkv sink Q rows".split())
def _decode(
    Q_, K, V, PART, WEIGHT, QUERY_POS, LENGTH, PAGES, COUNT, KEY_POS, START, SINKS,
    q_b: tl.int64, q_h: tl.int64, q_s, k_b: tl.int64, k_h: tl.int64, k_s,
    v_b: tl.int64, v_h: tl.int64, v_s,
    list_b: tl.int64, list_h: tl.int64, count_b: tl.int64, count_h: tl.int64,
    S, Hkv, sink, Q, rows, unit, inner,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    ROWS: tl.constexpr, PAGE: tl.constexpr, LISTED: tl.constexpr, HAS_KEY_POS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Rows: q head of the group * Q + new token. Pages: this program's share of those listed.
    head = tl.program_id(0)
    b, kv = (head // Hkv).to(tl.int64), (head % Hkv).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    group = rows // Q
    at = tl.load(QUERY_POS + b * Q + row % Q, mask=alive, other=-1)
    place = Q_ + b * q_b + kv * group * q_h
    d = tl.arange(0, DP)
    q = tl.load(
        place + (row // Q)[:, None] * q_h + (row % Q)[:, None] * q_s + d[None, :],
        mask=alive[:, None] & (d < D)[None, :],
        other=0.0,
    )
    if HAS_START:
        start = tl.load(START + b * Q + row % Q, mask=alive, other=0)
    keys, values = K + b * k_b + kv * k_h, V + b * v_b + kv * v_h
    acc = tl.zeros([ROWS, DVP], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if HAS_SINKS:  # one more logit, of a key without a value: the first share has it
        bare = tl.load(SINKS + kv * group + row // Q, mask=alive, other=0.0) * LOG2E
        top = tl.where(tl.program_id(1) == 0, bare, top)
        total = tl.where(tl.program_id(1) == 0, 1.0, total)

    live = tl.minimum(tl.load(LENGTH + b).to(tl.int32), S)  # slots that may hold a key
    if LISTED:
        count = tl.load(COUNT + b * count_b + kv * count_h).to(tl.int32)
    else:
        count = tl.cdiv(live, PAGE)
    each = tl.cdiv(count, tl.num_programs(1))
    first = tl.program_id(1) * each
    lane = tl.arange(0, PAGE)
    for j in range(first, tl.minimum(first + each, count)):
        page = first.to(tl.int64) + (j - first)
        if LISTED:
            page = tl.load(PAGES + b * list_b + kv * list_h + j).to(tl.int64)
        slot = page * PAGE + lane
        if HAS_KEY_POS:
            key = tl.load(KEY_POS + b * S + slot, mask=slot < live, other=-1)
        else:
            key = tl.where(slot < live, slot, -1)
        held = key >= 0
        k = _rows(keys + page * PAGE * k_s, k_s, lane, held, D, DP, True)
        v = _rows(values + page * PAGE * v_s, v_s, lane, held, DV, DVP, True)
        kept = held[None, :] & (key[None, :] <= at[:, None])
        if HAS_START:
            kept &= tl.where(key < sink, NEVER, key)[None, :] >= start[:, None]
        acc, total, top, _ = _add(
            *(acc, total, top, 0, q, k, v, kept, alive, unit, inner, 0.0),
            *(True, SOFTCAP, False, PRECISION),
        )

    # A share's output and, in base 2, the logarithm of its weight; the whole one's is not needed.
    some = tl.where(total == 0, 1.0, total)
    place = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * rows + row
    d = tl.arange(0, DVP)
    inside = alive[:, None] & (d < DV)[None, :]
    part = (acc / some[:, None]).to(PART.dtype.element_ty)
    tl.store(PART + place[:, None] * DV + d[None, :], part, mask=inside)
    tl.store(WEIGHT + place, top + tl.log2(some), mask=alive)


@triton.jit(do_not_specialize="splits rows".split())
def _merge(
    PART, WEIGHT, OUT, splits, rows, DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr
):
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, d = tl.arange(0, SPLITS), tl.arange(0, DVP)
    place = (head * splits + split) * rows + row
    weight = tl.load(WEIGHT + place, mask=split < splits, other=float("-inf"))
    top = tl.max(weight, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # a query that reads nothing
    share = tl.exp2(weight - top)
    total = tl.sum(share, 0)
    inside = (split < splits)[:, None] & (d < DV)[None, :]
    part = tl.load(PART + place[:, None] * DV + d[None, :], mask=inside, other=0.0)
    out = tl.sum(part * share[:, None], 0) / tl.where(total == 0, 1.0, total)
    out_at = OUT + (head * rows + row) * DV + d
    tl.store(out_at, out.to(OUT.dtype.element_ty), mask=d < DV)
