"""Methods: from measurements to a plan, one file each.

A method is a function `plan(job) -> Found` (the protocol `job.Method`) in a module of this package,
and a line of METHODS.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """Where a method is; its module is imported at first use, so that names cost nothing."""

    module: str
    function: str = "plan"
    # Measures candidates on every head: can keep within a loss, draw, and choose for layers that
    # share keys.
    one_pass: bool = False

    @property
    def plan(self) -> Any:
        """The method, a `job.Method`."""
        return getattr(import_module(f"{__name__}.{self.module}"), self.function)


METHODS = {
    "balanced": Entry("balanced", one_pass=True),
    "minference": Entry("minference", one_pass=True),
    "minference-error": Entry("minference", "plan_by_error", one_pass=True),
    "moa": Entry("moa"),
    "duo": Entry("duo"),
    "streaming-llm": Entry("streaming_llm"),
}
DRAWN = tuple(name for name, method in METHODS.items() if method.one_pass)
