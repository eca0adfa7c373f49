"""What heads would still hold, had a prompt ended and been evicted from before a row.

The prompt is taken to end at least `LATER` tokens before the row. What followed is held, in place
of what ranked lowest, so that a head never holds more than its size. So a question between the two
has no say in what is kept of the prompt, as it has none in use where it comes in a later turn.
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
EVERY = 32  # prompts end at multiples of so many tokens
FOLLOWED = 1e6  # what followed outranks all that a prompt's queries could sum up to


def keys_held(seen: Seen, evictions: Iterable[Eviction]) -> Iterator[Tensor]:
    """Keys [Hq, R, L] that steps at the R key rows find, of each eviction.

    Evictions that differ in `size` alone are ranked once.
    """
    rows, (Hkv, L) = seen.keys, seen.k.shape[1:3]
    place = torch.arange(L, device=rows.device)
    ends = (rows - LATER).clamp(min=0) // EVERY * EVERY
    followed = (place >= ends[:, None])[:, None]
    ranked: dict[Eviction, Tensor] = {}
    for eviction in evictions:
        kind = replace(eviction, size=eviction.window + 1)
        if kind not in ranked:
            ranked[kind] = torch.where(followed, FOLLOWED + place, _rank(seen, kind, ends))
        left = (rows + 1).clamp(max=eviction.size)
        best = best_keys(eviction, ranked[kind], rows + 1, left, min(eviction.size, L))
        held = best.new_zeros(len(rows), Hkv, L, dtype=torch.bool).scatter_(2, best, True)
        yield held.transpose(0, 1).repeat_interleave(seen.q.shape[1] // Hkv, 0)


def _rank(seen: Seen, eviction: Eviction, ends: Tensor) -> Tensor:
    """What keys [R, Hkv, L] are worth at the end of prompts of `ends` [R] tokens, ascending."""
    Hkv, L = seen.k.shape[1:3]
    found = torch.zeros(len(ends), Hkv, L, device=ends.device)
    score, before = found.new_zeros(Hkv, L), 0
    for end in filter(None, ends.unique().tolist()):
        first = before if eviction.adds_up else 0
        if eviction.watched is not None:
            first = max(first, end - eviction.watched)
        q, k = seen.q[:, :, first:end], seen.k[:, :, :end]
        grid = Grid(ends.new_tensor([end - first]), ends.new_tensor([end]), end - first, end)
        score = score * eviction.decay ** (end - before) if eviction.adds_up else score * 0
        score[:, :end] += eviction.scores(q, k, grid, **seen.logits.of())[0]
        found[ends == end], before = score, end
    return found
