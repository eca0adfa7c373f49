"""Prefill patterns: which key blocks each query block reads. One file a pattern.

A pattern is a frozen dataclass of its parameters with one method,
`lists(q, k, grid, scale) -> BlockLists`; it knows nothing of models, caches or kernels.
To add one: write its file, import it here, add its row to `tests/patterns/matrix.py`.
"""

from hfsparse.patterns import (
    antidiagonal,
    block_topk,
    energy,
    flexprefill,
    hip,
    sample,
    sparge,
    streaming,
    strided,
    vertical_slash,
)
from hfsparse.patterns.pattern import OWN, PATTERNS, Pattern, register

__all__ = ["OWN", "PATTERNS", "Pattern", "register"]
__all__ += ["antidiagonal", "block_topk", "energy", "flexprefill", "hip", "sample"]
__all__ += ["sparge", "streaming", "strided", "vertical_slash"]
