"""Variable tracking: RULER's multi-hop task."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.draft import Draft, insert, largest, mean_depth

EXAMPLE_TOKENS = 500  # at most, of the solved example before the question


@dataclass(frozen=True)
class VariableTracking:
    """One chain of assignments in noise; every variable that holds the value is asked for."""

    name: str = "vt"
    hops: int = 4
    example_lines: int = 5
    new_tokens: int = 30
    metric: str = "all"
    suite, ruler, default, placed = "ruler", True, True, True

    def step(self, length: int) -> int:
        return 5 if length < 4096 else 10

    def fitted(self, tokens: Callable[[str], int], length: int) -> VariableTracking:
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
        context, spans = insert([text.NOISE] * size, places, chain, "\n")
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
            depth=mean_depth(places, size),
        )


TASKS = [VariableTracking()]
