"""RMS norms and rotary embeddings of a recorded step in fewer launches, with the same bits.

What a model's own compute is found by asking them, of random numbers: where a form that we know
gives their bits, a step is recorded with our kernel in their place. All others stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from hfsparse.kernels import NORMS, ROTATIONS, Kernel, Need, pick
from hfsparse.kernels.plain import NORM_FORMS

ASKED = 64  # random rows
ROTATE = "apply_rotary_pos_emb"  # what attention of transformers' calls
OLD_NAMES = "utils/deprecation.py"  # where those decorators are from


def with_fewer_launches(forward: Callable, decoder: nn.Module) -> Callable:
    """The decoder's `forward`, while which norms and rotary embeddings are ours."""
    weight = next((p for p in decoder.parameters() if p.ndim == 1), None)
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
    if eps is None or weight is None or weight.ndim != 1:
        return None
    if (kernel := _kernel(NORMS, weight)) is NORMS[-1]:
        return None
    kind = type(module), weight.dtype, weight.shape, weight.device, eps
    if kind not in known:
        x = _random(weight, 1, ASKED, len(weight))
        want = module(x)
        same = (form for form in NORM_FORMS if torch.equal(kernel.run(x, weight, eps, form), want))
        known[kind] = next(same, None)
    return partial(_norm, module, kernel, eps, known[kind]) if known[kind] else None


def _eps(module: nn.Module) -> float | None:
    if "RMSNorm" not in type(module).__name__:
        return None
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm(module: nn.Module, kernel: Kernel, eps: float, form: str, x: Tensor) -> Tensor:
    """A norm of x `[..., N]`."""
    if x.dtype != module.weight.dtype or not x.is_contiguous():
        return type(module).forward(module, x)
    return kernel.run(x, module.weight, eps, form)


def _attention_of(module: nn.Module, weight: Tensor | None, known: dict) -> Callable | None:
    """The forward of attention that rotates queries and keys as our kernel does, with it."""
    dim, forward = getattr(module, "head_dim", None), _plain(type(module).forward)
    if ROTATE not in forward.__code__.co_names or not isinstance(dim, int) or weight is None:
        return None
    original = forward.__globals__.get(ROTATE)
    if (kernel := _kernel(ROTATIONS, weight)) is ROTATIONS[-1] or original is None:
        return None
    kind = original, dim, weight.dtype, weight.device
    if kind not in known:
        q, k, *turns = (_random(weight, 2, n, ASKED, dim) for n in (3, 2, 1, 1))
        given = q, k, *(t[:, 0] for t in turns)
        try:
            known[kind] = all(map(torch.equal, kernel.run(*given), original(*given)))
        except (RuntimeError, TypeError, ValueError):  # it asks for something else
            known[kind] = False
    if not known[kind]:
        return None
    more = {**forward.__globals__, ROTATE: partial(_rotate, kernel, original)}
    made = FunctionType(forward.__code__, more, forward.__name__, None, forward.__closure__)
    made.__defaults__, made.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    return made.__get__(module)


def _plain(forward: Callable) -> Any:
    """A forward without the decorators by which transformers takes arguments' old names."""
    while hasattr(forward, "__wrapped__") and forward.__code__.co_filename.endswith(OLD_NAMES):
        forward = forward.__wrapped__
    return forward


def _rotate(kernel: Kernel, original: Callable, q, k, cos, sin, *more, **rest):
    """Queries q `[B, Hq, S, D]` and keys, turned by cos and sin `[B or 1, S, D]`."""
    types = {t.dtype for t in (q, k, cos, sin)}
    if more or rest or len(types) > 1 or cos.ndim != 3 or cos.shape[-1] != q.shape[-1]:
        return original(q, k, cos, sin, *more, **rest)
    return kernel.run(q, k, cos, sin)


def _kernel(table: tuple[Kernel, ...], weight: Tensor) -> Kernel:
    return pick(table, Need(weight.device, weight.dtype, len(weight), len(weight)))


def _random(like: Tensor, *shape: int) -> Tensor:
    made = torch.Generator(like.device).manual_seed(len(shape))
    return torch.randn(shape, device=like.device, dtype=like.dtype, generator=made)
