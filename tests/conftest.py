"""Fixtures for every test."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model: the folder HFSPARSE_SMOLLM2, or `.cache/smollm2`, built if missing."""
    from hfsparse_eval.smollm2 import build

    ready = os.environ.get("HFSPARSE_SMOLLM2")
    folder = Path(ready) if ready else Path(__file__).parents[1] / ".cache" / "smollm2"
    build(folder)
    return folder
