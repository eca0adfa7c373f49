"""RMS norms and rotary embeddings of a recorded step in fewer launches, with the same bits.

What a model's own modules compute is found by asking them, of random numbers: where a form that we
know has their bits, a step is recorded with our kernel. All others stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hfsparse.kernels import NORMS, ROTATIONS, Kernel, Need, pick
from hfsparse.kernels.plain import NORM_FORMS
from hfsparse.runtime.rows import device_guard

ASKED = 64  # random rows
ROTATE = "apply_rotary_pos_emb"  # what attention of transformers' calls
OLD_NAMES = "utils/deprecation.py"  # where those decorators are from


def with_fewer_launches(forward: Callable, decoder: nn.Module) -> Callable:
    """The decoder's `forward`, in which norms and rotary embeddings are ours."""
    plain = (p for p in decoder.parameters() if not is_traceable_wrapper_subclass(p))
    weight = next((p for p in plain if p.ndim == 1), None)
    known: dict[Any, Any] = {}
    ours = []
    for module in decoder.modules():
        if "forward" not in vars(module):
            made = _norm_of(module, known) or _attention_of(module, weight, known)
            ours += [(module, made)] if made is not None else []

    def run(**given):
        for module, made in ours:
            module.forward = made
        try:
            return forward(**given)
        finally:
            for module, _ in ours:
                del module.forward

    return run


def _norm_of(module: nn.Module, known: dict) -> Callable | None:
    """A norm's forward by our kernel, if it is one whose bits that has."""
    weight, eps = module._parameters.get("weight"), _eps(module)
    if eps is None or weight is None or weight.ndim != 1 or is_traceable_wrapper_subclass(weight):
        return None
    if (kernel := _kernel(NORMS, weight)) is NORMS[-1]:
        return None
    kind = type(module), weight.dtype, weight.shape, weight.device, eps
    if kind not in known:
        x, any_weight = _random(weight, (1, ASKED, len(weight)), (len(weight),))
        want = torch.func.functional_call(module, {"weight": any_weight}, (x,))
        with device_guard(x):
            found = {form: kernel.run(x, any_weight, eps, form) for form in NORM_FORMS}
        known[kind] = next((form for form in found if torch.equal(found[form], want)), None)
    return partial(_norm, module, kernel, eps, known[kind]) if known[kind] else None


def _eps(module: nn.Module) -> float | None:
    if "RMSNorm" not in type(module).__name__:
        return None
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm(module: nn.Module, kernel: Kernel, eps: float, form: str, x: Tensor) -> Tensor:
    """A norm of x `[..., N]`."""
    if x.dtype != module.weight.dtype or not x.is_contiguous():
        return type(module).forward(module, x)
    with device_guard(x):
        return kernel.run(x, module.weight, eps, form)


def _attention_of(module: nn.Module, weight: Tensor | None, known: dict) -> Callable | None:
    """The forward of attention that rotates queries and keys as our kernel does, with it."""
    dim, forward = getattr(module, "head_dim", None), _plain(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or ROTATE not in code.co_names or not isinstance(dim, int) or weight is None:
        return None
    original = forward.__globals__.get(ROTATE)
    if (kernel := _kernel(ROTATIONS, weight)) is ROTATIONS[-1] or original is None:
        return None
    kind = original, dim, weight.dtype, weight.device
    if kind not in known:
        given = _random(weight, *((2, n, ASKED, dim) for n in (3, 2)), *[(2, ASKED, dim)] * 2)
        try:
            with device_guard(weight):
                known[kind] = all(map(torch.equal, kernel.run(*given), original(*given)))
        except (RuntimeError, TypeError, ValueError):  # it asks for something else
            known[kind] = False
    if not known[kind]:
        return None
    more = {**forward.__globals__, ROTATE: partial(_rotate, kernel, original, weight.dtype)}
    made = FunctionType(code, more, forward.__name__, None, forward.__closure__)
    made.__defaults__, made.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    return made.__get__(module)


def _plain(forward: Callable) -> Any:
    """A forward without the decorators by which transformers takes arguments' old names."""
    while hasattr(forward, "__wrapped__") and forward.__code__.co_filename.endswith(OLD_NAMES):
        forward = forward.__wrapped__
    return forward


def _rotate(kernel: Kernel, original: Callable, dtype: torch.dtype, q, k, cos, sin, *more, **rest):
    """Queries q `[B, Hq, S, D]` and keys, turned by cos and sin `[B or 1, S, D]`."""
    plain = not (more or rest) and all(t.dtype == dtype for t in (q, k, cos, sin))
    if not plain or cos.shape[1:] != (q.shape[2], q.shape[3]):
        return original(q, k, cos, sin, *more, **rest)
    with device_guard(q):
        return kernel.run(q, k, cos, sin)


def _kernel(table: tuple[Kernel, ...], weight: Tensor) -> Kernel:
    return pick(table, Need(weight.device, weight.dtype, len(weight), len(weight)))


def _random(like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    seeded = torch.Generator(like.device).manual_seed(0)
    more = {"device": like.device, "dtype": like.dtype, "generator": seeded}
    return [torch.randn(shape, **more) for shape in shapes]
