"""Long answers, in which a decode selector may drift: list keys, sort, add up, copy.

What is asked for stands in prose. Scores say how much of the answer came, in its order; how long an
arm says the same tokens as the dense model is told by position, whether or not they are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random

from hfsparse_eval.tasks.draft import Draft, insert, mean_depth
from hfsparse_eval.tasks.haystack import draw_distinct, excerpt
from hfsparse_eval.tasks.needle_words import WORDS

MOST = 0.6  # of the length: what list and answer may take
SPARE = 1.25  # room for an answer, of what the right one takes


@dataclass(frozen=True)
class LongAnswer:
    """A list of `items` pieces; `write` makes the lines that hide it, question, prefix, answer."""

    name: str
    write: Callable[[Random, int], tuple[list[str], str, str, list[str]]]
    items: int
    new_tokens: int = 0  # once fitted
    metric: str = "sequence"
    suite, ruler, default, placed = "decode", False, True, False

    def step(self, length: int) -> int:
        return 50 if length < 4096 else 500

    def fitted(self, tokens: Callable[[str], int], length: int) -> LongAnswer:
        """With room for its answer, and fewer items where list and answer would take most of it."""
        lines, _, _, answers = self.write(Random(0), self.items)
        answer = SPARE * tokens("\n".join(answers))
        share = min(1.0, MOST * length / (tokens("\n".join(lines)) + answer))
        items = max(int(share * self.items), 2)
        return replace(self, items=items, new_tokens=math.ceil(answer * items / self.items))

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        """`size` counts the words of prose."""
        lines, question, prefix, answers = self.write(rng, self.items)
        units = excerpt(rng, size)
        places = sorted(rng.choices(range(len(units) + 1), k=len(lines)))
        context, spans = insert(units, places, lines, "\n")
        return Draft(
            before="Read the following text. A task about it follows.\n\n",
            context=context,
            after=f"\n\n{question}",
            prefix=prefix,
            answers=tuple(answers),
            gold=tuple(spans),
            depth=mean_depth(places, len(units)),
        )


def list_keys(rng: Random, items: int):
    """Every key, in the order of the text."""
    names, values = draw_distinct(rng, "word", items), draw_distinct(rng, "number", items)
    lines = [f"KEY {name} = {value}" for name, value in zip(names, values, strict=True)]
    question = "List every key of the text in its order, one a line, without its value."
    return lines, question, f" The {items} keys are:\nKEY", names


def sort_numbers(rng: Random, items: int):
    """The numbers of a list, smallest first."""
    numbers = rng.sample(range(100, 1000), items)
    line = f"The list to sort: {', '.join(map(str, numbers))}."
    question = "Sort the list of numbers in the text, smallest first."
    return [line], question, " The sorted list:", [str(n) for n in sorted(numbers)]


def add_up(rng: Random, items: int):
    """The total after each step of a sum."""
    steps = [rng.randrange(1, 10) for _ in range(items)]
    first = rng.randrange(10, 100)
    line = f"The sum to do: start at {first}, then add {', '.join(map(str, steps))}."
    question = "Do the sum of the text one number at a time. Write the total after each number."
    shown = [str(total) for total in accumulate(steps, initial=first)][1:]
    return [line], question, f" Starting at {first}, the totals are:", shown


def copy_words(rng: Random, items: int):
    """A passage, word by word."""
    words = rng.choices(WORDS, k=items)
    line = f"The passage to copy: <<{' '.join(words)}>>"
    return [line], "Copy the passage between << and >>.", " <<", words


TASKS = [
    LongAnswer("decode_keys", list_keys, 64),
    LongAnswer("decode_sort", sort_numbers, 64),
    LongAnswer("decode_sum", add_up, 64),
    LongAnswer("decode_copy", copy_words, 700),
]
