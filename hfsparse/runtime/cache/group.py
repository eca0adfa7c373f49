"""Which kv heads share a store."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from hfsparse.evictions import Eviction
from hfsparse.lists import FULL, Band
from hfsparse.lists.packed import Bits
from hfsparse.selectors import Selector
from hfsparse.selectors.means import unit_means


@dataclass(frozen=True)
class Group:
    """The kv heads of a layer that share one way of being kept and read."""

    heads: tuple[int, ...]
    band: Band = FULL  # FULL: every key is kept
    selector: Selector | None = None  # bound; chooses pages for decode, its store keeps its index
    reuses: tuple[int, ...] = ()  # whose choice these heads read, in the last group that chose
    eviction: Eviction | None = None  # says which keys are kept; None: the band does
    bits: Bits = 16  # of a number in full pages; 16: it has the model's own type
    # Of keys in host memory, the share of a row's units that the GPU holds; 0: it holds every key.
    hot: float = 0.0
    rank: int = 0  # of latents: their first so many dims are the values, too (MLA)
    reads: Band = FULL  # of a full store: a step reads the pages that hold some key of this band

    @cached_property
    def index_shapes(self) -> dict[tuple, dict[str, Any]]:
        """Where stores note how large a page's index is, for keys of a width and type."""
        return {}

    @property
    def chosen(self) -> bool:
        """Whether a step reads pages that were chosen for these heads."""
        return bool(self.selector or self.reuses) or self.reads != FULL

    @property
    def means(self) -> bool:
        """Whether a step reads what these heads leave out by its means."""
        return self.selector is not None and self.selector.budget.means

    def index_of(self, keys: Tensor, values: Tensor, real: Tensor) -> dict[str, Tensor]:
        """What is kept of pages of keys and values `[B, H, n, PAGE, D]`, of which some are real."""
        found = self.selector.summarise(keys, real)
        if self.means:
            found = found | unit_means(keys, values, real, self.selector.budget.unit)
        return found
