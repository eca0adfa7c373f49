"""Conversations: one text, read before any question is known, and five questions in turn.

The forms of SCBench's string tasks (arXiv 2412.10319), and RULER's needles asked one by one. A plan
that drops keys shows it in the turns: what the first question does not need, a later one does.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from hfsparse_eval.tasks.draft import Ask, Draft, Spans, insert, mean_depth, spans_of
from hfsparse_eval.tasks.haystack import NOISE, SLOTS, draw_distinct, excerpt

ASKED = 5
HOPS = 2  # of a chain of variables
END = 6  # letters of a string that its question names


@dataclass(frozen=True)
class Conversation:
    name: str
    write: Callable[[Random, int], Draft]  # of a size in lines, strings or words
    unit: int  # by which the size grows
    new_tokens: int  # of each answer
    metric: str = "all"
    suite, ruler, default, placed = "turns", False, True, True

    def step(self, length: int) -> int:
        return self.unit

    def fitted(self, tokens: Callable[[str], int], length: int) -> Conversation:
        return self

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        return self.write(rng, size)


def key_values(rng: Random, size: int) -> Draft:
    """A JSON object of `size` uuid pairs and those asked for: a key is given, its value wanted."""
    keys, values = (draw_distinct(rng, "uuid", size + ASKED) for _ in range(2))
    pairs = [f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True)]
    asked = rng.sample(range(len(pairs)), ASKED)
    return _draft(
        "Below is a JSON object. Questions about it follow.\n\n",
        ",\n".join(pairs),
        [spans_of(pairs, ",\n")[i] for i in asked],
        mean_depth(asked, len(pairs)),
        [Ask(f'What is the value of "{keys[i]}"?', " The value is", (values[i],)) for i in asked],
    )


def prefix_suffix(rng: Random, size: int) -> Draft:
    """A list of strings, 24 to 40 letters (SCBench: 65 to 123); one is wanted by its two ends."""
    strings: list[str] = []
    ends: set[str] = set()
    while len(strings) < size + ASKED:
        new = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(24, 40)))
        if not ends & (both := {new[:END], new[-END:]}):
            strings.append(new)
            ends |= both
    asked = rng.sample(range(len(strings)), ASKED)
    asks = [
        Ask(
            f"Which string begins with {strings[i][:END]} and ends with {strings[i][-END:]}?",
            " The string is",
            (strings[i],),
        )
        for i in asked
    ]
    gold = [spans_of(strings, "\n")[i] for i in asked]
    before = "Below is a list of strings. Questions about it follow.\n\n"
    return _draft(before, "\n".join(strings), gold, mean_depth(asked, len(strings)), asks)


def variables(rng: Random, size: int) -> Draft:
    """Chains of assignments, mixed in noise: a value is given, every variable that holds it wanted.

    SCBench asks about two chains.
    """
    letters = draw_distinct(rng, "letters", ASKED * (HOPS + 1))
    chains = [letters[i::ASKED] for i in range(ASKED)]
    values = [str(n) for n in rng.sample(range(10000, 99999), ASKED)]
    lines = [
        iter([f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))])
        for names, value in zip(chains, values, strict=True)
    ]
    owners = [chain for chain in range(ASKED) for _ in range(HOPS + 1)]
    rng.shuffle(owners)
    places = sorted(rng.choices(range(size + 1), k=len(owners)))
    needles = [next(lines[chain]) for chain in owners]
    context, spans = insert([NOISE] * size, places, needles, "\n")
    asks = [
        Ask(
            f"Which {HOPS + 1} variables are assigned the value {value}?",
            f" {HOPS + 1} variables are assigned the value {value}, they are:",
            tuple(names),
        )
        for names, value in zip(chains, values, strict=True)
    ]
    gold = [span for _, span in sorted(zip(owners, spans, strict=True))]
    before = "Memorize the variable assignments hidden in the following text.\n\n"
    return _draft(before, context, gold, mean_depth(places, size), asks)


def needles(rng: Random, size: int) -> Draft:
    """RULER's numbers by keys, in `size` words of prose: each key is asked for in its own turn."""
    keys, values = draw_distinct(rng, "word", ASKED), draw_distinct(rng, "number", ASKED)
    units = excerpt(rng, size)
    places = [int(len(units) * depth / 100) for depth in sorted(rng.sample(SLOTS, ASKED))]
    said = [
        f"One of the special magic numbers for {key} is: {value}."
        for key, value in zip(keys, values, strict=True)
    ]
    context, spans = insert(units, places, said, " ")
    asked = rng.sample(range(ASKED), ASKED)
    about = [f"he special magic number for {key} mentioned in the provided text" for key in keys]
    return _draft(
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "them. I will quiz you about the numbers afterwards.\n",
        context,
        [spans[i] for i in asked],
        mean_depth(places, len(units)),
        [Ask(f"What is t{about[i]}?", f" T{about[i]} is", (values[i],)) for i in asked],
    )


def _draft(before: str, context: str, gold: Spans, depth: float, asks: Sequence[Ask]) -> Draft:
    answers = tuple(answer for ask in asks for answer in ask.answers)
    return Draft(before, context, "", "", answers, tuple(gold), depth, tuple(asks))


TASKS = [
    Conversation("turns_kv", key_values, 1, 48),
    Conversation("turns_prefix_suffix", prefix_suffix, 1, 48),
    Conversation("turns_vt", variables, 5, 32),
    Conversation("turns_niah", needles, 50, 24),
]


def describe_turns(gold: bool, known: bool) -> str:
    """How conversations go, for the report."""
    return (
        f"{'right' if gold else 'own'} answers go on; the text is read "
        f"{'with the first question' if known else 'before any question is known'}"
    )
