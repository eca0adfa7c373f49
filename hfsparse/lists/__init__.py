"""Which keys are read, as lists of blocks (prompts) and of pages (decode).

`Grid` says where queries and keys of a call lie, `BlockLists` which key blocks each query block
reads, `PageLists` which pages of a cache a step reads. Kernels take these forms and know no others.
"""

from hfsparse.lists.blocks import EDGES, BlockLists
from hfsparse.lists.grid import (
    ANY,
    FAR,
    FULL,
    PAGE,
    RATE_ONE,
    Band,
    Grid,
    HeadIndex,
    at_heads,
    default_block,
)
from hfsparse.lists.pages import UNITS, PageLists

__all__ = [
    "ANY",
    "EDGES",
    "FAR",
    "FULL",
    "PAGE",
    "RATE_ONE",
    "UNITS",
    "Band",
    "BlockLists",
    "Grid",
    "HeadIndex",
    "PageLists",
    "at_heads",
    "default_block",
]
