"""Tests that need a CUDA device: without one each file is skipped before it is imported."""

import ctypes
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in tests/conftest.py, which may not be read
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as deterministic algorithms ask for


def no_gpu() -> str | None:
    """Why nothing here can run; torch is asked only where there is a driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not Path("/dev/nvidiactl").exists():
            return "needs a CUDA device: there is no driver"
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device: torch sees none"


class Skipped(pytest.Module):
    """A test file that is not imported."""

    why = ""

    def collect(self):
        pytest.skip(self.why, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if why := no_gpu():
        module = Skipped.from_parent(parent, path=module_path)
        module.why = why
        return module
    return None


@pytest.fixture(autouse=True)
def _asserted(monkeypatch):
    """Lists are checked before kernels read them."""
    from tests import asserts

    asserts.install(monkeypatch.setattr)


@pytest.fixture
def whole_float32():
    """Matrix products on the GPU round no factor."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
