"""Needles in a haystack: RULER's eight retrieval tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from string import ascii_uppercase
from uuid import UUID

from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.draft import Draft, insert, mean_depth

SLOTS = [round(100 * i / 39) for i in range(40)]  # depths of a needle in prose, percent


@dataclass(frozen=True)
class Niah:
    """Values to be looked up by key."""

    name: str
    haystack: str  # noise, prose, or needles
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1
    key: str = "word"  # or uuid
    value: str = "number"  # or uuid
    new_tokens: int = 128
    metric: str = "all"
    own: tuple[str, ...] = field(default=(), repr=False)  # sentences in place of the prose

    @property
    def needles(self) -> int:
        return self.keys * self.values

    def step(self, length: int) -> int:
        """By how many words of prose or lines a sample that is too long is shortened."""
        if self.key == "uuid":
            return 1  # RULER's 25 lines of two uuids each would leave half of 4096 tokens empty
        short = length < 4096
        if self.haystack == "prose":
            return 50 if short else 500
        return 5 if short else 25

    def fitted(self, tokens: Callable[[str], int], length: int) -> Niah:
        """With more room for its answers than RULER's where many are asked for."""
        values = some(Random(0), self.value, self.queries * self.values)
        return replace(self, new_tokens=max(self.new_tokens, 2 * tokens(", ".join(values))))

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        """`size` counts words of prose, or lines.

        `depth` (percent) places the first needle; further ones follow evenly up to the end.
        """
        lines = size if self.haystack == "needles" else 0
        keys = some(rng, self.key, self.keys + lines)
        values = some(rng, self.value, self.needles + lines)
        owners = [i // self.values for i in range(self.needles)] + [*range(self.keys, len(keys))]
        lines = [self._needle(keys[i], value) for i, value in zip(owners, values, strict=True)]
        asked = rng.sample(range(self.keys), self.queries)
        order = rng.sample(range(self.needles), self.needles)
        units, places = self._haystack(rng, size, lines[self.needles :], depth)
        glue = " " if self.haystack == "prose" else "\n"
        context, spans = insert(units, places, [lines[i] for i in order], glue)
        wanted = [i for key in asked for i in range(self.needles) if owners[i] == key]
        kept = [order.index(i) for i in wanted]
        return Draft(
            context=context,
            answers=tuple(values[i] for i in wanted),
            gold=tuple(spans[i] for i in kept),
            depth=mean_depth([places[i] for i in kept], len(units)) if depth is None else depth,
            **self._wording(_listed([keys[i] for i in asked])),
        )

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value}s for {key} is: {value}."

    def _wording(self, query: str) -> dict[str, str]:
        one = self.queries * self.values == 1
        kind = self.value if one else f"{self.value}s"
        asked = f"the special magic {kind} for {query} mentioned in the provided text"
        return {
            "before": f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} "
            "hidden within the following text. Make sure to memorize it. I will quiz you about the "
            f"{kind} afterwards.\n",
            "after": f"\nWhat {'is' if one else 'are all'} {asked}?",
            "prefix": f" T{asked[1:]} {'is' if one else 'are'}",
        }

    def _haystack(self, rng, size, distractors, depth) -> tuple[list[str], list[int]]:
        """Its sentences or lines, and ascending places among them for this task's needles."""
        step = 0 if depth is None else (100 - depth) / self.needles
        depths = [] if depth is None else [depth + step * i for i in range(self.needles)]
        if self.haystack == "prose":
            units = excerpt(rng, size, self.own)
            depths = depths or sorted(_drawn(rng, SLOTS, self.needles))
            return units, [int(len(units) * d / 100) for d in depths]
        units = distractors or [text.NOISE] * size
        if depths:
            return units, [int(len(units) * d / 100) for d in depths]
        return units, sorted(_drawn(rng, range(len(units)), self.needles))


def _drawn(rng: Random, places: Sequence[int], count: int) -> list[int]:
    """Each place once, unless there are too few."""
    return rng.sample(places, count) if count <= len(places) else rng.choices(places, k=count)


def some(rng: Random, kind: str, count: int) -> list[str]:
    """`count` distinct words, five capital letters, seven-digit numbers or version 4 uuids."""
    if kind == "word":
        return [text.key(n) for n in rng.sample(text.KEYS, count)]
    if kind == "letters":
        return [_capitals(n) for n in rng.sample(range(26**5), count)]
    if kind == "number":
        return [str(n) for n in rng.sample(range(10**6, 10**7), count)]
    return [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def _capitals(number: int) -> str:
    return "".join(ascii_uppercase[number // 26**place % 26] for place in range(5))


def excerpt(rng: Random, words: int, own: Sequence[str] = ()) -> list[str]:
    """Sentences of `words` words of prose from a random sentence on, repeated past its end."""
    sentences = own or text.prose()
    start = rng.randrange(len(sentences))
    taken: list[str] = []
    at = start
    while len(taken) < words:
        taken += text.words(f"{sentences[at % len(sentences)]} ")
        at += 1
    found = text.split_sentences("".join(taken[:words]).rstrip())
    return [piece for sentence in found for piece in text.cut(sentence)] if own else found


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"
