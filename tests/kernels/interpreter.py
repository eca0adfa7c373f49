"""Triton kernels in Triton's interpreter, in a process of their own: this one stays as it is.

The interpreter knows float32 and float16 (bf16 is wrong there) and is slow: small shapes.
"""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from unittest.mock import patch

import numpy as np
import pytest
import torch


@contextmanager
def interpreter(**settings):
    """A function `run(name, *args, **more)` that calls `hfsparse.kernels.<name>` or `tests.<name>`.

    What the call changes in the tensors among `more` is copied back. Settings: module__NAME=value.
    """
    # Before 3.8 Triton's interpreter fails with numpy 2.4.
    pytest.importorskip("triton", minversion="3.8")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(_set, settings).result()  # starts it

        def run(name: str, *args, **more):
            # As bytes: torch would share the memory of tensors sent as they are.
            done = pool.submit(_call, pickle.dumps((name, args, more))).result()
            result, changed = pickle.loads(done)
            for key, value in changed.items():
                for own, part in zip(_tensors(more[key]), _tensors(value), strict=True):
                    own.copy_(part)
            return result

        yield run


def _tensors(value) -> tuple[torch.Tensor, ...]:
    if isinstance(value, torch.Tensor):
        return (value,)
    return value.tensors() if hasattr(value, "tensors") else ()


def _set(settings: dict) -> None:
    from tests import asserts  # imports kernels, which ask whether they are interpreted

    asserts.install()
    for name, value in settings.items():
        module, name = name.split("__")
        setattr(import_module(f"hfsparse.kernels.{module}"), name, value)


def _call(wanted: bytes) -> bytes:
    name, args, more = pickle.loads(wanted)
    module, function = name.rsplit(".", 1)
    module = module if module.startswith("tests.") else f"hfsparse.kernels.{module}"
    with np.errstate(all="ignore"):  # masked lanes of the interpreter divide by zero
        result = getattr(import_module(module), function)(*args, **more)
    return pickle.dumps((result, more))
