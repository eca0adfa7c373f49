"""How messages show what a plan says."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from itertools import groupby, islice
from typing import Any

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60


def span(numbers: list[int]) -> str:
    """Layers that follow one another, as a plan writes them: `3` or `3-7`."""
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """Ascending numbers, taken apart where one is missing: 0, 1 and 5 are [0, 1] and [5]."""
    found = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in run] for _, run in found]


def series(numbers: Iterable[int]) -> str:
    """Any layers in a sentence: `3`, `3 and 7`, `3, 7 and 9`."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def dotted(path: tuple) -> str:
    return ".".join(str(key)[:64] for key in path)


def show(value: Any) -> str:
    """A value for an error message: short, whatever it is."""
    if type(value) is int and abs(value) >= 2**63:
        return "a number past 64 bits"
    if value is None or isinstance(value, str | int | float):
        return SHORT.repr(value)
    return f"a {type(value).__name__}"


def nearest(word: Any, known: Iterable[str]) -> str:
    """Advice for a word that is not among the known ones."""
    known = [str(each)[:64] for each in islice(known, 200)]
    close = difflib.get_close_matches(str(word)[:64], known, 1)
    if close:
        return f"did you mean {close[0]}?"
    return f"give one of {', '.join(known[:20])}" if known else "leave it out"
