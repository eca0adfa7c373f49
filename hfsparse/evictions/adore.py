"""ADORE's token release: each step lets go of what its query attends to least (arXiv 2407.02328).

The paper trains a controller that foretells these weights, and rebuilds keys that it had released.
Here the newest query's own weights rank, which are known once it has read, and released is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from hfsparse.evictions.eviction import register
from hfsparse.evictions.summed import Summed


@register("adore")
@dataclass(frozen=True)
class Adore(Summed):
    """Nothing is remembered of earlier queries, but what they have left."""

    decay = 0.0
    watched = 1
