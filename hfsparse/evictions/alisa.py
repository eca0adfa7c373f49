"""ALISA's sparse window attention: keep what lately was attended to (arXiv 2403.17312).

Its local sum is over the last queries, so many as there are newest keys that stay in any case. To
take a query out of a sum again, its weights would have to be kept, of every key. Here each query
counts for a little less than the next, by 1 - 1 / window, which adds up to as many.
"""

from __future__ import annotations

from dataclasses import dataclass

from hfsparse.evictions.eviction import register
from hfsparse.evictions.summed import Summed

WINDOWS = 8  # of a prompt's queries that are looked at: those before count for e^-8 and less


@register("alisa")
@dataclass(frozen=True)
class Alisa(Summed):
    """window: newest keys, which stay in any case, and queries that the sum is of."""

    @property
    def decay(self) -> float:
        return 1 - 1 / self.window

    @property
    def watched(self) -> int:
        return WINDOWS * self.window
