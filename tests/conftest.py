"""Fixtures for every test."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time, however slow the machine; look for new ones with
# `pytest --hypothesis-profile=explore`.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model: the folder HFSPARSE_SMOLLM2, or `.cache/smollm2`, built if missing."""
    from hfsparse_eval.smollm2 import build

    ready = os.environ.get("HFSPARSE_SMOLLM2")
    folder = Path(ready) if ready else Path(__file__).parents[1] / ".cache" / "smollm2"
    build(folder)
    return folder
