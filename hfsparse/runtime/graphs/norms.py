"""RMS norms of a recorded step in fewer launches, where that gives the same bits.

What a norm computes is found by asking it, of random rows: a form whose bits are its own is it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hfsparse.kernels import NORMS, Kernel, Need, pick
from hfsparse.kernels.plain import NORM_FORMS

ASKED = 64  # random rows


def with_own_norms(forward: Callable, decoder: nn.Module) -> Callable:
    """The decoder's `forward`, whose norms are ours while it runs."""
    found: dict[tuple, str | None] = {}
    served = []
    for module in decoder.modules():
        weight, eps = module._parameters.get("weight"), _eps(module)
        if eps is None or weight is None or weight.ndim != 1 or "forward" in vars(module):
            continue
        if (kernel := _kernel(weight)) is NORMS[-1]:
            continue
        kind = type(module), weight.dtype, weight.shape, weight.device, eps
        if kind not in found:
            found[kind] = _form(module, weight, eps, kernel)
        if found[kind] is not None:
            served.append((module, partial(_norm, module, kernel, eps, found[kind])))

    def run(**given):
        for module, norm in served:
            module.forward = norm
        try:
            return forward(**given)
        finally:
            for module, _ in served:
                del module.forward

    return run


def _eps(module: nn.Module) -> float | None:
    if "RMSNorm" not in type(module).__name__:
        return None
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _kernel(weight: Tensor) -> Kernel:
    return pick(NORMS, Need(weight.device, weight.dtype, len(weight), len(weight)))


def _form(module: nn.Module, weight: Tensor, eps: float, kernel: Kernel) -> str | None:
    """The form of a norm that is this module, bit for bit."""
    made = torch.Generator(weight.device).manual_seed(0)
    more = {"device": weight.device, "dtype": weight.dtype, "generator": made}
    x = torch.randn(1, ASKED, len(weight), **more)
    want = module(x)
    forms = (form for form in NORM_FORMS if torch.equal(kernel.run(x, weight, eps, form), want))
    return next(forms, None)


def _norm(module: nn.Module, kernel: Kernel, eps: float, form: str, x: Tensor) -> Tensor:
    """A norm of x `[..., N]`."""
    if x.dtype != module.weight.dtype or not x.is_contiguous():
        return type(module).forward(module, x)
    return kernel.run(x, module.weight, eps, form)
