"""Rope that scales with the longest call so far, so that calls depend on those before them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# What such a module remembers, by the ends of its names: before these some have a kind of layer.
LENGTH, FREQUENCIES, TRAINED = "max_seq_len_cached", "inv_freq", "original_inv_freq"


@contextmanager
def forget_lengths(model: nn.Module) -> Iterator[None]:
    """Within it dynamic rope knows of no call before; afterwards it is as it was."""
    modules = [m for m in model.modules() if "dynamic" in str(getattr(m, "rope_type", ""))]
    before = [_remembered(module) for module in modules]
    try:
        for module, held in zip(modules, before, strict=True):
            for name in held:
                if name.endswith(LENGTH):
                    setattr(module, name, module.original_max_seq_len)
                elif not name.endswith(TRAINED):
                    trained = name.removesuffix(FREQUENCIES) + TRAINED
                    setattr(module, name, getattr(module, trained).to(held[name].device))
        yield
    finally:
        for module, held in zip(modules, before, strict=True):
            for name, value in held.items():
                setattr(module, name, value)


def _remembered(module: nn.Module) -> dict:
    """Values of a module by name, buffers included."""
    known = {**vars(module), **module._buffers}
    return {name: x for name, x in known.items() if name.endswith((LENGTH, FREQUENCIES))}
