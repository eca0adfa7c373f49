"""Measurements depend on the model and its prompts, not on the caller's modes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P, T = ParamSpec("P"), TypeVar("T")


def isolate_modes(work: Callable[P, T]) -> Callable[P, T]:
    """Run `work` outside of the caller's inference mode, autocast and default device."""

    @wraps(work)
    def run(*args: P.args, **more: P.kwargs) -> T:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.device("cpu"))
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return work(*args, **more)

    return run
