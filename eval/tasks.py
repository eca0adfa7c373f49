"""RULER's retrieval tasks (arXiv 2404.06654), by their names and exact wording.

A task draws one `Draft` from a random generator and a haystack size; it knows no tokenizer.
Unlike RULER, keys and values are never repeated inside a sample, so an answer has one place.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from random import Random

from . import text

SLOTS = [round(100 * i / 39) for i in range(40)]  # depths of a needle in prose, percent
EXAMPLE_TOKENS = 500  # at most, of the solved example before a vt question


@dataclass(frozen=True)
class Draft:
    """One sample before it is tokenised."""

    before: str  # of the user's message, up to the haystack
    context: str  # the haystack with its needles
    after: str  # the question
    prefix: str  # begins the assistant's turn
    answers: tuple[str, ...]
    gold: tuple[tuple[int, int], ...]  # characters of `context` that hold the answers
    depth: float  # mean place of those needles, percent of the haystack's sentences or lines

    @property
    def message(self) -> str:
        return self.before + self.context + self.after


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack: seven-digit numbers to be looked up by word."""

    name: str
    haystack: str  # noise, prose, or needles
    keys: int = 1
    queries: int = 1
    new_tokens: int = 128
    metric: str = "all"

    def step(self, length: int) -> int:
        """By how many words of prose or lines a sample that is too long is shortened."""
        short = length < 4096
        if self.haystack == "prose":
            return 50 if short else 500
        return 5 if short else 25

    def fitted(self, tokens: Callable[[str], int]) -> Niah:
        return self

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        """`size` counts words of prose, or lines. `depth` (percent) places a single needle."""
        lines = size if self.haystack == "needles" else 0
        keys = [text.key(n) for n in rng.sample(text.KEYS, self.keys + lines)]
        values = [str(n) for n in rng.sample(range(10**6, 10**7), self.keys + lines)]
        needles = [_needle(*pair) for pair in zip(keys, values, strict=True)]
        asked = rng.sample(range(self.keys), self.queries)
        order = rng.sample(range(self.keys), self.keys)
        units, places = self._haystack(rng, size, needles[self.keys :], depth)
        context, spans = _insert(
            units, places, [needles[i] for i in order], " " if self.haystack == "prose" else "\n"
        )
        kept = [order.index(i) for i in asked]
        query = _listed([keys[i] for i in asked])
        one = self.queries == 1
        kind = "number" if one else "numbers"
        return Draft(
            before=f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden "
            "within the following text. Make sure to memorize it. I will quiz you about the "
            f"{kind} afterwards.\n",
            context=context,
            after=f"\nWhat {'is' if one else 'are all'} the special magic {kind} for {query} "
            "mentioned in the provided text?",
            prefix=f" The special magic {kind} for {query} mentioned in the provided text "
            f"{'is' if one else 'are'}",
            answers=tuple(values[i] for i in asked),
            gold=tuple(spans[i] for i in kept),
            depth=_mean([100 * places[i] / len(units) for i in kept]) if depth is None else depth,
        )

    def _haystack(self, rng, size, distractors, depth) -> tuple[list[str], list[int]]:
        """Its sentences or lines, and ascending places among them for this task's needles."""
        if self.haystack == "prose":
            units = _excerpt(rng, size)
            depths = [depth] if depth is not None else sorted(rng.sample(SLOTS, self.keys))
            return units, [int(len(units) * d / 100) for d in depths]
        units = distractors or [text.NOISE] * size
        if depth is not None:
            return units, [int(len(units) * depth / 100)]
        return units, sorted(rng.sample(range(len(units)), self.keys))


@dataclass(frozen=True)
class VariableTracking:
    """One chain of assignments in noise; every variable that holds the value is asked for."""

    name: str = "vt"
    hops: int = 4
    example_lines: int = 5
    new_tokens: int = 30
    metric: str = "all"

    def step(self, length: int) -> int:
        return 5 if length < 4096 else 10

    def fitted(self, tokens: Callable[[str], int]) -> VariableTracking:
        """With the largest solved example within EXAMPLE_TOKENS."""

        def fits(lines: int) -> bool:
            return tokens(self._example(Random(0), lines)) <= EXAMPLE_TOKENS

        return replace(self, example_lines=largest(fits, self.hops + 1, 100) or self.hops + 1)

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        example = self._example(rng, self.example_lines)
        draft = self._problem(rng, size, letters=5)
        return replace(draft, before=f"{example}\n\n{draft.before}")

    def _example(self, rng: Random, lines: int) -> str:
        solved = self._problem(rng, lines, letters=3)
        return f"{solved.message}{solved.prefix} {' '.join(solved.answers)}"

    def _problem(self, rng: Random, size: int, letters: int) -> Draft:
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name != "VAR" and name not in names:
                names.append(name)
        value = str(rng.randrange(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
        places = sorted(rng.sample(range(size), len(chain)))
        context, spans = _insert([text.NOISE] * size, places, chain, "\n")
        return Draft(
            before="Memorize and track the chain(s) of variable assignment hidden in the "
            "following text.\n\n",
            context=context,
            after=f"\nQuestion: Find all variables that are assigned the value {value} in the "
            "text above.",
            prefix=" Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are: ",
            answers=tuple(names),
            gold=tuple(spans),
            depth=_mean([100 * place / size for place in places]),
        )


Task = Niah | VariableTracking

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Niah("niah_single_1", "noise"),
        Niah("niah_single_2", "prose"),
        Niah("niah_multikey_1", "prose", keys=4),
        Niah("niah_multikey_2", "needles"),
        Niah("niah_multiquery", "prose", keys=4, queries=4),
        VariableTracking(),
    )
}


def score(output: str, answers: Sequence[str]) -> float:
    """RULER's `all`: the share of the answers that the output contains, in any case.

    A substring test is safe here: answers are seven digits or five capitals.
    """
    found = clean(output).lower()
    return sum(answer.lower() in found for answer in answers) / len(answers)


def clean(output: str) -> str:
    """Stripped, with control characters made line breaks, as RULER does before it scores."""
    return "".join("\n" if ord(c) < 32 else c for c in output.strip()).strip()


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


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _excerpt(rng: Random, words: int) -> list[str]:
    """Sentences of `words` words of prose from a random sentence on, repeated past its end."""
    sentences = text.prose()
    start = rng.randrange(len(sentences))
    taken: list[str] = []
    at = start
    while len(taken) < words:
        taken += sentences[at % len(sentences)].split()
        at += 1
    return text.split_sentences(" ".join(taken[:words]))


def _insert(units, places, needles, glue) -> tuple[str, list[tuple[int, int]]]:
    """The haystack with needle i before unit `places[i]` (ascending), and where each needle is."""
    pieces, where = list(units), []
    for i, (place, needle) in enumerate(zip(places, needles, strict=True)):
        pieces.insert(place + i, needle)
        where.append(place + i)
    starts = [0, *accumulate(len(piece) + len(glue) for piece in pieces)]
    spans = [(starts[at], starts[at] + len(pieces[at].rstrip())) for at in where]
    return glue.join(pieces), spans


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def _mean(numbers: list[float]) -> float:
    return round(sum(numbers) / len(numbers), 1)
