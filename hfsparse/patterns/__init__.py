"""Prefill patterns: which key blocks each query block reads. One file a pattern.

A pattern is a frozen dataclass of its parameters with one method,
`lists(q, k, grid, scale) -> BlockLists`; it knows nothing of models, caches or kernels.
To add one: write its file, import it here, add its row to `tests/patterns/matrix.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.precision import without_autocast

PATTERNS: dict[str, type] = {}
OWN = 3  # blocks kept in any case, at most: the row's first and two that hold the block's queries


class Pattern(Protocol):
    """What the patcher and the profiler ask of a pattern."""

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`: post-RoPE, row-relative."""
        ...


def register(kind: str) -> Callable[[type], type]:
    """Make a pattern known to plans under `kind:`."""

    def add(cls: type) -> type:
        cls.kind, cls.lists = kind, without_autocast(cls.lists)
        PATTERNS[kind] = cls
        return cls

    return add


from hfsparse.patterns import antidiagonal, block_topk, streaming, vertical_slash  # noqa: E402, F401
