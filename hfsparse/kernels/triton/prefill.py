"""Attention over BlockLists in Triton, on any CUDA GPU: the fast form of `reference.prefill`.

A program serves one block of queries of one q head: its partial blocks (the diagonal among them),
then its full blocks, then its columns, in one online softmax. Heavy heads and, within a head, heavy
query blocks start first. Bound by FLOPs; `benchmarks/prefill.py` measures what share is reached.
Of a past that lies in packed pages each tile is unpacked where it is multiplied, bit for bit as
`packed.unpack` does: whole pages first, then the newest and the chunk's own keys, which are as they
came.
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
from hfsparse.lists import PAGE, BlockLists
from hfsparse.lists.packed import NARROW, WIDE, Past, of_bytes, steps, width_of

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
FIVE_BITS, THREE_BITS = tl.constexpr(WIDE), tl.constexpr(NARROW)
PAGE_SIZE = tl.constexpr(PAGE)


def why_not(need: Need) -> str | None:
    """Why this kernel can't serve; None: it can."""
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16, float16 and float32 are supported"
    if max(need.head_dim, need.value_dim) > WIDEST:
        return (
            f"head dim {need.head_dim}, value dim {need.value_dim}: at most {WIDEST} is supported"
        )
    if need.packed and (need.head_dim % 8 or need.value_dim % 8):
        return (
            f"head dim {need.head_dim}, value dim {need.value_dim}: of packed pages multiples of 8 "
            "are supported"
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
    past: Past | None = None,
) -> Tensor:
    """Attention `[B, H, Sq, Dv]` of q `[B, H, Sq, D]` over the kept keys of k, v `[B, Hkv, Sk, D]`.

    Arguments as `reference.prefill` has them. past: packed pages; k and v hold what comes behind
    these. The result lies token by token in memory, heads within tokens, as models want it next.
    """
    grid = lists.grid
    B, H, Sq, D = q.shape
    Dv = v.shape[-1]
    bits = 16 if past is None else past.packed.bits
    if bits == 4:  # two channels of a byte side by side
        k, v = (t[..., _side_by_side(t.shape[-1], t.device)] for t in (k, v))
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
    queries, keys, warps = tile_of(*given, past is not None)
    _prefill[(B * H * grid.nq * (grid.block // queries),)](
        *(q, k, v, out, kv_heads.to(q.device), grid.q_len, grid.k_len, grid.first, grid.live),
        *(bands_on(lists.bands, str(q.device)), heads, blocks, *full, *part, columns, covered),
        full[0] if s_aux is None else s_aux.float().to(q.device).contiguous(),
        full[0] if skipped is None else skipped,
        full[0] if lse is None else lse,
        *_held(past, full[0]),
        *(s for t in (q, k, v, out) for s in t.stride()[:3]),
        *(grid.first.stride(0), grid.live.stride(0), blocks.stride(0)),
        *(s for t in (*full, *part) for s in t.stride()[:-1]),
        *(columns.stride()[:2] + covered.stride()[:3]),
        *_strides(past),
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
        BITS=width_of(bits),
        FLOAT=bits == "fp8",
        STEP=steps(bits) if past is not None else 0.0,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=STAGES,
    )
    return out


def _held(past: Past | None, none: Tensor) -> tuple[Tensor, ...]:
    """Whole pages, and for how many tokens of each row they are read."""
    return (none,) * 7 if past is None else (*past.packed.pages, past.tokens)


def _strides(past: Past | None) -> tuple[int, ...]:
    """From row to row and from head to head of pages' codes and ends."""
    if past is None:
        return (0,) * 8
    packed = past.packed
    return tuple(s for t in (packed.k, packed.v, packed.low, packed.least) for s in t.stride()[:2])


@lru_cache
def _side_by_side(dim: int, device: torch.device) -> Tensor:
    """[dim] channels in the order in which the kernel unpacks 4 bits, as `_channels`."""
    first, second = of_bytes(torch.arange(dim))
    return torch.stack([first, second], 1).flatten().to(device)


@lru_cache
def tile_of(
    width: int,
    itemsize: int,
    block: int,
    device: str,
    gathered: bool = True,
    skips: bool = True,
    packed: bool = False,
) -> tuple[int, int, int] | None:
    """Queries and keys of a tile, and warps, for heads `width` wide: the first row that fits.

    gathered: whether columns are read, too; skips: whether there is a threshold. Both take room.
    packed: no tile is longer than a page.
    """
    room, width = shared_memory(device), max(16, triton.next_power_of_2(width))
    for queries, keys, warps in TILES:
        shared = shared_by(queries, keys, width, itemsize, gathered, skips)
        registers = itemsize // 2 * queries * (width + keys) / (32 * warps)  # a thread
        long = packed and keys > PAGE
        if not long and max(queries, keys) <= block and shared <= room and registers <= 160:
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


@triton.jit
def _channels(D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """The channels that a tile has side by side; of 4 bits the two of each byte."""
    d = tl.arange(0, DP)
    if BITS == 4:
        d = tl.where(d % 2 == 0, d // 2, D // 2 + (d // 2 + D // 8 * 2) % (D // 2))
    return d


@triton.jit
def _codes(CODES, row, live, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """Bytes of packed keys or values at rows `[KEYS]`, four in a word."""
    W: tl.constexpr = D * BITS // 32
    return load_rows(CODES.to(tl.pointer_type(tl.uint32)), W, row, live, W, DP * BITS // 32, MASKED)


@triton.jit
def _in_order(a, b, c, d):
    """What words `[KEYS, W]` have, each four, as `[KEYS, 4 * W]`."""
    made = tl.join(tl.join(a, c), tl.join(b, d))
    return made.reshape(a.shape[0], 4 * a.shape[1])


@triton.jit
def _spread(code):
    """Bytes as bits of float32 numbers, which are 2^15 more than these."""
    a, b = (code & 255) << 8 | 0x47000000, code & 0xFF00 | 0x47000000
    c, d = code >> 8 & 0xFF00 | 0x47000000, code >> 16 & 0xFF00 | 0x47000000
    return _in_order(a, b, c, d)


@triton.jit
def _number(bits):
    """The numbers of such bits, some of which may be masked."""
    return bits.to(tl.float32, bitcast=True) - 32768.0


@triton.jit
def _fp8(code):
    """Numbers of fp8 as float32, times 2^-8."""
    upper = code & 0x80008000 | code >> 1 & 0x3F803F80
    code = code << 8
    lower = code & 0x80008000 | code >> 1 & 0x3F803F80
    return _in_order(_half(lower), _half(upper), _half(lower >> 16), _half(upper >> 16))


@triton.jit
def _half(bits):
    """The lower half of words, which is a float16 number."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _ends(LOW, HIGH, at, live):
    return (
        tl.load(LOW + at, mask=live, other=0.0),
        tl.load(HIGH + at, mask=live, other=0.0),
    )


@triton.jit
def _scaled(code, low, high, STEP: tl.constexpr, FLOAT: tl.constexpr):
    """What bytes stand for between two ends, float32."""
    if FLOAT:
        made = _fp8(code) * (tl.maximum(-low, high) * STEP * 256.0)
    else:
        made = low + _number(_spread(code)) * ((high - low) * STEP)
    return made


@triton.jit
def _fetch_keys(
    CODES, LOW, HIGH, row, page, live, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Codes of packed keys at rows `[KEYS]`, and ends of their pages `[KEYS, 1]`, or of the one
    that all lie in, `[1, 1]`: of 4 bits those of a byte's first channel, then of its second."""
    code = _codes(CODES, row, live, D, DP, BITS, MASKED)
    word = tl.arange(0, DP * BITS // 8)[None, :]
    at, inside = page * D + word, word < D * BITS // 8
    if MASKED:
        inside = inside & live[:, None]
    made = (code,)
    made += _ends(LOW, HIGH, at, inside)
    if BITS == 4:
        at = page * D + D // 2 + (word + D // 8 * 2) % (D // 2)
        made += _ends(LOW, HIGH, at, inside)
    return made


@triton.jit
def _halves(code, lower, low, step, other_low, other_step):
    """Both numbers of bytes that are spread, side by side: of their lower bits, and of the rest."""
    first = low + _number(code & (lower | 0x47000000)) * step
    second = other_low + _number(code & (0x4700FF00 - lower)) * other_step
    return tl.join(first, second)


@triton.jit
def _unpack_keys(held, DP: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr,
                 STEP: tl.constexpr):  # fmt: skip
    """Keys `[KEYS, DP]` that were fetched."""
    kind: tl.constexpr = held[1].dtype
    low, high = held[1].to(tl.float32), held[2].to(tl.float32)
    if BITS == 4:
        other_low, other_high = held[3].to(tl.float32), held[4].to(tl.float32)
        span, other = high - low, other_high - other_low
        first = span > other  # which of the two has 5 bits
        span *= tl.where(first, FIVE_BITS, THREE_BITS)
        other *= tl.where(first, THREE_BITS / 32, FIVE_BITS / 8)  # upper bits stay where they lie
        code, lower = _spread(held[0]), tl.where(first, 0x1F00, 0x0700)
        made = _halves(code, lower, low, span, other_low, other).to(kind)
        made = made.reshape(held[0].shape[0], DP)
    else:
        made = _scaled(held[0], low, high, STEP, FLOAT).to(kind)
    return made


@triton.jit
def _fetch_values(
    CODES, LEAST, MOST, row, live, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Codes of packed values at rows `[KEYS]`, and their ends."""
    made = (_codes(CODES, row, live, D, DP, BITS, MASKED),)
    if MASKED:
        made += _ends(LEAST, MOST, row, live)
    else:
        made += (tl.load(LEAST + row), tl.load(MOST + row))
    return made


@triton.jit
def _unpack_values(held, DP: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr,
                   STEP: tl.constexpr):  # fmt: skip
    """Values `[KEYS, DP]` that were fetched."""
    kind: tl.constexpr = held[1].dtype
    code = held[0]
    least, most = held[1].to(tl.float32)[:, None], held[2].to(tl.float32)[:, None]
    if BITS == 4:
        step, lower = (most - least) * STEP, tl.full([1, 1], 0x0F00, tl.uint32)
        made = _halves(_spread(code), lower, least, step, least, step / 16).to(kind)
        made = made.reshape(held[0].shape[0], DP)
    else:
        made = _scaled(code, least, most, STEP, FLOAT).to(kind)
    return made


@triton.jit
def _tile_at(index, j, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """The first token of a list's tile."""
    block = tl.load(index + j // (BLOCK // KEYS)).to(tl.int64)
    return block * BLOCK + j % (BLOCK // KEYS) * KEYS


@triton.jit(
    do_not_specialize=(
        "first_b live_b blocks_b fc_b fc_h fi_b fi_h fi_i pc_b pc_h pi_b pi_h pi_i "
        "col_b col_h cov_b cov_h cov_i H nq Sq n_columns window"
    ).split()
)
def _prefill(
    Q, K, V, OUT, KV, Q_LEN, K_LEN, FIRST, LIVE, BANDS, HEADS, BLOCKS,
    FULL_COUNT, FULL_INDEX, PART_COUNT, PART_INDEX, COLUMNS, COVERED, SINKS, SKIPPED, SUMS,
    PACKED_K, PACKED_V, LOW, HIGH, LEAST, MOST, TOKENS,
    q_b: tl.int64, q_h: tl.int64, q_s, k_b: tl.int64, k_h: tl.int64, k_s,
    v_b: tl.int64, v_h: tl.int64, v_s, out_b: tl.int64, out_h: tl.int64, out_s,
    first_b: tl.int64, live_b: tl.int64, blocks_b: tl.int64,
    fc_b: tl.int64, fc_h: tl.int64, fi_b: tl.int64, fi_h: tl.int64, fi_i: tl.int64,
    pc_b: tl.int64, pc_h: tl.int64, pi_b: tl.int64, pi_h: tl.int64, pi_i: tl.int64,
    col_b: tl.int64, col_h: tl.int64, cov_b: tl.int64, cov_h: tl.int64, cov_i: tl.int64,
    pk_b: tl.int64, pk_h: tl.int64, pv_b: tl.int64, pv_h: tl.int64,
    low_b: tl.int64, low_h: tl.int64, least_b: tl.int64, least_h: tl.int64,
    H, nq, Sq, n_columns, window, unit, inner, skip,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_SINKS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SKIP: tl.constexpr, COUNT: tl.constexpr,
    LSE: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
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
    if BITS < 16:  # keys before `base` lie in packed pages, and those behind them as they came
        base = tl.load(TOKENS + b).to(tl.int32)
        keys, values = keys - base.to(tl.int64) * k_s, values - base.to(tl.int64) * v_s
        codes_k, codes_v = PACKED_K + b * pk_b + kv * pk_h, PACKED_V + b * pv_b + kv * pv_h
        low, high = LOW + b * low_b + kv * low_h, HIGH + b * low_b + kv * low_h
        least, most = LEAST + b * least_b + kv * least_h, MOST + b * least_b + kv * least_h
    d_q, d_v = _channels(D, DP, BITS), _channels(DV, DVP, BITS)
    q = Q + b * q_b + h * q_h + first_row * q_s + lane_q[:, None] * q_s + d_q[None, :]
    q = tl.load(q, mask=alive[:, None] & (tl.arange(0, DP) < D)[None, :], other=0.0)
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
        token = block * BLOCK + j % (BLOCK // KEYS) * KEYS
        if BITS == 16:  # noqa: SIM114 - else the branch below is compiled, too
            k = load_rows(keys + token * k_s, k_s, lane, held, D, DP, True)
            v = load_rows(values + token * v_s, v_s, lane, held, DV, DVP, True)
        elif token >= base:
            k = load_rows(keys + token * k_s, k_s, lane, held, D, DP, True)
            v = load_rows(values + token * v_s, v_s, lane, held, DV, DVP, True)
        else:
            page = tl.full([1, 1], 0, tl.int64) + token // PAGE_SIZE
            row = token + lane
            old_k = _fetch_keys(codes_k, low, high, row, page, lane, D, DP, BITS, False)
            old_v = _fetch_values(codes_v, least, most, row, lane, DV, DVP, BITS, False)
            k = _unpack_keys(old_k, DP, BITS, FLOAT, STEP)
            v = _unpack_values(old_v, DVP, BITS, FLOAT, STEP)
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
    done = 0
    if BITS < 16:
        for c in range(0, n_full, 1024):
            tile = c + tl.arange(0, 1024)
            token = tl.load(index + tile // (BLOCK // KEYS), mask=tile < n_full, other=0) * BLOCK
            token += tile % (BLOCK // KEYS) * KEYS
            done += tl.sum(((tile < n_full) & (token < base)).to(tl.int32), 0)
        if done > 0:  # the next tile is fetched while this one is multiplied
            token = _tile_at(index, 0, BLOCK, KEYS)
            page = tl.full([1, 1], 0, tl.int64) + token // PAGE_SIZE
            next_k = _fetch_keys(codes_k, low, high, token + lane, page, lane, D, DP, BITS, False)
            next_v = _fetch_values(codes_v, least, most, token + lane, lane, DV, DVP, BITS, False)
            after = _tile_at(index, tl.minimum(1, done - 1), BLOCK, KEYS)
            for j in range(0, done):
                k = _unpack_keys(next_k, DP, BITS, FLOAT, STEP)
                v = _unpack_values(next_v, DVP, BITS, FLOAT, STEP)
                page = tl.full([1, 1], 0, tl.int64) + after // PAGE_SIZE
                row = after + lane
                next_k = _fetch_keys(codes_k, low, high, row, page, lane, D, DP, BITS, False)
                next_v = _fetch_values(codes_v, least, most, row, lane, DV, DVP, BITS, False)
                after = _tile_at(index, tl.minimum(j + 2, done - 1), BLOCK, KEYS)
                acc, total, top, lost = add_keys(
                    *(acc, total, top, lost, q, k, v, alive, alive, unit, inner, skip),
                    *(False, SOFTCAP, SKIP, PRECISION),
                )
    for j in range(done, n_full):
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
            own, at_column = free, column.to(tl.int64)
            if BITS < 16:
                own = free & (column >= base)
            k = load_rows(keys, k_s, at_column, own, D, DP, True)
            v = load_rows(values, v_s, at_column, own, DV, DVP, True)
            if BITS < 16:
                old = free & (column < base)
                page = (at_column // PAGE_SIZE)[:, None]
                row = at_column
                old_k = _fetch_keys(codes_k, low, high, row, page, old, D, DP, BITS, True)
                old_v = _fetch_values(codes_v, least, most, row, old, DV, DVP, BITS, True)
                k = tl.where(old[:, None], _unpack_keys(old_k, DP, BITS, FLOAT, STEP), k)
                v = tl.where(old[:, None], _unpack_values(old_v, DVP, BITS, FLOAT, STEP), v)
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
    out += lane_q[:, None] * out_s + d_v[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=(rows < Sq)[:, None] & (d < DV)[None, :])
    if LSE:
        sums = tl.where(alive & (total > 0), (top + tl.log2(total)) / LOG2E, float("-inf"))
        tl.store(SUMS + (b * H + h) * Sq + rows, sums, mask=rows < Sq)
    if COUNT:
        tl.atomic_add(SKIPPED + h * 2, lost)
        tl.atomic_add(SKIPPED + h * 2 + 1, n_part + n_full)
