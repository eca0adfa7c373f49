"""How kinds of patterns and selectors check their parameters."""

from __future__ import annotations


def require(ok: bool, message: str) -> None:
    """Raise ValueError with `message` unless a parameter check holds."""
    if not ok:
        raise ValueError(message)
