"""What a cache keeps whole, and in how many bits: `full8: {kind: full, bits: 8}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hfsparse.lists.packed import BITS, Bits
from hfsparse.registry import require


@dataclass(frozen=True)
class Full:
    """Every key and value; bits: of each number, 8, 4 or fp8; 16: as the model gives them."""

    kind: ClassVar[str] = "full"

    bits: Bits = 16

    def __post_init__(self):
        require(self.bits in BITS, f"bits is {self.bits}: give 16, 8, 4 or fp8")


KEPT = {Full.kind: Full}
