"""H2O: keep the heavy hitters, the keys that all queries so far attended to (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

from hfsparse.evictions.eviction import register
from hfsparse.evictions.summed import Summed


@register("h2o")
@dataclass(frozen=True)
class H2O(Summed):
    """Each query counts as much as any other, however long ago it was."""
