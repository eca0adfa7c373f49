"""The profiler's puzzles, and those that no method is calibrated on."""

from __future__ import annotations

from random import Random

from hfsparse.profiler.prompts.puzzles import OTHERS, PUZZLES, Ask, Puzzle
from hfsparse_eval.tasks.haystack import KEYS, key


def needles(rng: Random, facts: int) -> Puzzle:
    """RULER's needles, several of them asked for one after another."""
    keys = [key(n) for n in rng.sample(KEYS, facts)]
    values = [str(n) for n in rng.sample(range(10**6, 10**7), facts)]
    rows = list(zip(keys, values, strict=True))
    said = "special magic number for {} mentioned in the provided text"
    return Puzzle(
        task="Some special magic numbers are hidden within the following text.",
        facts=tuple(f"One of the special magic numbers for {k} is: {v}." for k, v in rows),
        question="",
        answer="",
        asks=tuple(
            Ask(f"What is the {said.format(k)}?", f" The {said.format(k)} is", f" {v}")
            for k, v in rows
        ),
    )


PLAYED = {
    **OTHERS,
    ("needles", "prose"): needles,
    ("needles", "code"): needles,
    **PUZZLES,
}
