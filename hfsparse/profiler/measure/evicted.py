"""What heads would still hold, had a prompt ended and been evicted from before a row.

The prompt is taken to end `LATER` tokens before the row, or up to as many again, and what followed
is held. So a question between the two has no say in what is kept, as it has none in use where it
comes in a later turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hfsparse.evictions import Eviction
from hfsparse.evictions.eviction import best_keys
from hfsparse.lists import Grid
from hfsparse.profiler.measure.capture import Seen

LATER = 128  # tokens: a question and its answer


def keys_held(seen: Seen, evictions: Iterable[Eviction]) -> Iterator[Tensor]:
    """Keys [Hq, R, L] that steps at the R key rows find, of each eviction.

    Evictions that differ in `size` alone are ranked once.
    """
    rows, (Hkv, L) = seen.keys, seen.k.shape[1:3]
    ends = (rows // LATER - 1).clamp(min=0) * LATER
    ranked: dict[Eviction, dict[int, Tensor]] = {}
    for eviction in evictions:
        kind = replace(eviction, size=1)
        if kind not in ranked:
            ranked[kind] = _rank(seen, kind, [end for end in ends.unique().tolist() if end])
        held = torch.ones(Hkv, len(rows), L, dtype=torch.bool, device=rows.device)
        for end, score in ranked[kind].items():
            if end > eviction.size:
                whole, left = (ends.new_tensor([n]) for n in (end, eviction.size))
                best = best_keys(eviction, score, whole, left, eviction.size)[0]
                kept = held.new_zeros(Hkv, end).scatter_(1, best, True)
                held[:, ends == end, :end] = kept[:, None]
        yield held.repeat_interleave(seen.q.shape[1] // Hkv, 0)


def _rank(seen: Seen, eviction: Eviction, ends: list[int]) -> dict[int, Tensor]:
    """What keys [1, Hkv, end] are worth at the end of prompts of so many tokens, ascending."""
    found, before = {}, 0
    for end in ends:
        first = before if eviction.adds_up else 0
        if eviction.watched is not None:
            first = max(first, end - eviction.watched)
        q, k = seen.q[:, :, first:end], seen.k[:, :, :end]
        asked, held = (torch.tensor([n], device=k.device) for n in (end - first, end))
        grid = Grid(asked, held, end - first, end)
        found[end] = eviction.scores(q, k, grid, **seen.logits.of())
        if eviction.adds_up and before:
            found[end][..., :before] += found[before] * eviction.decay ** (end - before)
        before = end
    return found
