"""Decode selectors: which pages of a kv head's cache a decode step reads. One file a selector.

A selector is a frozen dataclass of its parameters that follows the protocol `Selector`, which says
all there is to know; it knows nothing of models, caches or kernels. `reuse` is a word alone: it
stands for what another layer's selector chose.
To add one: write its file, import it here, add its row to `tests/patterns/matrix.py`.
"""

from hfsparse.selectors import centroids, channels, landmarks, lowrank, lsh, quest, reuse
from hfsparse.selectors.budget import Budget
from hfsparse.selectors.selector import (
    SELECTORS,
    Calibrated,
    Segmented,
    Selector,
    part_of,
    register,
    segment_of,
    tokens_built,
)
from hfsparse.selectors.table import DeviceTensor

__all__ = ["SELECTORS", "Budget", "Calibrated", "DeviceTensor", "Segmented", "Selector"]
__all__ += ["part_of", "register", "segment_of", "tokens_built"]
__all__ += ["centroids", "channels", "landmarks", "lowrank", "lsh", "quest", "reuse"]
