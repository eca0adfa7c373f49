"""Prompts and chunks: each head's queries go to a pattern and a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from hfsparse import kernels
from hfsparse.lists import FULL, BlockLists, Grid, default_block
from hfsparse.runtime.cache.ring import Ring
from hfsparse.runtime.rows import _alike, _empty, _kv_of, _put, _q_heads, _some


def _prefill(call, plan, layer, q, k, v, past, new, logits) -> Tensor:
    """A prompt, or a chunk behind a past: patterns choose the blocks. Returns `[B, Hq, Q, Dv]`."""
    Q, ratio = q.shape[2], q.shape[1] // k.shape[1]
    total = [p + n for p, n in zip(past, new, strict=True)]
    whole = total  # tokens of each row's whole prompt, as far as it is known
    if layer is not None and layer.expected:
        whole = [max(t, layer.expected - layer.seen + t) for t in total]
    window = plan.window if plan.window is not None and max(total) > plan.window else None
    block = default_block(max(whole), q.device)
    grid = call.once(_grid, tuple(past), tuple(new), Q, block, window, q.device)
    # What a row reads depends on its own length only, never on its neighbours'.
    kinds = [
        (n < plan.below.prefill, n < plan.below.cache, default_block(n, q.device)) for n in whole
    ]
    short, kept, _ = kinds[0]
    full = not any(plan.prefill) or (short and (kept or not plan.rings))
    easy = grid.window is None and not (grid.past or grid.padded or logits.special)
    if full and easy and len(set(kinds)) == 1 and (short or plan.skip is None):
        return _whole(plan, layer, q, k, v, past, new, grid, logits.scale)
    out = None
    for kv_heads, keys, values, spot in _segments(plan, layer, k, v, past, new, grid):
        heads = _q_heads(kv_heads, ratio)
        own = plan.at(heads, q.device)
        for (short, kept, block), rows in _alike(kinds, q.device):
            patterns = [
                None if (kept if h // ratio in plan.rings else short) else plan.prefill[h]
                for h in heads
            ]
            at = range(len(new)) if rows is None else rows.tolist()
            work = _work(tuple((past[b], new[b]) for b in at), block, window)
            place = spot if rows is None else spot.take(rows)
            if place.key_first is None:
                place = place if place.block == block else replace(place, block=block)
            else:  # a window layer's ring: its slots are no place for patterns that rank them
                patterns = [p if hasattr(p, "band") else None for p in patterns]
            part = _some(rows, q[:, own], keys, values)
            skip = None if short else plan.skip
            made = _patterned(plan, *part, place, heads, patterns, logits, work, skip)
            if rows is None and len(heads) == q.shape[1]:
                out = made
                continue
            out = _empty(q, v) if out is None else out
            _put(out, rows, own, made)
    return out


def _whole(plan, layer, q, k, v, past, new, grid, scale) -> Tensor:
    """A prompt that no head drops anything of: the short way, since the host's time counts here."""
    for store in () if layer is None else layer.stores:
        at = plan.at(store.group.heads, k.device)
        store.append(k[:, at], v[:, at], past, new)
    work = _work(tuple(zip(past, new, strict=True)), grid.block, None)
    plan.counts.add_whole(range(q.shape[1]), work)
    need = kernels.Need.of(q, k, v, block=grid.block, tokens=grid.Sk)
    return kernels.pick(kernels.PREFILL, need).run(q, k, v, grid, scale=scale)


def _grid(past, new, Q, block, window, device) -> Grid:
    total = [p + n for p, n in zip(past, new, strict=True)]
    q_len, k_len = (_lengths(t, device) for t in (new, total))
    return Grid(q_len, k_len, Q, Q, block, window, padded=min(new) < Q, past=any(past))


def _lengths(rows: Sequence[int], device: torch.device) -> Tensor:
    """Rows' lengths `[B]` on a device; the host waits for no copy."""
    if len(set(rows)) == 1:
        return torch.full((len(rows),), rows[0], device=device)
    lengths = torch.tensor(rows, device="cpu")
    lengths = lengths.pin_memory() if device.type == "cuda" else lengths
    return lengths.to(device, non_blocking=True)


@lru_cache(64)
def _work(rows: tuple[tuple[int, int], ...], block: int, window: int | None) -> tuple[int, int]:
    """Pairs and blocks of dense attention, given each row's past and new tokens."""

    def seen(tokens: int) -> int:
        """Pairs of a row's first tokens."""
        near = tokens if window is None else min(tokens, window)
        return near * (near + 1) // 2 + (tokens - near) * near

    pairs = blocks = 0
    for past, new in rows:
        pairs += seen(past + new) - seen(past)
        for first in range(past, past + new, block):
            last = min(first + block, past + new) - 1
            low = 0 if window is None else max(first - window + 1, 0)
            blocks += last // block - low // block + 1
    return pairs, blocks


def _segments(plan, layer, k, v, past, new, grid) -> Iterator[tuple]:
    """Append a chunk to the cache; yield (kv heads, keys, values, grid) for it to attend to."""
    if layer is None or not any(past):
        yield tuple(range(k.shape[1])), k, v, grid
    for store in () if layer is None else layer.stores:
        heads = store.group.heads
        at = plan.at(heads, k.device)
        chunk = k[:, at], v[:, at]
        if isinstance(store, Ring):
            if any(past):
                yield heads, *store.with_chunk(*chunk, past, new, grid)
            store.append(*chunk, past, new)
        else:
            store.append(*chunk, past, new)
            if any(past):
                total = max(layer.rows)
                yield heads, *store.view(total), replace(grid, Sk=total)


def _patterned(plan, q, k, v, grid, heads, patterns, logits, work, skip) -> Tensor:
    """Attention of some q heads `[B, H, Q, D]`, each by its pattern (None: full)."""
    ratio, plain = q.shape[1] // k.shape[1], not (grid.padded or grid.past)
    need = kernels.Need.of(
        *(q, k, v, logits.s_aux),
        block=grid.block,
        tokens=grid.Sk,
        plain=plain,
        skip=skip is not None,
    )
    # Behind a past sdpa builds masks, a few queries' at a time: a list of every block is faster.
    easy = grid.window is None and not (logits.special or (grid.past and kernels.fused(need)))
    whole, parts, order = [], [], []

    def part(at: list[int]) -> tuple[Tensor, slice | Tensor]:
        """These heads of q, and the kv heads that they read."""
        return q[:, plan.at(at, q.device)], plan.at(_kv_of(tuple(at), ratio), q.device)

    for pattern in dict.fromkeys(patterns):
        at = [i for i, other in enumerate(patterns) if other == pattern]
        if pattern is None and easy and skip is None:
            whole = at
        elif pattern is None:
            parts.append(grid.banded(FULL, len(at)))
            order += at
        else:
            some, kv = part(at)
            parts.append(kernels.choose(pattern, some, k[:, kv], grid, logits.scale))
            order += at

    def dense(at: list[int]) -> Tensor:
        some, kv = part(at)
        plan.counts.add_whole([heads[i] for i in at], work)
        kernel = kernels.pick(kernels.PREFILL, need)
        return kernel.run(some, k[:, kv], v[:, kv], grid, scale=logits.scale)

    def listed(at: list[int]) -> Tensor:
        lists, q_heads = BlockLists.cat(parts).in_order(order, plan.at), [heads[i] for i in at]
        own = plan.at(q_heads, q.device)
        plan.counts.add_lists(q_heads, own, lists, work)
        kernel = kernels.pick(kernels.PREFILL, replace(need, lists=True, logits=logits.special))
        some, kv = q[:, plan.at(at, q.device)], plan.at.tensor([i // ratio for i in at], q.device)
        if skip is None:
            return kernel.run(some, k, v, lists, kv, **logits.of(own))
        tiles = torch.zeros(len(at), 2, dtype=torch.int64, device=q.device)
        skipping = {"skip": skip, "skipped": tiles}
        made = kernel.run(some, k, v, lists, kv, **logits.of(own), **skipping)
        plan.counts.add_skipped(own, tiles)
        return made

    if not order:
        return dense(whole)
    if not whole:
        return listed(sorted(order))
    out = _empty(q, v)
    for at, run in ((whole, dense), (sorted(order), listed)):
        out[:, plan.at(at, q.device)] = run(at)
    return out
