"""Kernels, and which of them serves what: `pick(TABLES.prefill, Need.of(q, k, v)).run(...)`.

`table.py` says what the rows of each table take.
"""

from hfsparse.kernels.need import Kernel, Need
from hfsparse.kernels.table import (
    APPEND,
    COUNT,
    DECODE,
    ESTIMATE,
    FETCH,
    GATES,
    NORMS,
    PREFILL,
    PRODUCTS,
    QUANTISED,
    ROPES,
    SELECT,
    TABLES,
    Tables,
    able,
    pick,
)

__all__ = [
    "APPEND",
    "COUNT",
    "DECODE",
    "ESTIMATE",
    "FETCH",
    "GATES",
    "NORMS",
    "PREFILL",
    "PRODUCTS",
    "QUANTISED",
    "ROPES",
    "SELECT",
    "TABLES",
    "Kernel",
    "Need",
    "Tables",
    "able",
    "pick",
]
