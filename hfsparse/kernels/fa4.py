"""Attention over BlockLists by flash-attn-4 on Hopper: the fastest form of `reference.prefill`.

    fa4.why_not(need) or fa4.prefill(q, k, v, lists, kv_heads, scale=scale)

Full and partial blocks are flash-attn-4's two block lists; a mask function tests the pairs of
partial blocks (`Call`). Columns are gathered into key blocks behind the row's
own, a section for each q head of a group, so that one softmax serves all. It compiles once per
plan shape (`compiled`), never per length. Bound by FLOPs; `benchmarks/prefill.py` measures it.

Other GPUs are refused: on compute capability 8.x flash-attn-4 ignores block lists without a word,
and Blackwell is untested. flash-attn-4 is imported when it is first needed.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.lists import FAR, Band, BlockLists, Grid

if TYPE_CHECKING:
    from hfsparse.kernels import Need

BLOCK = 128  # tokens in a block of queries or keys: the only size that runs at full speed
CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
WIDEST, WIDEST_DENSE = 128, 256  # head and value dim; beyond 128 its key tile is not a block
NEVER = (1 << 31) - 1  # the position of a key that no query reads
LONG = 1 << 30  # a recent window longer than any row


def why_not(need: Need) -> str | None:
    """Why this can't serve; None: it can."""
    if need.device.type != "cuda":
        return f"needs a Hopper GPU, not {need.device.type}"
    if (found := torch.cuda.get_device_capability(need.device)) != CAPABILITY:
        return f"compute capability {found[0]}.{found[1]}: needs 9.0 (Hopper)"
    if need.dtype not in DTYPES:
        return f"{need.dtype}: bfloat16 and float16 are supported"
    dims, widest = (need.head_dim, need.value_dim), WIDEST if need.lists else WIDEST_DENSE
    if max(dims) > widest or any(d % 8 for d in dims):
        return f"head dim {dims[0]}, value dim {dims[1]}: multiples of 8 up to {widest} can be"
    if need.lists and need.block != BLOCK:
        return f"blocks of {need.block} tokens: {BLOCK} is supported"
    if need.logits and not need.lists:
        return "no softcap, no sink logits without block lists"
    return "no gradients: call under torch.no_grad()" if need.grad else missing()


@lru_cache
def missing() -> str | None:
    """Why flash-attn-4 can't be imported; None: it can."""
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return "flash-attn-4 is not installed: pip install flash-attn-4"
    try:
        _library()
    except (ImportError, OSError, RuntimeError) as error:
        return f"flash-attn-4 can't be imported: {error}"
    return None


def compiled() -> int:
    """Kernels that flash-attn-4 has compiled in this process, for whomever."""
    return len(_library().forward.compile_cache.cache)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention `[B, H, Sq, Dv]` of full rows: every q head reads all earlier keys.

    q `[B, H, Sq, D]`, k, v `[B, Hkv, Sk, D]`; the last query stands at the last key.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _library().run(q, k, v, softmax_scale=scale, causal=True)[0].transpose(1, 2)


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
) -> Tensor:
    """Attention `[B, H, Sq, Dv]` of q `[B, H, Sq, D]` over the kept keys of k, v `[B, Hkv, Sk, D]`.

    Arguments as `reference.prefill` has them. On the CPU, `kv_heads` costs no wait for the GPU;
    q heads in the order of their kv heads cost no copy of keys and values; nor does a grid that is
    not `padded`.
    """
    grid = lists.grid
    if q.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    k, v, group = grouped(k, v, kv_heads.tolist())
    call = prepare(k, v, lists, group)
    fa4 = _library()
    blocks = fa4.Lists(
        mask_block_cnt=call.part_count,
        mask_block_idx=call.part_index,
        full_block_cnt=call.full_count,
        full_block_idx=call.full_index,
        block_size=(BLOCK, BLOCK),
    )
    q, k, v = (t.transpose(1, 2) for t in (q, call.k, call.v))
    out = fa4.run(
        *(q, k, v),
        softmax_scale=scale,
        softcap=softcap or 0.0,
        learnable_sink=None if s_aux is None else s_aux.float().to(q.device).contiguous(),
        mask_mod={0: fa4.plain, 1: fa4.ring, 2: fa4.columns}[len(call.tables)],
        aux_tensors=[call.heads, call.offset, *call.tables],
        block_sparse_tensors=blocks,
        pack_gqa=False,
    )[0].transpose(1, 2)
    return out.masked_fill_(grid.query_pos()[:, None, :, None] < 0, 0) if grid.padded else out


class Call(NamedTuple):
    """What flash-attn-4 is given besides q; N key slots: the row's own, then those of columns.

    A pair of a partial block counts if `kept` says so of its query's, its key's and its head's
    numbers; the key's position is its slot, unless `tables` say otherwise: `[B, N]` positions of a
    ring's keys (NEVER in dead slots), or of columns `[B, H, m]` positions (NEVER where there is
    none) and `[B, H, nq, n]` whether a block of the head holds them.
    """

    k: Tensor  # [B, Hkv, N, D]
    v: Tensor
    full_count: Tensor  # [B|1, H, nq] int32
    full_index: Tensor  # [B|1, H, nq, width] int32, ascending
    part_count: Tensor
    part_index: Tensor
    heads: Tensor  # [H, 5] int32: window, sink, recent, rate, slot of the first column
    offset: Tensor  # [B] int32: position of the first query
    tables: tuple[Tensor, ...] = ()


def kept(key, at, window, sink, start):
    """Causality, window and band: of numbers, of tensors, or of flash-attn-4's registers."""
    return (key <= at) & (at - key < window) & ((key < sink) | (key >= start))


def kept_column(key, at, window, covered):
    """Causality and window of a column that no block of the head holds yet."""
    return (key <= at) & (at - key < window) & (covered == 0)


def grouped(k: Tensor, v: Tensor, kv_heads: list[int]) -> tuple[Tensor, Tensor, int]:
    """k and v such that q head h reads kv head h // group; copies unless neighbours share one."""
    low, high = kv_heads[0], kv_heads[-1] + 1
    group = len(kv_heads) // max(high - low, 1)
    if kv_heads == [low + h // max(group, 1) for h in range(len(kv_heads))]:
        return k[:, low:high], v[:, low:high], group
    return k[:, kv_heads], v[:, kv_heads], 1


def prepare(k: Tensor, v: Tensor, lists: BlockLists, group: int) -> Call:
    """Lists, keys and tables in flash-attn-4's form; q head h reads kv head h // group."""
    grid, ring = lists.grid, lists.grid.key_first is not None
    blocks = (  # no list is wider than the row has blocks
        *(lists.full_count, lists.full_index[..., : grid.nk]),
        *(lists.part_count, lists.part_index[..., : grid.nk]),
    )
    if grid.padded or ring:  # 0 * NaN would be NaN
        v = v.masked_fill((grid.key_pos[:, None, : v.shape[2], None] < 0), 0)
    n = 0 if lists.columns is None else lists.columns.shape[-1]
    each, first = -(-n // BLOCK) * BLOCK, grid.nk * BLOCK
    heads = _heads(lists.bands, grid.window, group, first, each, str(k.device))
    offset = grid.offset.int()
    if n == 0:
        keys = torch.where(grid.key_pos < 0, NEVER, grid.key_pos).int() if ring else None
        return Call(k, v, *blocks, heads, offset, (keys,) if ring else ())
    if ring:
        raise ValueError("columns over a ring that has dropped keys: flash-attn-4 is not given any")
    B = len(k)
    columns = pad(lists.columns.expand(B, -1, -1), (0, each - n), value=FAR)  # [B, H, each]
    behind = columns.unflatten(1, (-1, group)).flatten(2)  # [B, Hkv, group * each]
    none = (behind >= grid.k_len[:, None, None])[..., None]
    index = behind[..., None].masked_fill(none, 0)
    k, v = (_appended(t, index, first) for t in (k, v))
    v[:, :, first:].masked_fill_(none, 0)
    covered = lists.covered.expand(B, -1, -1, -1)
    some, every = _column_blocks(grid, columns.unflatten(2, (-1, BLOCK)), covered)
    home = heads[:, 4] // BLOCK
    covered = covered.view(torch.uint8)
    covered.__leading_dim__ = 3  # also where it is one column wide
    return Call(
        *(k, v),
        *_listed(*blocks[:2], every, home),
        *_listed(*blocks[2:], some & ~every, home),
        *(heads, offset, (columns.clamp(max=NEVER).int(), covered)),
    )


@lru_cache(256)
def _heads(bands: tuple[Band, ...], window: int | None, group, first, each, device: str) -> Tensor:
    """`Call.heads`; kept, so that a call copies nothing to the GPU."""
    rows = [
        (window or NEVER, band.sink, min(band.recent, LONG), band.rate, first + h % group * each)
        for h, band in enumerate(bands)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _appended(x: Tensor, index: Tensor, first: int) -> Tensor:
    """x `[B, Hkv, Sk, D]`, zeros up to slot `first`, its keys `index` `[B, Hkv, m, 1]` behind."""
    B, Hkv, Sk, D = x.shape
    out = x.new_empty(B, Hkv, first + index.shape[2], D)
    out[:, :, :Sk] = x
    out[:, :, Sk:first] = 0
    out[:, :, first:] = x.gather(2, index.expand(-1, -1, -1, D))
    return out


def _column_blocks(grid: Grid, columns: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, H, nq, nc]: some pair of a query block and a block of columns is read, every pair.

    columns [B, H, nc, BLOCK] ascending, covered [B, H, nq, n].
    """
    free = ~pad(covered, (0, -covered.shape[-1] % BLOCK), value=True).unflatten(3, (-1, BLOCK))
    q0, q1 = grid.q_first[:, None, :, None], grid.q_last[:, None, :, None]
    columns = columns[:, :, None]  # [B, H, 1, nc, BLOCK]
    low, high = columns[..., 0], columns[..., -1]
    some = (low <= q1) & (grid.q_rows > 0)[:, None, :, None] & free.any(-1)
    every = some & (high <= q0) & free.all(-1)
    if grid.window is not None:
        every &= q1 - low < grid.window
    return some, every


def _listed(count: Tensor, index: Tensor, more: Tensor, home: Tensor) -> tuple[Tensor, Tensor]:
    """Lists with the blocks `more` [B, H, nq, nc] behind, the first of them being `home` [H]."""
    B, nc = len(more), more.shape[-1]
    chosen = torch.sort(~more, dim=-1, stable=True).indices + home[:, None, None]
    spot = count[..., None] + torch.arange(nc, device=count.device)
    index = pad(index.expand(B, -1, -1, -1), (0, nc))
    index = index.scatter(3, spot.expand(B, -1, -1, -1).long(), chosen.int())
    return count + more.sum(-1, dtype=torch.int32), index


@lru_cache
def _library() -> SimpleNamespace:
    """flash-attn-4: the call, the type of its lists, and the two mask functions."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd
    from flash_attn.cute.utils import scalar_to_ssa

    def number(x):
        return scalar_to_ssa(x, cutlass.Int32)

    def tested(key, at, head):
        """`kept`, of a head's row `window, sink, recent, rate, ..`."""
        grown = (cutlass.Int64(at) * cutlass.Int64(head[3])) >> 16
        start = at - (head[2] + cutlass.Int32(grown)) + 1
        return kept(key, number(at), number(head[0]), number(head[1]), number(start))

    @cute.jit
    def plain(batch, head, query, key, seqlen_info, tables):
        heads, offset = tables
        return tested(key, offset[batch[0]] + query[0], heads[head[0], None])

    @cute.jit
    def ring(batch, head, query, key, seqlen_info, tables):
        heads, offset, keys = tables
        b = batch[0]
        return tested(number(keys[b, key[0]]), offset[b] + query[0], heads[head[0], None])

    @cute.jit
    def columns(batch, head, query, key, seqlen_info, tables):
        heads, offset, positions, covered = tables
        b, h, i = batch[0], head[0], query[0]
        at, mine = offset[b] + i, heads[h, None]
        slot = key[0] - mine[4]
        which = cutlass.min(cutlass.max(slot, 0), covered.shape[3] - 1)
        taken = number(cutlass.Int32(covered[b, h, i // BLOCK, which]))
        position = number(
            positions[b, h, cutlass.min(cutlass.max(slot, 0), positions.shape[2] - 1)]
        )
        own, slot = tested(key, at, mine), number(slot)
        column = kept_column(position, number(at), number(mine[0]), taken)
        return (own & (slot < 0)) | (column & (slot >= 0))

    return SimpleNamespace(
        run=flash_attn_func,
        forward=_flash_attn_fwd,
        Lists=BlockSparseTensorsTorch,
        plain=plain,
        ring=ring,
        columns=columns,
    )
