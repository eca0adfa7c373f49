"""Streaming attention with a backward on CUDA: FlexAttention (arXiv 2412.05496) over block masks.

The truth is `reference.prefill` over `BlockLists.of(grid, heads, band=band)`. Compiled once for
each length. Bound by FLOPs; its speed was not measured.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hfsparse.lists import Band, Grid

BLOCK = 128
FORMS = 64  # compiled at most, each length with and without a backward; more are an error


def streaming(q: Tensor, k: Tensor, v: Tensor, band: Band, *, scale: float) -> Tensor:
    """Attention `[B, Hq, L, Dv]` of whole prompts q `[B, Hq, L, D]` over k, v `[B, Hkv, L, D]`.

    Uncompiled on a CPU, where it has no backward.
    """
    run = _compiled() if q.is_cuda else flex_attention
    mask = block_mask(band, q.shape[2], q.device)
    with torch._dynamo.config.patch(recompile_limit=FORMS):
        return run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@lru_cache(16)
def block_mask(band: Band, length: int, device: torch.device) -> BlockMask:
    """The blocks that a band reads in part and in full, the same for every head."""

    def kept(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((key < band.sink) | (key >= band.start(query)))

    with torch.inference_mode(False):
        grid = Grid.causal(1, length, BLOCK, device)
        some, every = grid.reach(band)
        every &= (grid.q_rows == BLOCK)[..., None]
        lists = []  # counts and indices, kept ones first, of blocks read in part and in full
        for blocks in (some & ~every, every):
            order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
            lists += [t[:, None].int() for t in (blocks.sum(-1), order)]
        if device.type == "cuda":  # it is kept, and other streams may read it
            torch.cuda.current_stream(device).synchronize()
        return BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=kept, seq_lengths=(length, length)
        )
