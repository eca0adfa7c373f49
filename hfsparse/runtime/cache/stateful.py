"""The cache of a layer that has attention and a state of its own (as Falcon-H1's and Zaya's)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hfsparse.errors import CacheError
from hfsparse.runtime.cache.layer import CacheLayer

try:
    from transformers.cache_utils import LinearAttentionLayer
except ImportError:  # transformers below 5: such models keep a cache of their own
    LinearAttentionLayer = object


def state_bytes(layer: object) -> int:
    """Bytes of the states that a cache's layer keeps beside keys and values."""
    found = (getattr(layer, name, None) or {} for name in ("conv_states", "recurrent_states"))
    return sum(t.nbytes for states in found for t in states.values() if t is not None)


def linear_state(layer: Any) -> dict[str, Any]:
    """The states that a layer keeps, and what it notes of each, in the form of `Store.state`."""
    held = {name: [*x.values()] for name, x in vars(layer).items() if isinstance(x, dict)}
    return {**held, "record_past": getattr(layer, "record_past", False)}


def load_linear_state(layer: Any, state: dict[str, Any]) -> None:
    """Have a new layer go on from what `linear_state` told; CacheError in another form than its."""
    if {*state} != {*linear_state(layer)}:
        raise CacheError(
            "the states of its linear layers are in another form than this transformers keeps "
            "them: load it with the version that saved it, or read the prompt again"
        )
    tables = {name: values for name, values in state.items() if isinstance(values, list)}
    for name, values in tables.items():
        setattr(layer, name, dict(enumerate(values)))
    layer.record_past = state["record_past"]
    first = next(t for values in tables.values() for t in values if isinstance(t, Tensor))
    layer.dtype, layer.device = first.dtype, first.device


class StatefulCacheLayer(CacheLayer, LinearAttentionLayer):
    """Keys and values as in any layer of ours; the state as transformers keeps it."""

    def __init__(self, *given):
        LinearAttentionLayer.__init__(self)
        CacheLayer.__init__(self, *given)

    def lazy_initialization(self, *key_values: Tensor, **states) -> None:
        """Of keys and values, or of what a state is made of."""
        kind = CacheLayer if key_values else LinearAttentionLayer
        kind.lazy_initialization(self, *key_values, **states)

    @property
    def is_croppable(self) -> bool:
        return LinearAttentionLayer.is_croppable.fget(self)

    def crop(self, length) -> None:
        LinearAttentionLayer.crop(self, length)
        CacheLayer.crop(self, length)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        CacheLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        CacheLayer.reorder_cache(self, beam_idx)

    def state(self) -> dict[str, Any]:
        return {**CacheLayer.state(self), "linear": linear_state(self)}

    def load(self, state: dict[str, Any]) -> None:
        load_linear_state(self, state["linear"])
        CacheLayer.load(self, state)
