"""Which part of a long list a run of the tests asks: another one as the code changes."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

TESTS = Path(__file__).parent


@cache
def sources(tests: str) -> str:
    """A hash of hfsparse's code and of that in a folder of tests."""
    folders = TESTS.parent / "hfsparse", TESTS / tests
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def turn(parts: int, tests: str) -> int:
    """Which of so many parts, from 0."""
    return int(sources(tests), 16) % parts
