"""The cache of a layer that has attention and a state of its own (as Falcon-H1's and Zaya's)."""

from __future__ import annotations

from torch import Tensor

from hfsparse.runtime.cache.layer import CacheLayer

try:
    from transformers.cache_utils import LinearAttentionLayer
except ImportError:  # transformers below 5: such models keep a cache of their own
    LinearAttentionLayer = object


def state_bytes(layer: object) -> int:
    """Bytes of the states that a cache's layer keeps beside keys and values."""
    found = (getattr(layer, name, None) or {} for name in ("conv_states", "recurrent_states"))
    return sum(t.nbytes for states in found for t in states.values() if t is not None)


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
