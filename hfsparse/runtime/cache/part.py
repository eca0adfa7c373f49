"""A layer's cache of which each rank of a group holds a part (context parallel)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hfsparse.errors import CacheError
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import Places, Table
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.held import Held
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.cache.ring import Ring


class PartLayer(CacheLayer):
    """Full stores hold `own` tokens of each row, those of this rank, one behind another as if they
    were a row; rings, which are small, are whole on every rank.

    `rows` and `seen` are of whole rows, as in any layer.
    """

    is_croppable = False

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.own = 0
        self.tables = [Table(self.table.at) for _ in self.stores]  # kernels read store by store

    def hold(self, tokens: int, own: int, newest: bool) -> None:
        """A prompt of so many tokens has begun, of which `own` are this rank's. newest: whether the
        tokens that follow are, too."""
        self.seen, self.rows, self.own = tokens, [tokens] * len(self.rows), own
        for store in self.stores:
            if not store.drops:
                later = max(store.reserve - tokens, 0)
                store.reserve = own + (later if newest else 0)

    def whole(self) -> Lengths:
        """Of the rows, all new: what a ring is told of a prompt."""
        return Lengths([0] * len(self.rows), self.rows, self.seen)

    def part(self) -> Lengths:
        """Of the rank's own tokens, all new."""
        return Lengths([0] * len(self.rows), [self.own] * len(self.rows), self.own)

    def places_of(self, store: Full | Ring) -> Places:
        """Where one store's keys lie, its heads numbered from 0."""
        place, table = store.place(), self.tables[self.stores.index(store)]
        return table.places([place._replace(heads=tuple(range(len(place.heads))))])

    def held(self) -> Held:
        found = super().held()
        lacks = [0 if store.drops else self.seen - self.own for store in self.stores]
        stores = [
            (*told[:3], lack, *told[4:]) for told, lack in zip(found.stores, lacks, strict=True)
        ]
        return replace(found, stores=stores)

    def state(self) -> dict[str, Any]:
        stores = [
            store.state(self.rows if store.drops else [self.own] * len(self.rows))
            for store in self.stores
        ]
        own = {"seen": self.seen, "expected": 0, "rows": [*self.rows], "own": self.own}
        return {**own, "stores": stores}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.own = state["own"]

    def take_back(self, drop: int) -> None:
        raise CacheError(
            "tokens can't be taken back from a cache whose parts lie on several ranks (context "
            "parallel): read the prompt again with a new cache"
        )

    def _history(self, part) -> None:
        if self.is_initialized:
            raise CacheError(
                "this cache can't be read or rebuilt as transformers' own: its parts lie on "
                "several ranks (context parallel). Go on with it as it is"
            )
