"""Triton kernels in Triton's interpreter, in a process of their own: this one stays as it is.

The interpreter knows float32 and float16 (bf16 is wrong there) and is slow: small shapes.
"""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from unittest.mock import patch

import numpy as np
import pytest
import torch


@cache
def _pool() -> ProcessPoolExecutor:
    """One process for all tests that this one runs: it takes seconds to start."""
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    with patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool.submit(_start).result()
    return pool


@contextmanager
def process(bounded: bool = False, **settings):
    """`run(function, *args, **more)`, there. Settings: module__NAME=value, until the end.

    bounded: kernels that read or write outside of the tensors they are given raise.
    """
    # Before 3.8 Triton's interpreter fails with numpy 2.4.
    pytest.importorskip("triton", minversion="3.8")
    pool = _pool()
    before = pool.submit(_set, bounded, settings).result()
    try:
        yield lambda function, *args, **more: pool.submit(function, *args, **more).result()
    finally:
        pool.submit(_set, *before).result()


@contextmanager
def interpreter(**settings):
    """A function `run(name, *args, **more)` that calls `hfsparse.kernels.<name>` or `tests.<name>`.

    What the call changes in the tensors among `more` is copied back. Settings: as of `process`.
    """
    with process(bounded=True, **settings) as there:

        def run(name: str, *args, **more):
            # As bytes: torch would share the memory of tensors sent as they are.
            result, changed = pickle.loads(there(_call, pickle.dumps((name, args, more))))
            for key, value in changed.items():
                for own, part in zip(_tensors(more[key]), _tensors(value), strict=True):
                    own.copy_(part)
            return result

        yield run


def _tensors(value) -> tuple[torch.Tensor, ...]:
    if isinstance(value, torch.Tensor):
        return (value,)
    return value.tensors() if hasattr(value, "tensors") else ()


def _start() -> None:
    from tests import asserts  # imports kernels, which ask whether they are interpreted

    asserts.install()
    _bound()
    _hasten()


def _set(bounded: bool, settings: dict) -> tuple[bool, dict]:
    """What was set before."""
    from triton.runtime import interpreter as triton

    before, memory = {}, triton._interpreter
    for path, value in settings.items():
        *module, name = path.split("__")
        module = import_module(".".join(("hfsparse.kernels", *module)))
        before[path] = getattr(module, name)
        setattr(module, name, value)
        for each in vars(module).values():  # what was worked out from it
            getattr(each, "cache_clear", bool)()
    was, memory.bounded = memory.bounded, bounded
    return was, before


def _hasten() -> None:
    """Spare the interpreter what it does again and again.

    It looks through all of `triton.language`, to patch it, at each call of a device function:
    half of the time goes into that. Once a launch is enough.
    """
    import triton.language as tl
    from triton.runtime import interpreter as triton

    patch_lang = triton._patch_lang

    def patch_once(kernel):
        held = [each for each in kernel.__globals__.values() if each is tl or each is tl.core]
        if any(tl.core.is_builtin(each.load) for each in held):
            return patch_lang(kernel)
        return triton._LangPatchScope()  # of a device function: nothing is left to patch

    triton._patch_lang = patch_once


class _Memory:
    """The interpreter's memory: a kernel may touch no more of it than the tensors it is given."""

    def __init__(self, memory):
        self.memory, self.given, self.bounded = memory, [], True

    def __getattr__(self, name: str):
        return getattr(self.memory, name)

    def load(self, at, mask, other, dtype):
        self.check(at, mask, np.dtype(dtype).itemsize)
        return self.memory.load(at, mask, other, dtype)

    def store(self, at, value, mask):
        self.check(at, mask, value.itemsize)
        return self.memory.store(at, value, mask)

    def atomic_rmw(self, op, at, value, mask, sem):
        self.check(at, mask, value.itemsize)
        return self.memory.atomic_rmw(op, at, value, mask, sem)

    def check(self, at: np.ndarray, mask: np.ndarray, size: int) -> None:
        at = at[mask.astype(bool)]
        if at.size and self.bounded:
            first, end = int(at.min()), int(at.max()) + size
            if not any(a <= first and end <= b for a, b in self.given):
                raise IndexError(f"addresses {first} to {end} lie in no tensor of the kernel's")


def _spans(tensors) -> list[tuple[int, int]]:
    """Where the memory of each begins and ends."""
    held = [t.untyped_storage() for t in tensors]
    return [(memory.data_ptr(), memory.data_ptr() + memory.nbytes()) for memory in held]


def _bound() -> None:
    """Have the interpreter raise where a kernel reads or writes outside of its tensors."""
    from triton.runtime import interpreter as triton

    from hfsparse.lists.places import Table

    memory = triton._interpreter = _Memory(triton._interpreter)
    convert, places, tables = triton.GridExecutor._init_args_hst, Table.places, []

    def noted(self, args, more):
        made = convert(self, args, more)
        given = [t for t in (*made[0], *made[1].values()) if isinstance(t, torch.Tensor)]
        # With a table of places a kernel is given the first buffers alone.
        behind = [t for cells, buffers in tables if any(t is cells for t in args) for t in buffers]
        memory.given = _spans([*given, *behind])
        return made

    def noted_places(self, parts):
        made = places(self, parts)
        lost = [part.dropped for part in parts if part.dropped is not None]
        tables[:] = [(made.cells, [*(t for part in parts for t in part.buffers), *lost])]
        return made

    triton.GridExecutor._init_args_hst, Table.places = noted, noted_places


def _call(wanted: bytes) -> bytes:
    name, args, more = pickle.loads(wanted)
    module, function = name.rsplit(".", 1)
    module = module if module.startswith("tests.") else f"hfsparse.kernels.{module}"
    with np.errstate(all="ignore"):  # masked lanes of the interpreter divide by zero
        result = getattr(import_module(module), function)(*args, **more)
    return pickle.dumps((result, more))
