"""RMS norms, rotary embeddings and gates of a recorded step in fewer launches, with the same bits.

What a model's own code computes is found by asking it, of random numbers: where a form that we know
has its bits, a step is recorded with our kernel. All others stay as they are.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hfsparse.kernels import GATES, NORMS, ROPES, Kernel, Need
from hfsparse.kernels.plain import GATE_FORMS, NORM_FORMS
from hfsparse.runtime.rows import device_guard

ASKED = 64  # random rows
ROWS = (1, 8, ASKED)  # how PyTorch sums up a row depends on how many there are
ROPE = "apply_rotary_pos_emb"  # as modules of transformers call it


def with_fewer_launches(forward: Callable, decoder: nn.Module, known: dict) -> Callable:
    """The decoder's `forward`, in which norms, rotary embeddings and gates are ours.

    known: what modules of the decoder have answered so far.
    """
    own = (module for module in decoder.modules() if "forward" not in vars(module))
    found = {module: _made_of(module, known) for module in own}
    ours = {module: made for module, made in found.items() if made is not None}

    def run(**given):
        thread = threading.get_ident()
        for module, made in ours.items():
            module.forward = partial(_in_thread, thread, module, made)
        try:
            return forward(**given)
        finally:
            for module in ours:
                vars(module).pop("forward", None)  # another thread may have been here

    return run


def _in_thread(thread: int, module: nn.Module, made: Callable, *args, **kwargs):
    """A forward of ours; in another thread, whose step this is not, the module's."""
    own = made if threading.get_ident() == thread else partial(type(module).forward, module)
    return own(*args, **kwargs)


def _made_of(module: nn.Module, known: dict) -> Callable | None:
    """A forward in place of a module's."""
    made = (make(module, known) for make in (_norm_of, _mlp_of, _attention_of))
    return next(filter(None, made), None)


def _norm_of(module: nn.Module, known: dict) -> Callable | None:
    """Of an RMS norm, by the first kernel that has its bits."""
    weight, eps = module._parameters.get("weight"), _eps(module)
    if eps is None or weight is None or weight.ndim != 1 or is_traceable_wrapper_subclass(weight):
        return None

    def ask(kernel: Kernel) -> str | None:
        x, any_weight = _random(weight, (1, ASKED, len(weight)), (len(weight),))
        asked = [x[:, :rows] for rows in ROWS]
        want = [torch.func.functional_call(module, {"weight": any_weight}, (x,)) for x in asked]
        for form in NORM_FORMS:
            if _equal((kernel.run(x, any_weight, eps, form) for x in asked), want):
                return form

    own = weight.shape, eps
    found = _find(NORMS, (*_kind(module), *own), weight, len(weight), ask, known)
    return found and partial(_norm, module, eps, *found)


def _eps(module: nn.Module) -> float | None:
    """None: it is no RMS norm of rows alone; those of hybrids take a gate, too."""
    kind = type(module)
    if "RMSNorm" not in kind.__name__ or len(inspect.signature(kind.forward).parameters) != 2:
        return None
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm(module: nn.Module, eps: float, kernel: Kernel, form: str, x: Tensor) -> Tensor:
    """A norm of x `[..., N]`."""
    if x.dtype != module.weight.dtype or not x.is_contiguous():
        return type(module).forward(module, x)
    with device_guard(x):
        return kernel.run(x, module.weight, eps, form)


def _mlp_of(module: nn.Module, known: dict) -> Callable | None:
    """Of an MLP whose gate passes an activation: the projections are called as they are."""
    like = next(module.parameters(), None)
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if like is None or not all(hasattr(module, name) for name in parts):
        return None

    def ask(kernel: Kernel) -> str | None:
        gate = torch.arange(1 << 16, device=like.device).short().view(like.dtype)  # all numbers
        gate = gate[gate.isfinite()][None]
        (up,) = _random(like, gate.shape)
        x, out, given = object(), object(), []
        asked = SimpleNamespace(
            act_fn=module.act_fn,
            gate_proj=lambda got: gate if got is x else None,
            up_proj=lambda got: up if got is x else None,
            down_proj=lambda got: given.append(got) or out,
        )
        if type(module).forward(asked, x) is out and len(given) == 1:
            for form in GATE_FORMS:
                if _equal([kernel.run(gate, up, form)], given):
                    return form

    found = _find(GATES, (*_kind(module), module.act_fn), like, 1, ask, known)
    return found and partial(_mlp, module, like.dtype, *found)


def _mlp(module: nn.Module, dtype: torch.dtype, kernel: Kernel, form: str, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.shape != up.shape or not all(_plain(t, dtype) for t in (gate, up)):
        return module.down_proj(module.act_fn(gate) * up)
    with device_guard(gate):
        return module.down_proj(kernel.run(gate, up, form))


def _attention_of(module: nn.Module, known: dict) -> Callable | None:
    """Of an attention that calls ROPE: its own, which finds ours under that name."""
    forward, like = type(module).forward, next(module.parameters(), None)
    inner, dim = inspect.unwrap(forward), getattr(module, "head_dim", None)
    if like is None or not isinstance(dim, int) or {type(forward), type(inner)} != {FunctionType}:
        return None
    if (rope := inner.__globals__.get(ROPE)) is None or ROPE not in inner.__code__.co_names:
        return None

    def ask(kernel: Kernel) -> bool | None:
        q, k, cos, sin = _random(like, (2, 5, 4, dim), (2, 5, 2, dim), (2, 5, dim), (2, 5, dim))
        given = q.transpose(1, 2), k.transpose(1, 2), cos, sin
        return _equal(kernel.run(*given), rope(*given)) or None

    found = _find(ROPES, rope, like, dim, ask, known)
    if found is None:
        return None
    own = partial(_rotate, rope, like.dtype, found[0])
    return MethodType(_with_globals(forward, **{ROPE: own}), module)


def _rotate(rope: Callable, dtype: torch.dtype, kernel: Kernel, *given, **more) -> Any:
    """Rotary embedding of the first two by the next two; in another form, the model's."""
    if more or len(given) != 4 or not _turns(dtype, *given):
        return rope(*given, **more)
    with device_guard(given[0]):
        return kernel.run(*given)


def _turns(dtype: torch.dtype, q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Whether these are what `plain.rotate` takes."""
    if not all(type(x) is Tensor and x.dtype == dtype for x in (q, k, cos, sin)):
        return False
    if not q.ndim == k.ndim == 4 or (len(q), q.shape[2:]) != (len(k), k.shape[2:]):
        return False
    return cos.shape == sin.shape and tuple(cos.shape) in {(B, *q.shape[2:]) for B in (1, len(q))}


def _with_globals(forward: FunctionType, **own) -> FunctionType:
    """A function that finds these under their names; so does what it wraps."""
    cells, inner = forward.__closure__ or (), getattr(forward, "__wrapped__", None)
    if inner is not None:
        wrapped = CellType(_with_globals(inner, **own))
        cells = tuple(wrapped if cell.cell_contents is inner else cell for cell in cells)
    made = FunctionType(forward.__code__, {**forward.__globals__, **own}, closure=cells)
    made.__defaults__, made.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    return made


def _find(
    table: tuple[Kernel, ...], kind: Any, like: Tensor, dim: int, ask: Callable, known: dict
) -> tuple[Kernel, Any] | None:
    """The first kernel of a table whose answer is some form, and that; the last is no kernel."""
    key = table, kind, like.dtype, like.device
    if key not in known:
        known[key] = None
        need = Need(like.device, like.dtype, dim, dim)
        for kernel in (kernel for kernel in table[:-1] if kernel.why_not(need) is None):
            try:
                with device_guard(like):
                    form = ask(kernel)
            except Exception:  # whatever a model does that is asked in another form
                continue
            if form is not None:
                known[key] = kernel, form
                break
    return known[key]


def _kind(module: nn.Module) -> tuple:
    return type(module), type(module).forward


def _equal(found: Iterable[Tensor], want: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, found, want))


def _plain(x: Any, dtype: torch.dtype) -> bool:
    return type(x) is Tensor and x.dtype == dtype and x.is_contiguous()


def _random(like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    seeded = torch.Generator(like.device).manual_seed(0)
    more = {"device": like.device, "dtype": like.dtype, "generator": seeded}
    return [torch.randn(shape, **more) for shape in shapes]
