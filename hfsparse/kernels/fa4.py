"""Attention over BlockLists by flash-attn-4 on Hopper: the fastest form of `reference.prefill`.

    fa4.why_not(need) or fa4.prefill(q, k, v, lists, kv_heads, scale=scale)

Full and partial blocks are flash-attn-4's two block lists; its mask function tests the pairs of
partial blocks by small tables (`Call`). Columns are gathered into key blocks behind the row's
own, a section for each q head of a group, so that one softmax serves all. It compiles once per
plan shape (`compiled`), never per length. Bound by FLOPs; `benchmarks/prefill.py` measures it.

Other GPUs are refused: on compute capability 8.x flash-attn-4 ignores block lists without a word,
and Blackwell is untested. flash-attn-4 is imported when it is first needed.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from hfsparse.lists import FAR, Band, BlockLists, Grid

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

BLOCK = 128  # tokens in a block of queries or keys: the only size that runs at full speed
CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
WIDEST, WIDEST_DENSE = 128, 256  # head and value dim; beyond 128 its key tile is not a block
NEVER = (1 << 31) - 1  # the position of a key that no query reads


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
    """Kernels that flash-attn-4 has compiled, or read from disk, in this process."""
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

    Arguments as `reference.prefill` has them. q heads in the order of their kv heads cost no copy
    of keys and values; nor do prompts of one length. A `kv_heads` seen before costs no wait for the
    GPU, and a grid seen before no tables.
    """
    grid = lists.grid
    if q.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    k, v, group = grouped(k, v, _of(kv_heads, Tensor.tolist))
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
        mask_mod=fa4.tested if call.covered is None else fa4.tested_columns,
        aux_tensors=[t for t in call[6:] if t is not None],
        block_sparse_tensors=blocks,
        pack_gqa=False,
    )[0].transpose(1, 2)
    return out.masked_fill_(grid.query_pos()[:, None, :, None] < 0, 0) if grid.padded else out


class Call(NamedTuple):
    """What flash-attn-4 is given besides q; N key slots: the row's own, then those of columns.

    A pair of a partial block counts if `kept` says so of its query's, its key's and its head's
    numbers.
    """

    k: Tensor  # [B, Hkv, N, D]
    v: Tensor
    full_count: Tensor  # [B|1, H, nq] int32
    full_index: Tensor  # [B|1, H, nq, width] int32, ascending
    part_count: Tensor
    part_index: Tensor
    heads: Tensor  # [H, 3] int32: row of `keys`, row of `queries`, sink
    queries: Tensor  # [B, bands, 3, nq * BLOCK] int32: position, oldest key, start of the band
    keys: Tensor  # [B, Hkv|1, N] int32: position, NEVER in dead slots
    sections: Tensor | None = None  # [H] int32: first slot of each head's columns
    covered: Tensor | None = None  # [B, H, nq, n] uint8: a block of the head holds the column


def kept(key, position, oldest, start, sink):
    """Causality, window and band, of integers or of tensors of them."""
    return (key <= position) & (key >= oldest) & ((key < sink) | (key >= start))


def kept_column(key, position, oldest, covered):
    """Causality and window of a column that no block of the head holds yet."""
    return (key <= position) & (key >= oldest) & (covered == 0)


def grouped(k: Tensor, v: Tensor, kv_heads: list[int]) -> tuple[Tensor, Tensor, int]:
    """k and v such that q head h reads kv head h // group; copies unless neighbours share one."""
    low, high = kv_heads[0], kv_heads[-1] + 1
    group = len(kv_heads) // max(high - low, 1)
    if kv_heads == [low + h // max(group, 1) for h in range(len(kv_heads))]:
        return k[:, low:high], v[:, low:high], group
    return k[:, kv_heads], v[:, kv_heads], 1


def prepare(k: Tensor, v: Tensor, lists: BlockLists, group: int) -> Call:
    """Lists, keys and tables in flash-attn-4's form; q head h reads kv head h // group."""
    grid, H, device = lists.grid, lists.heads, str(k.device)
    # Perhaps some slot holds no key, and 0 * NaN would be NaN.
    dead = grid.padded or grid.past or grid.key_first is not None
    own = _of(grid, _keys)
    queries = _of(grid, _queries, tuple(dict.fromkeys(lists.bands)))
    blocks = (  # no list is wider than the row has blocks
        *(lists.full_count, lists.full_index[..., : grid.nk]),
        *(lists.part_count, lists.part_index[..., : grid.nk]),
    )
    if dead:
        v = v.masked_fill((own[:, :, : v.shape[2]] == NEVER)[..., None], 0)
    if lists.columns is None or lists.columns.shape[-1] == 0:
        return Call(k, v, *blocks, _heads(lists.bands, H, device), queries, own)
    B, n, first = len(k), lists.columns.shape[-1], grid.nk * BLOCK
    columns = pad(lists.columns.expand(B, -1, -1), (0, -n % BLOCK), value=FAR)  # [B, H, each]
    each = columns.shape[-1]
    behind = columns.unflatten(1, (-1, group)).flatten(2)  # [B, Hkv, group * each]
    none = behind >= grid.k_len[:, None, None]
    index = behind.masked_fill(none, 0)[..., None]
    k, v = (_appended(t, index, first) for t in (k, v))
    v[:, :, first:].masked_fill_(none[..., None], 0)
    keys = torch.cat([own.expand(-1, k.shape[1], -1), behind.masked_fill(none, NEVER).int()], 2)
    sections = _sections(H, group, first, each, device)
    home = sections // BLOCK
    covered = lists.covered.expand(B, -1, -1, -1)
    some, every = _column_blocks(grid, columns.unflatten(2, (-1, BLOCK)), covered)
    covered = covered.view(torch.uint8)
    covered.__leading_dim__ = 3  # also where it is one column wide
    return Call(
        *(k, v),
        *_listed(*blocks[:2], every, home),
        *_listed(*blocks[2:], some & ~every, home),
        *(_heads(lists.bands, group, device), queries, keys, sections, covered),
    )


def _of(thing, make, *args):
    """`make(thing, *args)`, kept as long as the grid or tensor `thing` lives: layers share it."""
    made = _MADE.setdefault(thing, {})
    if (make, args) not in made:
        made[make, args] = make(thing, *args)
    return made[make, args]


_MADE = WeakIdKeyDictionary()


def _keys(grid: Grid) -> Tensor:
    """[B, 1, nk * BLOCK]: `Call.keys` of the rows' own slots."""
    return torch.where(grid.key_pos < 0, NEVER, grid.key_pos).int()[:, None]


def _queries(grid: Grid, bands: tuple[Band, ...]) -> Tensor:
    """`Call.queries`, of bands that differ."""
    rows = torch.arange(grid.nq * BLOCK, device=grid.q_len.device)
    at = grid.query_pos(rows)
    oldest = torch.zeros_like(at) if grid.window is None else at - grid.window + 1
    tables = [torch.stack([at, oldest, band.start(at)], 1) for band in bands]
    return torch.stack(tables, 1).clamp(min=-1).int()


@lru_cache(256)
def _heads(bands: tuple[Band, ...], group: int, device: str) -> Tensor:
    """`Call.heads`; kept, so that a call copies nothing to the GPU."""
    order = list(dict.fromkeys(bands))
    rows = [(h // group, order.index(band), band.sink) for h, band in enumerate(bands)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(256)
def _sections(heads: int, group: int, first: int, each: int, device: str) -> Tensor:
    """`Call.sections`."""
    slots = [first + h % group * each for h in range(heads)]
    return torch.tensor(slots, dtype=torch.int32, device=device)


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


def number(x):
    """An integer as a register of flash-attn-4's."""
    from cutlass import Int32
    from flash_attn.cute.utils import scalar_to_ssa

    return scalar_to_ssa(x, Int32)


@lru_cache
def _library() -> SimpleNamespace:
    """flash-attn-4: the call, the type of its lists, and the two mask functions."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    @cute.jit
    def tested(batch, head, query, key, seqlen_info, tables):
        heads, queries, keys = tables
        b, h, i, j = batch[0], head[0], query[0], key[0]
        row = queries[b, heads[h, 1], None, i]
        position = number(keys[b, heads[h, 0], j])
        return kept(position, number(row[0]), number(row[1]), number(row[2]), number(heads[h, 2]))

    @cute.jit
    def tested_columns(batch, head, query, key, seqlen_info, tables):
        heads, queries, keys, sections, covered = tables
        b, h, i, j = batch[0], head[0], query[0], key[0]
        row = queries[b, heads[h, 1], None, i]
        position = number(keys[b, heads[h, 0], j])
        at, oldest = number(row[0]), number(row[1])
        own = kept(position, at, oldest, number(row[2]), number(heads[h, 2]))
        slot = j - sections[h]
        column = cutlass.min(cutlass.max(slot, 0), covered.shape[3] - 1)
        taken = number(cutlass.Int32(covered[b, h, i // BLOCK, column]))
        return (own & (number(slot) < 0)) | (
            kept_column(position, at, oldest, taken) & (number(slot) >= 0)
        )

    # Part of the key of kernels kept on disk (FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1), where it
    # would see the two functions, but not what they call.
    source = sha256(Path(__file__).read_bytes()).hexdigest()
    for mask in (tested, tested_columns):
        mask.__cute_hash__ = f"{mask.__name__} {source}"
    return SimpleNamespace(
        run=flash_attn_func,
        forward=_flash_attn_fwd,
        Lists=BlockSparseTensorsTorch,
        tested=tested,
        tested_columns=tested_columns,
    )
