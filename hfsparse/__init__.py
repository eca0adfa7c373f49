"""hfsparse: training-free sparse attention for Hugging Face models.

plan = hfsparse.profile(model, tokenizer, out="plan.yaml")
with hfsparse.patch(model, plan) as handle:
    model.generate(**inputs)
    print(handle.stats())

What can't be used raises an `hfsparse.Error` that says why, and what to do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from hfsparse.version import __version__

if TYPE_CHECKING:
    from hfsparse.errors import Error
    from hfsparse.patcher import explain, patch, unpatch
    from hfsparse.plan import Plan
    from hfsparse.profiler import profile
    from hfsparse.profiler.verify import verify
    from hfsparse.runtime.parts import ContextParallel

__all__ = [
    "ContextParallel",
    "Error",
    "Plan",
    "__version__",
    "explain",
    "patch",
    "profile",
    "unpatch",
    "verify",
]

# Imported at first use, so that `hfsparse --help` needs neither torch nor transformers.
_HOME = {
    "ContextParallel": "runtime.parts",
    "Error": "errors",
    "Plan": "plan",
    "explain": "patcher",
    "patch": "patcher",
    "profile": "profiler",
    "unpatch": "patcher",
    "verify": "profiler.verify",
}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"hfsparse.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hfsparse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
