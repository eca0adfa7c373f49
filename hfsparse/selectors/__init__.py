"""Decode selectors: which pages of a kv head's cache a decode step reads. One file a selector.

A selector is a frozen dataclass of its parameters with one method,
`pages(q, low, high, length, scale) -> PageLists`; it knows nothing of models, caches or kernels.
`reuse` has none: it stands for what another layer's selector chose.
"""

from __future__ import annotations

from collections.abc import Callable

from hfsparse.precision import without_autocast

SELECTORS: dict[str, type] = {}


def register(kind: str) -> Callable[[type], type]:
    """Make a selector known to plans under `kind:`."""

    def add(cls: type) -> type:
        cls.kind = kind
        if hasattr(cls, "pages"):
            cls.pages = without_autocast(cls.pages)
        SELECTORS[kind] = cls
        return cls

    return add


from hfsparse.selectors import quest, reuse  # noqa: E402, F401
