"""How kinds of patterns and selectors are made known to plans, and check their parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from hfsparse.errors import UsageError
from hfsparse.precision import on_host, without_autocast

LATER = "later"


class Registry(dict[str, type]):
    """Classes by the kind that plans name; what their `method` chooses, no autocast changes, and
    what they `bind` lies on the CPU."""

    def __init__(self, method: str):
        self.method = method

    def register(self, kind: str) -> Callable[[type], type]:
        """Make a class known to plans under `kind:`."""

        def add(cls: type) -> type:
            cls.kind = kind
            if hasattr(cls, self.method):
                setattr(cls, self.method, without_autocast(getattr(cls, self.method)))
            if hasattr(cls, "bind"):
                cls.bind = on_host(cls.bind)
            self[kind] = cls
            return cls

        return add


def later(default: Any) -> Any:
    """A parameter that plans knew nothing of when its kind was new.

    At its default it is not written, so that those plans keep their text and their hash.
    """
    return field(default=default, metadata={LATER: True})


def require(ok: bool, message: str) -> None:
    """Raise UsageError with `message` unless a parameter check holds."""
    if not ok:
        raise UsageError(message)


def require_shares(given: Any, *names: str) -> None:
    """Raise UsageError unless each of these parameters is more than 0 and at most 1."""
    for name in names:
        share = getattr(given, name)
        require(0 < share <= 1, f"{name} is {share}: give more than 0 and at most 1")
