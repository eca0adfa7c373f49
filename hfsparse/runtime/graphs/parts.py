"""A fused step's decoder, compiled part by part: layers of one kind share what is compiled.

A part is a child of the decoder, but for torch's own: a layer, the rotary embedding, the last norm.
What dynamo makes of one takes its weights, and the number of its layer, as inputs, so that it
serves each part of its class that differs in nothing else; the others are compiled for themselves.
A step of several tokens is compiled once for all their numbers, one of a single token for itself:
that has the fewest kernels.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from hfsparse.runtime.call import running
from hfsparse.runtime.graphs.products import compile_step

FORMS = 1024  # of one class: dynamo's own limit is 8, and a hybrid's linear layers share nothing
LIMITS = {"recompile_limit": FORMS, "accumulated_recompile_limit": FORMS}

_entered = threading.Lock()  # one at a time: limits are the process's, and drafts share a decoder


@contextlib.contextmanager
def fused(decoder: nn.Module, tokens: int, whole: bool = False) -> Iterator[Callable]:
    """The forward of a decoder's class, whose parts, or which itself, run as compiled, for a step
    of so many tokens a row.

    Those of a step of this thread that is recorded: another's goes on as it is.
    """
    compiled, forward = cache(_compiled), type(decoder).forward
    with _entered, torch._dynamo.config.patch(LIMITS), contextlib.ExitStack() as stack:
        for part in () if whole else _parts(decoder):
            own = part.__dict__.get("forward")  # accelerate's: each is compiled for itself
            run = partial(compiled(type(part).forward), part) if own is None else compiled(own)
            _put(part, partial(_run, run, part.forward, tokens))
            stack.callback(_put, part, own)
        for table, key in [*_own_hooks(decoder)]:
            stack.callback(table.__setitem__, key, table.pop(key))
        yield partial(_share, compiled(forward), tokens) if whole else forward


def _parts(decoder: nn.Module) -> Iterator[nn.Module]:
    """Those with more than one operator."""
    for child in decoder.children():
        each = child.children() if isinstance(child, nn.ModuleList) else [child]
        yield from (part for part in each if not type(part).__module__.startswith("torch."))


def _own_hooks(decoder: nn.Module) -> Iterator[tuple[dict, int]]:
    """Where modules inside hold the patch's hooks: one makes a layer another kind."""
    for module in decoder.modules():
        for key, hook in module._forward_pre_hooks.items() if module is not decoder else ():
            if hook.__module__.startswith("hfsparse."):
                yield module._forward_pre_hooks, key
                yield module._forward_pre_hooks_with_kwargs, key


def _compiled(forward: Callable) -> Callable:
    """A forward, compiled; dynamo keeps what it compiled by the forward's code."""
    return torch.compile(forward, backend=compile_step, dynamic=False, fullgraph=True)


def _put(part: nn.Module, forward: Callable | None) -> None:
    """Have a part a forward of its own; None: its class's."""
    if forward is None:
        del part.forward
    else:
        part.forward = forward


def _run(compiled: Callable, own: Callable, tokens: int, *args, **kwargs):
    """A part's forward; `own` in a step of another thread, which is not recorded."""
    call = running()
    if call is None or call.recorded is None:
        return own(*args, **kwargs)
    with _disable_current_modes():  # one looks for waits, and compiled code has none
        return _share(compiled, tokens, *args, **kwargs)


def _share(compiled: Callable, tokens: int, *args, **kwargs):
    """What is compiled, run so that it serves other numbers of tokens, where these are several."""
    for x in tree_leaves((args, kwargs)) if tokens > 1 else ():
        if isinstance(x, Tensor):
            # The first dimension counts rows, unless it is the only one, as of `cache_position`.
            for dim in range(min(1, x.ndim - 1), x.ndim):
                if x.shape[dim] == tokens:
                    torch._dynamo.maybe_mark_dynamic(x, dim)
    return compiled(*args, **kwargs)
