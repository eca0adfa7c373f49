"""Named sizes of a run: how many samples of each task, at which lengths."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from hfsparse.errors import UsageError


@dataclass(frozen=True)
class Size:
    samples: int
    lengths: tuple[int, ...]


SUITES = {
    "smoke": Size(4, (1024, 2048)),
    "quick": Size(20, (4096, 16384)),
    "standard": Size(100, (4096, 8192, 16384, 32768)),
    "full": Size(500, (4096, 8192, 16384, 32768, 65536, 131072)),
}


def named(name: str) -> Size:
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown suite {name}: did you mean {near}? ({', '.join(SUITES)})")
    return SUITES[name]
