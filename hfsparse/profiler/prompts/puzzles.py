"""Questions about facts hidden in a text: looked up directly, or followed from one to the next.

For models that answer no questions there are completions: what the text has said begins once more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

FIRST = (
    "Adaeze Amira Anselm Birgit Bogdan Camila Chiara Dalia Dmitri Elif Esteban Farida Goran Hana "
    "Henrik Ingrid Ismael Jolanta Kofi Leila Lorenzo Marta Mateus Nadia Niamh Oskar Petra Priya "
    "Quentin Rashid Rosalind Sanna Soren Tamar Tomas Ulrike Viktor Wanjiru Yusuf Zofia"
).split()
LAST = (
    "Abara Almeida Bergstrom Castellan Dahl Eriksen Ferreira Gallo Haddad Ibarra Janssen Kowalski "
    "Lindqvist Marchetti Novak Okafor Petrov Quispe Rahimi Sandoval Takeda Ueland Varga Whitlock "
    "Yilmaz Zeman"
).split()
THINGS = (
    "brass compass,ivory chess set,red toolbox,silver harmonica,walnut violin,copper kettle,"
    "green sextant,leather atlas,porcelain owl,field telescope"
).split(",")
NAMES = (
    "alder aspen birch cedar cypress elder hazel hickory hornbeam juniper laurel linden maple "
    "mulberry osier poplar quince rowan sorrel spruce sumac tamarack willow yew"
).split()


@dataclass(frozen=True)
class Ask:
    """One question, and the answer in two parts: how it begins (as its fact does), and the rest."""

    question: str  # "": none is asked, the answer follows the text as if it were part of it
    lead: str
    value: str


@dataclass(frozen=True)
class Puzzle:
    """Facts to hide, in this order, and what is asked about them."""

    task: str  # said before the text
    facts: tuple[str, ...]
    question: str
    answer: str
    asks: tuple[Ask, ...]  # the same facts one by one


def _draw_code(rng: Random) -> str:
    """A value that nothing else in the text resembles, such as `K7-402QX`."""
    letters = [rng.choice("BCDFGHKMPQRTVWXZ") for _ in range(3)]
    return f"{letters[0]}{rng.randrange(2, 10)}-{rng.randrange(100, 1000)}{letters[1]}{letters[2]}"


def _draw_people(rng: Random, count: int) -> list[str]:
    firsts, lasts = rng.sample(FIRST, count), rng.sample(LAST, count)
    return [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]


def _choose_asked(rng: Random, rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Half of the facts, in an order that isn't the text's."""
    return rng.sample(rows, (len(rows) + 1) // 2)


def _join_words(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def rooms(rng: Random, facts: int) -> Puzzle:
    """Who has moved to which room; several people asked about."""
    rows = [(person, _draw_code(rng)) for person in _draw_people(rng, facts)]
    asked = _choose_asked(rng, rows)
    return Puzzle(
        task="Read the manual below. Notes about staff and their rooms are mixed into it.",
        facts=tuple(f"Staff note: {person} has moved to room {room}." for person, room in rows),
        question=f"Which room did each move to: {_join_words([person for person, _ in asked])}?",
        answer="\n".join(f"{person} is in room {room}." for person, room in asked),
        asks=tuple(
            Ask(f"Which room did {person} move to?", f"{person} has moved to room", f" {room}")
            for person, room in rows
        ),
    )


def badges(rng: Random, facts: int) -> Puzzle:
    """Entries of a table spread over source code; several looked up."""
    rows = [(person, _draw_code(rng)) for person in _draw_people(rng, facts)]
    asked = _choose_asked(rng, rows)
    return Puzzle(
        task="Read the source code below. It fills the table BADGES in several places.",
        facts=tuple(f'BADGES["{person}"] = "{badge}"' for person, badge in rows),
        question=f"What does BADGES hold for {_join_words([person for person, _ in asked])}?",
        answer="\n".join(f'BADGES["{person}"] is "{badge}".' for person, badge in asked),
        asks=tuple(
            Ask(f"What does BADGES hold for {person}?", f'BADGES["{person}"] = "', badge)
            for person, badge in rows
        ),
    )


def hands(rng: Random, facts: int) -> Puzzle:
    """Two things go from hand to hand; one's whole way is asked."""
    thing, other = rng.sample(THINGS, 2)
    people = _draw_people(rng, facts + 2)
    mine, theirs = people[: len(people) // 2 + 1], people[len(people) // 2 + 1 :]
    passed = [f"{giver} gave the {thing} to {taker}." for giver, taker in pairwise(mine)]
    noise = [f"{giver} gave the {other} to {taker}." for giver, taker in pairwise(theirs)]
    return Puzzle(
        task="Read the manual below. Somewhere in it, people give things to one another.",
        facts=tuple(_interleave(passed, noise)),
        question=f"Through whose hands did the {thing} go, and who has it now?",
        answer=f"{', then '.join(mine)}. Now {mine[-1]} has it.",
        asks=tuple(
            Ask(
                f"To whom did {giver} give the {thing}?",
                f"{giver} gave the {thing} to",
                f" {taker}",
            )
            for giver, taker in pairwise(mine)
        ),
    )


def aliases(rng: Random, facts: int) -> Puzzle:
    """Names bound to names in source code; the value of the last one is asked."""
    names = rng.sample(NAMES, facts + 1)
    mine, theirs = names[: facts // 2 + 1], names[facts // 2 + 1 :]
    value, other = _draw_code(rng), _draw_code(rng)
    bound = [f'{mine[0]} = "{value}"'] + [f"{new} = {old}" for old, new in pairwise(mine)]
    noise = [f'{theirs[0]} = "{other}"'] + [f"{new} = {old}" for old, new in pairwise(theirs)]
    return Puzzle(
        task="Read the source code below. It binds a few names of trees.",
        facts=tuple(_interleave(bound, noise)),
        question=f"What is the value of {mine[-1]}, and through which names did it get there?",
        answer=f'{", then ".join(mine)}. The value of {mine[-1]} is "{value}".',
        asks=tuple(
            Ask(f"What is {name} bound to?", f"{name} =", f" {held}")
            for held, name in [(f'"{value}"', mine[0]), *pairwise(mine)]
        ),
    )


def numbers(rng: Random, facts: int) -> Puzzle:
    """A few things with a number each: what small models can still do."""
    things = rng.sample(THINGS, max(2, facts * 3 // 8))
    rows = [(thing, str(rng.randrange(1000, 10000))) for thing in things]
    asked = _choose_asked(rng, rows)
    return Puzzle(
        task="Read the text below. Numbers of a few things are mixed into it.",
        facts=tuple(f"The number engraved on the {thing} is {number}." for thing, number in rows),
        question=f"Which numbers are engraved on the {_join_words([thing for thing, _ in asked])}?",
        answer="\n".join(f"The number engraved on the {thing} is {n}." for thing, n in asked),
        asks=tuple(
            Ask(
                f"Which number is engraved on the {thing}?",
                f"The number engraved on the {thing} is",
                f" {number}",
            )
            for thing, number in rows
        ),
    )


def plain_numbers(rng: Random, facts: int) -> Puzzle:
    """The same numbers, without questions."""
    puzzle = numbers(rng, facts)
    return replace(puzzle, asks=tuple(replace(ask, question="") for ask in puzzle.asks))


def needle(rng: Random, facts: int) -> Puzzle:
    """One number alone."""
    puzzle = plain_numbers(rng, facts)
    return replace(puzzle, facts=puzzle.facts[:1], asks=puzzle.asks[:1])


def repeated_list(rng: Random, facts: int) -> Puzzle:
    """A list that has been said twice goes on: after two of its words comes the third."""
    words = rng.sample(NAMES, 3 * max(2, facts // 2))
    said = f"The trees along the path: {', '.join(words)}."
    threes = [words[at : at + 3] for at in range(0, len(words), 3)]
    return Puzzle(
        task="Read the text below. A list is repeated in it.",
        facts=(said, said),
        question="Which trees stand along the path?",
        answer=said,
        asks=tuple(Ask("", f"{first}, {second},", f" {third}") for first, second, third in threes),
    )


def passage(rng: Random, facts: int) -> Puzzle:
    """A passage of a few sentences, each said once more up to its end."""
    people, places = _draw_people(rng, facts // 2), rng.sample(NAMES, facts // 2)
    things = rng.sample(THINGS, facts // 2)
    sentences = [
        (f"{person} carried the {thing} to the house beside the", f" {place}")
        for person, thing, place in zip(people, things, places, strict=True)
    ]
    whole = " ".join(f"{start}{end}." for start, end in sentences)
    return Puzzle(
        task="Read the text below. One passage of it is said once more.",
        facts=(whole,),
        question="Who carried what to which house?",
        answer=whole,
        asks=tuple(Ask("", start, end) for start, end in sentences),
    )


def _interleave(a: list[str], b: list[str]) -> list[str]:
    """Both chains in their own order, one step of each in turn."""
    pairs = [[*a[i : i + 1], *b[i : i + 1]] for i in range(max(len(a), len(b)))]
    return [step for pair in pairs for step in pair]


PUZZLES = {
    ("retrieval", "prose"): rooms,
    ("retrieval", "code"): badges,
    ("multihop", "prose"): hands,
    ("multihop", "code"): aliases,
}
# No plan is calibrated on these.
OTHERS = {("numbers", "prose"): numbers, ("numbers", "code"): numbers}
# For models that can do none of the others, from hard to easy.
COMPLETIONS = {
    ("facts", "prose"): plain_numbers,
    ("needle", "noise"): needle,
    ("list", "prose"): repeated_list,
    ("copy", "prose"): passage,
}
