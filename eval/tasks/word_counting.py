"""Counting words over the whole context: RULER's aggregation tasks, cwe and fwe.

No place holds an answer, so drafts have no gold spans and no depth.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from hfsparse_eval.tasks.draft import Draft
from hfsparse_eval.tasks.needle_words import SPELLINGS, WORDS, spell

ZETA_2 = math.pi**2 / 6


@dataclass(frozen=True)
class CommonWords:
    """Ten words stand in a numbered list more often than all others, which stand equally often."""

    name: str = "cwe"
    common: int = 10
    often: int = 30
    rarely: int = 3
    # A solved one: other words, how often the ten, how often they; None shows none.
    example: tuple[int, int, int] | None = (30, 10, 3)
    new_tokens: int = 120
    metric: str = "all"
    suite, ruler, default, placed = "ruler", True, True, False

    def step(self, length: int) -> int:
        return 10

    def fitted(self, tokens: Callable[[str], int], length: int) -> CommonWords:
        """With the smaller counts that RULER takes below 4096 tokens."""
        if length >= 4096:
            return self
        return replace(self, often=6, rarely=1, example=self.example and (10, 3, 1))

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        """`size` counts the different words beside the common ones."""
        solved = self.example and self._problem(rng, *self.example)
        draft = self._problem(rng, size, self.often, self.rarely)
        if not solved:
            return draft
        shown = f"{solved.message}{solved.prefix} {_numbered(solved.answers)}"
        return replace(draft, before=f"{shown}\n\n{draft.before}")

    def _problem(self, rng: Random, size: int, often: int, rarely: int) -> Draft:
        words = distinct_words(rng, size + self.common)
        shown = " ".join(words)
        # A common word inside another ("oat" in "boat") would be found in a wrong answer.
        common = [word for word in words if shown.count(word) == 1][: self.common]
        listed = common * often + [word for word in words if word not in common] * rarely
        rng.shuffle(listed)
        return Draft(
            before="Below is a numbered list of words. In these words, some appear more often than "
            "others. Memorize the ones that appear most often.\n",
            context=_numbered(listed),
            after=f"\nQuestion: What are the {self.common} most common words in the above list?",
            prefix=f" Answer: The top {self.common} words that appear most often in the list are:",
            answers=tuple(common),
            gold=(),
            depth=None,
        )


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose counts fall as a zeta distribution (alpha 2); the first shows as `...`."""

    name: str = "fwe"
    letters: int = 6
    vocabulary: int = 80
    asked: int = 3
    new_tokens: int = 50
    metric: str = "all"
    suite, ruler, default, placed = "ruler", True, True, False

    def step(self, length: int) -> int:
        """Finer than RULER's L / 32: draws differ so much in tokens that most are shortened."""
        return max(length // 256, 1)

    def fitted(self, tokens: Callable[[str], int], length: int) -> FrequentWords:
        """With one coded word for 50 tokens, and always a word that is not asked for."""
        return replace(self, vocabulary=max((length - 50) // 50, self.asked + 2))

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        """`size` is what the counts are shares of: about the number of words."""
        words: dict[str, None] = {}
        while len(words) < self.vocabulary:
            words["".join(rng.choices(string.ascii_lowercase, k=self.letters))] = None
        coded = ["...", *list(words)[1:]]
        counts = self.counts(size)
        listed = [word for word, n in zip(coded, counts, strict=True) for _ in range(n)]
        rng.shuffle(listed)
        return Draft(
            before="Read the following coded text and track the frequency of each coded word. Find "
            "the three most frequently appeared coded words. ",
            context=" ".join(listed),
            after="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
            "are the three most frequently appeared words in the above coded text?",
            prefix=" Answer: According to the coded text above, the three most frequently appeared "
            "words are:",
            answers=tuple(coded[1 : 1 + self.asked]),
            gold=(),
            depth=None,
        )

    def counts(self, size: int) -> list[int]:
        """How often each rank stands: strictly falling down to the first that is not asked for."""
        shares = (1 / (ZETA_2 * rank**2) for rank in range(1, self.vocabulary + 1))
        return [
            max(math.floor(size * share), self.asked + 2 - place)
            for place, share in enumerate(shares)
        ]


def distinct_words(rng: Random, count: int) -> list[str]:
    """English words, and beyond our list of them also invented ones."""
    missing = max(count - len(WORDS), 0)
    return rng.sample(WORDS + [spell(n) for n in rng.sample(SPELLINGS, missing)], count)


def _numbered(words) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


TASKS = [CommonWords(), FrequentWords()]
