"""What ranks that share a prompt's tokens send one another in a layer: keys, and what they read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from hfsparse.kernels.merge import Merged
from hfsparse.lists import HeadIndex
from hfsparse.runtime.parts import Runs

Wanted = Sequence[tuple[tuple[int, ...], Sequence[Runs]]]  # kv heads; by rank, what it wants


def exchange(
    group: Any,
    key_values: Sequence[Tensor],
    kept: Sequence[Runs],
    wanted: Wanted,
    tokens: int,
    index: HeadIndex,
) -> list[Tensor]:
    """Keys and values `[B, H, tokens, D]` at the positions that this rank wants, 0 elsewhere.

    key_values `[B, H, n, D]`: at those that it keeps; kept: which ranks keep. No rank is sent what
    it does not want, or has.
    """
    rank, ranks = distributed.get_rank(group), range(distributed.get_world_size(group))
    made = [t.new_zeros(*t.shape[:2], tokens, t.shape[3]) for t in key_values]
    device, sent, places = made[0].device, [], []
    for other in ranks:
        meet = [*_meet(kept[rank], wanted, other)]
        parts = [
            t[:, index(heads, device), slot : slot + end - first]
            for heads, first, end, slot in meet
            for t in key_values
        ]
        own = [
            (into, heads, first, end)
            for heads, first, end, _ in _meet(kept[other], wanted, rank)
            for into in made
        ]
        if other == rank:
            for (into, heads, first, end), part in zip(own, parts, strict=True):
                into[:, index(heads, device), first:end] = part
            parts, own = [], []
        sent.append(parts)
        places.append(own)
    flat = [part.flatten() for parts in sent for part in parts]
    flat = torch.cat(flat) if flat else made[0].new_empty(0)
    sizes = [[_size(*place) for place in own] for own in places]
    got = flat.new_empty(sum(map(sum, sizes)))
    outgoing = [sum(part.numel() for part in parts) for parts in sent]
    distributed.all_to_all_single(got, flat, [*map(sum, sizes)], outgoing, group=group)
    parts = iter(got.split([size for own in sizes for size in own]))
    for into, heads, first, end in (place for own in places for place in own):
        shape = len(into), len(heads), end - first, into.shape[3]
        into[:, index(heads, device), first:end] = next(parts).view(shape)
    return made


def _meet(kept: Runs, wanted: Wanted, rank: int) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """What a rank wants of what another keeps: heads, first position, end, slot of the first."""
    for heads, by_rank in wanted:
        for low, high in by_rank[rank]:
            slot = 0
            for start, stop in kept:
                first, end = max(low, start), min(high, stop)
                if first < end:
                    yield heads, first, end, slot + first - start
                slot += stop - start


def _size(into: Tensor, heads: tuple[int, ...], first: int, end: int) -> int:
    return len(into) * len(heads) * (end - first) * into.shape[3]


def merge(group: Any, out: Tensor, lse: Tensor) -> Tensor:
    """Attention `[B, H, Q, Dv]` over the keys of all ranks; out, lse `[B, H, Q]`: over one's own.

    The same bits on every rank.
    """
    own = torch.cat([out, lse[..., None].view(out.dtype)], -1)
    got = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(got, own, group=group)
    width = out.shape[-1]
    parts = [(t[..., :width], t[..., width:].contiguous().view(lse.dtype)[..., 0]) for t in got]
    merged = Merged(*parts[0])
    for part in parts[1:]:
        merged.add(*part)
    return merged.out.to(out.dtype)
