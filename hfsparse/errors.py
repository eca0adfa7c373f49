"""What users see when something is wrong: every error of this package is an `Error`."""

from __future__ import annotations


class Error(ValueError):
    """The base of every error that hfsparse raises for what it was given."""


class PatchError(Error):
    """A model that can't be patched, or is used in a way its patch can't follow."""


class CacheError(Error):
    """A cache is used in a way that would give wrong answers."""


class UsageError(Error):
    """What the user gave can't be used. Command lines print it as one line, `error: …`."""


def first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
