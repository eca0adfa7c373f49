"""What every task draws: a `Draft`, and the few steps that tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Ask:
    """A question about a text that was read before, and how its answer begins."""

    question: str
    prefix: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """One sample before it is tokenised."""

    before: str  # of the user's message, up to the haystack
    context: str  # the haystack with its needles
    after: str  # the question
    prefix: str  # begins the assistant's turn
    answers: tuple[str, ...]
    gold: tuple[tuple[int, int], ...]  # characters of `context` that hold the answers, if places do
    depth: float | None  # mean place of those, percent of the haystack's sentences, lines, …
    # Of a conversation, where `after` and `prefix` are empty:
    asks: tuple[Ask, ...] = field(default=(), repr=False)

    @property
    def message(self) -> str:
        return self.before + self.context + self.after


def insert(
    units: Sequence[str], places: Sequence[int], needles: Sequence[str], glue: str
) -> tuple[str, Spans]:
    """The haystack with needle i before unit `places[i]` (ascending), and where each needle is."""
    pieces, where = list(units), []
    for i, (place, needle) in enumerate(zip(places, needles, strict=True)):
        pieces.insert(place + i, needle)
        where.append(place + i)
    spans = spans_of(pieces, glue)
    return glue.join(pieces), [spans[at] for at in where]


def spans_of(pieces: Sequence[str], glue: str) -> Spans:
    """Where each piece stands once they are joined, without the blanks at its end."""
    starts = [0, *accumulate(len(piece) + len(glue) for piece in pieces)]
    return [
        (start, start + len(piece.rstrip())) for start, piece in zip(starts, pieces, strict=False)
    ]


def mean_depth(places: Sequence[int], of: int) -> float:
    """The mean of `places` in percent of the units they are counted in."""
    return round(sum(100 * place / of for place in places) / len(places), 1)


def largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number from `low` to `high` that fits, by bisection; None when not even `low`."""
    best = None
    while low <= high:
        middle = (low + high) // 2
        if fits(middle):
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best
