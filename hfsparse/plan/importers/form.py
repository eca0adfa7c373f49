"""What readers of all forms share: their result, files, notes, errors that name every form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from hfsparse import reading
from hfsparse.errors import PlanError
from hfsparse.patterns import Pattern
from hfsparse.plan.diff import ranges
from hfsparse.plan.words import show

MAX_FILE = 1 << 24  # bytes
FORMS = {
    "minference": "a JSON list of layers, each {q head: [type, vertical, slash, score]}",
    "duo": "a folder of full_attention_heads.tsv (gates, layers x kv heads) and config.json",
    "moa": "JSON with alphas and betas, both layers x q heads",
    "modelopt": "JSON with a sparse_attention_config whose algorithm is skip_softmax",
}


@dataclass(frozen=True)
class Found:
    """What a file says of each head, before it is known whose heads they are."""

    rows: list[list[Pattern | None]]  # layers x heads; None is full; empty: of no head
    unit: str  # q_heads or kv_heads
    rings: bool  # the cache, too, keeps only what a head reads
    notes: list[str]
    skip: float | None = None  # nats, of all heads

    @property
    def shape(self) -> tuple[int, int] | None:
        return (len(self.rows), len(self.rows[0])) if self.rows else None


def note_heads(where: dict[int, list[int]], layer: int, heads: Sequence[bool]) -> None:
    """Remember which of a layer's heads a note speaks of, `[heads]`."""
    if any(heads):
        where[layer] = [head for head, marked in enumerate(heads) if marked]


def describe_heads(where: dict[int, list[int]]) -> str:
    """Heads by layer: `layers 0-3 heads 0-2, 5; layer 7 head 1`."""
    pieces = []
    for heads, run in groupby(where.items(), key=lambda item: item[1]):
        layers = [layer for layer, _ in run]
        pieces.append(f"{_count('layer', layers)} {_count('head', heads)}")
    return "; ".join(pieces)


def _count(unit: str, numbers: list[int]) -> str:
    return f"{unit}{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def read_text(path: Path, form: str) -> str:
    """A file's UTF-8 text."""
    try:
        data = reading.content(path, MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ValueError(f"it is over {MAX_FILE} bytes")
        return reading.decode(data)
    except (OSError, ValueError) as error:
        raise no_plan(path, form, reading.why(error)) from None


def read_json(path: Path, form: str) -> Any:
    """A file's JSON."""
    found = read_text(path, form)
    try:
        return reading.parse(found)
    except ValueError as error:
        raise no_plan(path, form, str(error)) from None


def check_rectangle(path: Path, form: str, rows: Any, name: str = "it") -> None:
    """Raise unless `rows` are layers of equally many heads."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise no_plan(path, form, f"{name} is {describe(rows)}, not layers x heads")
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1 or not widths[0]:
        found = " and ".join(map(str, widths[:5]))
        raise no_plan(path, form, f"{name} has layers of {found} heads")


def note_unread(data: dict, *known: str) -> list[str]:
    """A note that names the keys of a file that are not among the known ones, if it has any."""
    more = [show(key) for key in data if key not in known]
    return [f"keys of the file that are not read: {', '.join(more[:9])}"] if more else []


def describe(data: Any) -> str:
    """Data in a few words: what was found instead of a plan."""
    if isinstance(data, dict):
        keys = ", ".join(show(key) for key in list(data)[:5])
        return f"a mapping with the keys {keys}" if keys else "an empty mapping"
    if isinstance(data, list):
        return f"a list of {len(data)}" if data else "an empty list"
    return show(data)


def no_plan(path: Path, form: str, what: str) -> PlanError:
    """The error for a file that is no plan of `form`: what was found, and what each form is."""
    forms = sorted(FORMS, key=lambda name: name != form)  # the one asked for first
    known = "; ".join(f"{name} is {FORMS[name]}" for name in forms)
    return PlanError(f"{path}: no {form} plan: {what}. {known}")
