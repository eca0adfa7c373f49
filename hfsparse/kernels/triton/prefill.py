"""Attention over BlockLists in Triton, on any CUDA GPU: the fast form of `reference.prefill`.

A program serves one block of queries of one q head: its partial blocks (the diagonal among them),
then its full blocks, then its columns, in one online softmax. Heavy heads and, within a head, heavy
query blocks start first. Bound by FLOPs; `benchmarks/prefill.py` measures what share is reached.
Forward only, with plain pointers, so that the interpreter can run it (TRITON_INTERPRET=1; no bf16).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import (
    BLOCKS,
    DTYPES,
    LOG2E,
    NEVER,
    WIDEST,
    add_keys,
    bands_on,
    load_rows,
    shared_memory,
    units_of_logits,
)
from hfsparse.lists import BlockLists

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

TILES = (  # queries, keys, warps
    (128, 128, 8),
    (128, 64, 8),
    (64, 64, 4),
    (64, 32, 4),
    (32, 32, 4),
    (16, 16, 4),
)
STAGES = 2  # tiles of keys and values in flight


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    if max(need.head_dim, need.value_dim) > WIDEST:
        return (
            f"head dim {need.head_dim}, value dim {need.value_dim}: at most {WIDEST} is supported"
        )
    if need.block not in BLOCKS:
        return f"blocks of {need.block} tokens: 16, 32, 64 and 128 are supported"
    width = max(need.head_dim, need.value_dim)
    if tile_of(width, need.dtype.itemsize, need.block, str(need.device)) is None:
        return f"{need.dtype} heads of {width}: too wide for this GPU's shared memory"
    return "no gradients: call under torch.no_grad()" if need.grad else None


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    kv_heads: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    skip: float | None = None,
    skipped: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention `[B, H, Sq, Dv]` of q `[B, H, Sq, D]` over the kept keys of k, v `[B, Hkv, Sk, D]`.

    Arguments as `reference.prefill` has them. The result lies token by token in memory, heads
    within tokens, as models want it next.
    """
    grid = lists.grid
    B, H, Sq, D = q.shape
    Dv = v.shape[-1]
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(B, Sq, H, Dv, dtype=v.dtype).transpose(1, 2)
    if out.numel() == 0:
        return out
    full, part = (
        (count.expand(B, -1, -1), index.expand(B, -1, -1, -1))
        for count, index in (
            (lists.full_count, lists.full_index),
            (lists.part_count, lists.part_index),
        )
    )
    heads, blocks = _schedule(lists, B)
    columns, covered = full[0], full[1]  # stand-ins that are not read
    if lists.columns is not None:
        columns = lists.columns.clamp(max=NEVER.value).int().expand(B, -1, -1)
        covered = lists.covered.view(torch.uint8).expand(B, -1, -1, -1)
    unit, inner = units_of_logits(scale, softcap)
    gathered = lists.columns is not None and columns.shape[-1] > 0
    given = max(D, Dv), q.element_size(), grid.block, str(q.device), gathered, skip is not None
    queries, keys, warps = tile_of(*given)
    _prefill[(B * H * grid.nq * (grid.block // queries),)](
        *(q, k, v, out, kv_heads.to(q.device), grid.q_len, grid.k_len, grid.first, grid.live),
        *(bands_on(lists.bands, str(q.device)), heads, blocks, *full, *part, columns, covered),
        full[0] if s_aux is None else s_aux.float().to(q.device).contiguous(),
        full[0] if skipped is None else skipped,
        full[0] if lse is None else lse,
        *(s for t in (q, k, v, out) for s in t.stride()[:3]),
        *(grid.first.stride(0), grid.live.stride(0), blocks.stride(0)),
        *(s for t in (*full, *part) for s in t.stride()[:-1]),
        *(columns.stride()[:2] + covered.stride()[:3]),
        *(H, grid.nq, Sq, columns.shape[-1]),
        grid.window or 0,
        *(unit, inner, 0.0 if skip is None else skip * LOG2E.value),
        D=D,
        DV=Dv,
        DP=max(16, triton.next_power_of_2(D)),
        DVP=max(16, triton.next_power_of_2(Dv)),
        BLOCK=grid.block,
        QUERIES=queries,
        KEYS=keys,
        HAS_COLUMNS=gathered,
        HAS_SINKS=s_aux is not None,
        WINDOW=grid.window is not None,
        SOFTCAP=bool(softcap),
        SKIP=skip is not None,
        COUNT=skipped is not None,
        LSE=lse is not None,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=STAGES,
    )
    return out


@lru_cache
def tile_of(
    width: int, itemsize: int, block: int, device: str, gathered: bool = True, skips: bool = True
) -> tuple[int, int, int] | None:
    """Queries and keys of a tile, and warps, for heads `width` wide: the first row that fits.

    gathered: whether columns are read, too; skips: whether there is a threshold. Both take room.
    """
    room, width = shared_memory(device), max(16, triton.next_power_of_2(width))
    for queries, keys, warps in TILES:
        shared = shared_by(queries, keys, width, itemsize, gathered, skips)
        registers = itemsize // 2 * queries * (width + keys) / (32 * warps)  # a thread
        if max(queries, keys) <= block and shared <= room and registers <= 160:
            return queries, keys, warps
    return None


def shared_by(
    queries: int, keys: int, width: int, itemsize: int, gathered: bool, skips: bool
) -> int:
    """The most bytes of shared memory that a tile takes on any card, as Triton 3.8 lays it out.

    Where products read it (wgmma of sm_90, tcgen05 of sm_100), queries lie there and every stage of
    keys and values. Where they read registers (all others), one stage less does, and queries a
    second time for gathered keys, whose layout is another. Their warps hand one another weights,
    unless each has all channels of its own queries, in one run.
    """
    copies = itemsize // 2  # float32 is kept twice
    read = width * (queries * copies + 2 * STAGES * keys)
    passed = width * (queries * (copies + gathered) + keys * (2 * (STAGES - 1) + copies - 1))
    if queries < width or skips:
        passed += copies * queries * keys
    return max(itemsize * read + 2048, itemsize * passed + 512)  # and barriers, maxima


def _schedule(lists: BlockLists, B: int) -> tuple[Tensor, Tensor]:
    """Heads (b * H + h) and, for each, its query blocks [B, H, nq], both heaviest first.

    A head's programs stay together, so that they find its keys and values in the L2 cache.
    """
    work = lists.full_count + lists.part_count
    heads = work.sum(-1).expand(B, -1).flatten().argsort(descending=True, stable=True)
    return heads, work.argsort(dim=-1, descending=True, stable=True).expand(B, -1, -1)


@triton.jit(
    do_not_specialize=(
        "first_b live_b blocks_b fc_b fc_h fi_b fi_h fi_i pc_b pc_h pi_b pi_h pi_i "
        "col_b col_h cov_b cov_h cov_i H nq Sq n_columns window"
    ).split()
)
def _prefill(
    Q, K, V, OUT, KV, Q_LEN, K_LEN, FIRST, LIVE, BANDS, HEADS, BLOCKS,
    FULL_COUNT, FULL_INDEX, PART_COUNT, PART_INDEX, COLUMNS, COVERED, SINKS, SKIPPED, SUMS,
    q_b: tl.int64, q_h: tl.int64, q_s, k_b: tl.int64, k_h: tl.int64, k_s,
    v_b: tl.int64, v_h: tl.int64, v_s, out_b: tl.int64, out_h: tl.int64, out_s,
    first_b: tl.int64, live_b: tl.int64, blocks_b: tl.int64,
    fc_b: tl.int64, fc_h: tl.int64, fi_b: tl.int64, fi_h: tl.int64, fi_i: tl.int64,
    pc_b: tl.int64, pc_h: tl.int64, pi_b: tl.int64, pi_h: tl.int64, pi_i: tl.int64,
    col_b: tl.int64, col_h: tl.int64, cov_b: tl.int64, cov_h: tl.int64, cov_i: tl.int64,
    H, nq, Sq, n_columns, window, unit, inner, skip,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_SINKS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SKIP: tl.constexpr, COUNT: tl.constexpr,
    LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Which head and block of queries this is, where its rows stand, its band.
    program = tl.program_id(0) // (BLOCK // QUERIES)
    head = tl.load(HEADS + program // nq)  # int64, so that every product below is
    b, h = head // H, head % H
    i = tl.load(BLOCKS + b * blocks_b + h * nq + program % nq)
    q_len = tl.load(Q_LEN + b).to(tl.int32)
    offset = tl.load(K_LEN + b).to(tl.int32) - q_len
    first_row = i * BLOCK + tl.program_id(0) % (BLOCK // QUERIES) * QUERIES
    lane_q, lane = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    rows = first_row.to(tl.int32) + lane_q
    alive = rows < q_len
    at = tl.where(alive, offset + rows, -1)
    sink = tl.load(BANDS + h * 3)
    recent, rate = tl.load(BANDS + h * 3 + 1), tl.load(BANDS + h * 3 + 2)
    start = at - (recent + (at * rate >> 16)) + 1  # as Band.start
    start = tl.maximum(start, 0).to(tl.int32)

    kv = tl.load(KV + h).to(tl.int64)
    keys, values = K + b * k_b + kv * k_h, V + b * v_b + kv * v_h
    q = load_rows(Q + b * q_b + h * q_h + first_row * q_s, q_s, lane_q, alive, D, DP, True)
    acc = tl.zeros([QUERIES, DVP], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    lost = 0

    n_part = tl.load(PART_COUNT + b * pc_b + h * pc_h + i) * (BLOCK // KEYS)
    index = PART_INDEX + b * pi_b + h * pi_h + i * pi_i
    for j in range(0, n_part):
        block = tl.load(index + j // (BLOCK // KEYS)).to(tl.int64)
        within = j % (BLOCK // KEYS) * KEYS + lane
        held = within < tl.load(LIVE + b * live_b + block).to(tl.int32)
        key = tl.load(FIRST + b * first_b + block).to(tl.int32) + within
        key = tl.where(held, key, NEVER)
        k = load_rows(keys + block * BLOCK * k_s, k_s, within, held, D, DP, True)
        v = load_rows(values + block * BLOCK * v_s, v_s, within, held, DV, DVP, True)
        kept = key[None, :] <= at[:, None]
        kept &= tl.where(key < sink, NEVER, key)[None, :] >= start[:, None]
        if WINDOW:
            kept &= at[:, None] - key[None, :] < window
        acc, total, top, lost = add_keys(
            *(acc, total, top, lost, q, k, v, kept, alive, unit, inner, skip),
            *(True, SOFTCAP, SKIP, PRECISION),
        )

    n_full = tl.load(FULL_COUNT + b * fc_b + h * fc_h + i) * (BLOCK // KEYS)
    index = FULL_INDEX + b * fi_b + h * fi_h + i * fi_i
    for j in range(0, n_full):
        token = tl.load(index + j // (BLOCK // KEYS)) * BLOCK + j % (BLOCK // KEYS) * KEYS
        k = load_rows(keys + token.to(tl.int64) * k_s, k_s, lane, lane, D, DP, False)
        v = load_rows(values + token.to(tl.int64) * v_s, v_s, lane, lane, DV, DVP, False)
        acc, total, top, lost = add_keys(
            *(acc, total, top, lost, q, k, v, alive, alive, unit, inner, skip),
            *(False, SOFTCAP, SKIP, PRECISION),
        )

    if HAS_COLUMNS:
        columns, covered = COLUMNS + b * col_b + h * col_h, COVERED + b * cov_b + h * cov_h
        covered += i * cov_i
        last = tl.max(at, 0)  # -1 where the block holds no query
        n = 0
        for c in range(0, n_columns, 1024):
            slot = c + tl.arange(0, 1024)
            real = slot < n_columns
            column = tl.load(columns + slot, mask=real, other=0)
            n += tl.sum((real & (column <= last)).to(tl.int32), 0)
        for c in range(0, n, KEYS):
            slot = c + lane
            column = tl.load(columns + slot, mask=slot < n, other=0)
            free = (slot < n) & (tl.load(covered + slot, mask=slot < n, other=1) == 0)
            k = load_rows(keys, k_s, column.to(tl.int64), free, D, DP, True)
            v = load_rows(values, v_s, column.to(tl.int64), free, DV, DVP, True)
            column = tl.where(free, column, NEVER)
            kept = column[None, :] <= at[:, None]
            if WINDOW:
                kept &= at[:, None] - column[None, :] < window
            acc, total, top, lost = add_keys(
                *(acc, total, top, lost, q, k, v, kept, alive, unit, inner, skip),
                *(True, SOFTCAP, False, PRECISION),
            )

    if HAS_SINKS:  # one more logit, of a key without a value
        bare = tl.load(SINKS + h) * LOG2E
        base = tl.maximum(top, bare)
        fade = tl.exp2(top - base)
        total = total * fade + tl.exp2(bare - base)
        acc = acc * fade[:, None]
        top = base
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    acc = tl.where(alive[:, None], acc, 0.0)
    d = tl.arange(0, DVP)
    out = OUT + b * out_b + h * out_h + first_row * out_s
    out += lane_q[:, None] * out_s + d[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=(rows < Sq)[:, None] & (d < DV)[None, :])
    if LSE:
        sums = tl.where(alive & (total > 0), (top + tl.log2(total)) / LOG2E, float("-inf"))
        tl.store(SUMS + (b * H + h) * Sq + rows, sums, mask=rows < Sq)
    if COUNT:
        tl.atomic_add(SKIPPED + h * 2, lost)
        tl.atomic_add(SKIPPED + h * 2 + 1, n_part + n_full)
