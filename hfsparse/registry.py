"""How kinds of patterns and selectors check their parameters."""

from __future__ import annotations

from hfsparse.errors import UsageError


def require(ok: bool, message: str) -> None:
    """Raise UsageError with `message` unless a parameter check holds."""
    if not ok:
        raise UsageError(message)
