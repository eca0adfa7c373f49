"""Long answers, in which a decode selector may drift: list keys, sort, add up, copy.

What is asked for stands in prose. Scores say how much of the answer came, in its order; how long an
arm says the same tokens as the dense model is told by position, whether or not they are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from random import Random
from statistics import mean, median

from .cells import Outcome
from .counting import WORDS
from .drafts import Draft, insert, mean_depth
from .niah import excerpt, some
from .render import ALONE, Part, Table

BINS = (0, 16, 64, 256, 1024, 4096)  # positions in the answer, tokens
MOST = 0.6  # of the length: what list and answer may take
SPARE = 1.25  # room for an answer, of what the right one takes


@dataclass(frozen=True)
class Decode:
    """A list of `items` pieces; `write` makes the lines that hide it, question, prefix, answer."""

    name: str
    write: Callable[[Random, int], tuple[list[str], str, str, list[str]]]
    items: int
    new_tokens: int = 0  # once fitted
    metric: str = "sequence"

    def step(self, length: int) -> int:
        return 50 if length < 4096 else 500

    def fitted(self, tokens: Callable[[str], int], length: int) -> Decode:
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


def keys(rng: Random, items: int):
    """Every key, in the order of the text."""
    names, values = some(rng, "word", items), some(rng, "number", items)
    lines = [f"KEY {name} = {value}" for name, value in zip(names, values, strict=True)]
    question = "List every key of the text in its order, one a line, without its value."
    return lines, question, f" The {items} keys are:\nKEY", names


def ordered(rng: Random, items: int):
    """The numbers of a list, smallest first."""
    numbers = rng.sample(range(100, 1000), items)
    line = f"The list to sort: {', '.join(map(str, numbers))}."
    question = "Sort the list of numbers in the text, smallest first."
    return [line], question, " The sorted list:", [str(n) for n in sorted(numbers)]


def totals(rng: Random, items: int):
    """The total after each step of a sum."""
    steps = [rng.randrange(1, 10) for _ in range(items)]
    first = rng.randrange(10, 100)
    line = f"The sum to do: start at {first}, then add {', '.join(map(str, steps))}."
    question = "Do the sum of the text one number at a time. Write the total after each number."
    shown = [str(total) for total in accumulate(steps, initial=first)][1:]
    return [line], question, f" Starting at {first}, the totals are:", shown


def copy(rng: Random, items: int):
    """A passage, word by word."""
    words = rng.choices(WORDS, k=items)
    line = f"The passage to copy: <<{' '.join(words)}>>"
    return [line], "Copy the passage between << and >>.", " <<", words


DECODES: dict[str, Decode] = {
    task.name: task
    for task in (
        Decode("decode_keys", keys, 64),
        Decode("decode_sort", ordered, 64),
        Decode("decode_sum", totals, 64),
        Decode("decode_copy", copy, 700),
    )
}


def agreement(dense: Sequence[int], sparse: Sequence[int]) -> list[bool]:
    """By position of the longer answer: whether both say the same token there."""
    longer = max(len(dense), len(sparse))
    return [dense[i : i + 1] == sparse[i : i + 1] for i in range(longer)]


def first_difference(same: Sequence[bool]) -> int | None:
    return same.index(False) if False in same else None


def by_position(outcome: Outcome) -> Part:
    """Where answers first differ from the dense ones, and the share of equal tokens by position."""
    if not any(cell.sparse for cell in outcome.cells):
        return ALONE
    spans = list(pairwise(BINS))
    rows = []
    for cell in outcome.cells:
        pairs = zip(cell.dense, cell.sparse, strict=True)
        same = [agreement(d["output_ids"], s["output_ids"]) for d, s in pairs]
        firsts = [at for one in same if (at := first_difference(one)) is not None]
        row = [cell.task, cell.length, f"{len(same) - len(firsts)} of {len(same)}"]
        row.append(f"{median(firsts):g}" if firsts else "–")
        for low, high in spans:
            seen = [equal for one in same for equal in one[low:high]]
            row.append(f"{100 * mean(seen):.0f}" if seen else "–")
        rows.append(row)
    shares = [f"{low} to {high - 1}, %" for low, high in spans]
    return Table(["task", "length", "whole answers equal", "first difference", *shares], rows)
