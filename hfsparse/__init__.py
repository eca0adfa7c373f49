"""hfsparse: training-free sparse attention for Hugging Face models.

plan = hfsparse.profile(model, tokenizer, out="plan.yaml")
with hfsparse.patch(model, plan) as handle:
    model.generate(**inputs)
    print(handle.stats())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfsparse.patcher import explain, patch, unpatch
    from hfsparse.plan import Plan
    from hfsparse.profiler import profile

__version__ = "0.1.0"
__all__ = ["Plan", "explain", "patch", "profile", "unpatch"]

# Imported at first use, so that `hfsparse --help` needs neither torch nor transformers.
_HOME = {"Plan": "plan", "explain": "patcher", "patch": "patcher", "unpatch": "patcher"}
_HOME["profile"] = "profiler"


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"hfsparse.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hfsparse' has no attribute '{name}'")
