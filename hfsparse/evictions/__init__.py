"""Evictions: which keys a kv head's cache keeps, by the attention that they got. One file a kind.

An eviction is a frozen dataclass that follows the protocol `Eviction`; it knows nothing of models,
caches or kernels.
To add one: write its file, import it here, add its row to `tests/evictions/test_evictions.py`.
"""

from hfsparse.evictions import adore, alisa, h2o, snapkv
from hfsparse.evictions.eviction import EVICTIONS, Eviction, register

__all__ = ["EVICTIONS", "Eviction", "register"]
__all__ += ["adore", "alisa", "h2o", "snapkv"]
