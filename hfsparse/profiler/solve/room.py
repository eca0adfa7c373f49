"""A budget of cache in GiB, as a share of what the layers that may be sparse hold."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.models.layers import layer_shapes
from hfsparse.patcher.figures import fill_caches
from hfsparse.plan import ModelId, Plan

GIB = 1 << 30


@dataclass(frozen=True)
class Room:
    """Bytes that the cache of one row takes without a plan, in the model's own type."""

    tokens: int
    free: int  # of the layers that may be sparse
    rest: int  # of all others, whatever the plan

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: int, together: bool = False) -> Room:
        """That of a row of so many tokens, under a method that chooses for layers that share keys
        together, or for none of them."""
        shapes, full = layer_shapes(model), Plan.full(ModelId.of(model))
        free = rest = 0
        for own, layer in fill_caches(model.config, full, tokens, itemsize=model.dtype.itemsize):
            if layer is None:
                continue
            if shapes[own.index].may_be_sparse(together):
                free += layer.dense_bytes()
            else:
                rest += layer.bytes()
        return cls(tokens, free, rest)

    def share(self, gib: float) -> float:
        """What is left of so many GiB for the layers that may be sparse, as a share of `free`."""
        if (left := gib * GIB - self.rest) <= 0:
            raise UsageError(
                f"cache_gib is {gib:g}: at {self.tokens} tokens the layers that no plan changes "
                f"hold {self.rest / GIB:.3g} GiB by themselves. Give more, or a smaller at"
            )
        return left / self.free

    def gib(self, share: float) -> float:
        """What the whole cache takes where the layers that may be sparse keep a share."""
        return (self.rest + share * self.free) / GIB
