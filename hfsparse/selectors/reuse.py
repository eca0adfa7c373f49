"""Reuse: read the pages that an earlier layer chose (TidalDecode, arXiv 2410.05076)."""

from __future__ import annotations

from dataclasses import dataclass

from hfsparse.selectors.selector import register


@register("reuse")
@dataclass(frozen=True)
class Reuse:
    """The pages that the last layer before which chooses any chose for the same kv heads."""
