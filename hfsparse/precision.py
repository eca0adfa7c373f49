"""Patterns and selectors choose the same whatever settings of PyTorch round the model's products.

Autocast casts the factors of a product, and those of float32 products may be rounded to TF32 or
bfloat16 (`torch.set_float32_matmul_precision`, `allow_tf32`). What is chosen depends on neither.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

_may_cast = cache(torch.amp.is_autocast_available)


def casts(kind: str) -> bool:
    """Whether autocast is on for devices of a kind."""
    return _may_cast(kind) and torch.is_autocast_enabled(kind)


def without_autocast(function: Callable) -> Callable:
    """The function, or method, with autocast off on the device of its first tensor."""

    @wraps(function)
    def run(*args, **more):
        device = next(t for t in (*args, *more.values()) if isinstance(t, Tensor)).device.type
        if not casts(device):
            return function(*args, **more)
        with torch.autocast(device, enabled=False):
            return function(*args, **more)

    return run


def on_host(function: Callable) -> Callable:
    """The function, or method, whose new tensors lie on the CPU and are as exact as written there,
    whatever the default device, autocast and inference mode are."""

    @wraps(function)
    def run(*args, **more):
        off = torch.autocast("cpu", enabled=False)
        with torch.device("cpu"), torch.inference_mode(False), off:
            return function(*args, **more)

    return run


def exact(t: Tensor) -> Tensor:
    """t as a factor of products that round nothing: float32, or float64 where that would round."""
    backend = torch.backends.cuda if t.is_cuda else torch.backends.mkldnn
    mode = getattr(getattr(backend, "matmul", None), "fp32_precision", None)  # from torch 2.9 on
    mode = mode or torch.get_float32_matmul_precision()
    return t.float() if mode in ("none", "ieee", "highest") else t.double()
