"""What a cache keeps whole, in how many bits and where: `full8: {kind: full, bits: 8}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hfsparse.lists.packed import BITS, Bits
from hfsparse.registry import later, require

HOT = 0.12  # of a row's units: twice what selectors read by default


@dataclass(frozen=True)
class Full:
    """Every key and value; bits: of each number, 8, 4 or fp8; 16: as the model gives them.

    host: they lie in the host's memory, and the GPU has the newest pages, what the selector keeps
    of each, and a share `hot` of those units that steps read last.
    """

    kind: ClassVar[str] = "full"

    bits: Bits = 16
    host: bool = later(False)
    hot: float = later(HOT)

    def __post_init__(self):
        require(self.bits in BITS, f"bits is {self.bits!r}: give 16, 8, 4 or fp8")
        require(0 < self.hot <= 1, f"hot is {self.hot}: give more than 0 and at most 1")
        require(
            self.host or self.hot == HOT,
            f"hot is {self.hot}, host false: it is of keys in host memory, give host true or leave "
            "it out",
        )


KEPT = {Full.kind: Full}
