"""A fused step's decoder, compiled part by part: layers of one kind share what is compiled.

A part is a child of the decoder: a layer, the embedding, the last norm. What dynamo makes of one
takes its weights, and the number of its layer, as inputs, so that it serves each part of its class
that differs in nothing else; the others are compiled for themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from hfsparse.runtime.call import running
from hfsparse.runtime.graphs.products import compile_step

COMPILE = {"dynamic": False, "fullgraph": True}
FORMS = 1024  # of one class: dynamo's own limit is 8, and some layers share nothing


class Parts:
    """The parts of a decoder, each with what computes it in a fused step."""

    def __init__(self, decoder: nn.Module):
        self.parts: list[tuple[nn.Module, Callable]] = []
        compiled: dict[Callable, Callable] = {}
        for part in _parts(decoder):
            own = part.__dict__.get("forward")
            forward = type(part).forward if own is None else own
            if forward not in compiled:
                compiled[forward] = torch.compile(forward, backend=compile_step, **COMPILE)
            serve = compiled[forward] if own is not None else partial(compiled[forward], part)
            self.parts.append((part, partial(_run, serve, part.forward)))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The decoder's parts are run as compiled, where a step of this thread is recorded."""
        limits = {"recompile_limit": FORMS, "accumulated_recompile_limit": FORMS}
        were = [part.__dict__.get("forward") for part, _ in self.parts]
        try:
            for part, serve in self.parts:
                part.forward = serve
            with torch._dynamo.config.patch(limits):
                yield
        finally:
            for (part, _), was in zip(self.parts, were, strict=True):
                if was is None:
                    del part.forward
                else:
                    part.forward = was


def _parts(decoder: nn.Module) -> Iterator[nn.Module]:
    for child in decoder.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


def _run(serve: Callable, forward: Callable, *args, **kwargs):
    """A part's forward: another thread's step of the same model is none that is recorded."""
    call = running()
    if call is None or call.recorded is None:
        return forward(*args, **kwargs)
    with _disable_current_modes():  # one that looks for waits: compiled code has none
        return serve(*args, **kwargs)
