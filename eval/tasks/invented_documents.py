"""Invented people and towns: questions that nobody can answer from memory.

They stand in for SQuAD and HotpotQA where those files are not given, as qa_1_invented (one document
answers) and qa_2_invented (two do). Their scores are not comparable with RULER's qa_1 and qa_2.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

from hfsparse_eval.tasks.documents import Book, DocumentQA, Question
from hfsparse_eval.tasks.needle_words import SPELLINGS, spell

PEOPLE, TOWNS = 1600, 400
TRADES = """
baker barber bookbinder brewer carpenter cartographer clockmaker cobbler cooper dyer farrier furrier
glassblower glover goldsmith locksmith mason miller potter printer ropemaker saddler sailmaker
tailor tanner thatcher tinker weaver wheelwright
""".split()


@lru_cache(maxsize=1)
def one_hop() -> Book:
    """Each question is answered in the document of one person, and there only."""
    people, _, documents = _world()
    questions = [
        Question(text, (answer,), (i,), (i,))
        for i, person in enumerate(people)
        for text, answer in (
            (f"From whom did {person['name']} learn a trade?", person["teacher"]),
            (f"What is the house of {person['name']} called?", person["house"]),
        )
    ]
    return Book(tuple(documents), tuple(questions))


@lru_cache(maxsize=1)
def two_hops() -> Book:
    """A person's document names a town, the town's document holds the answer."""
    people, towns, documents = _world()
    questions = []
    for i, person in enumerate(people):
        town = towns[person["born"]]
        needed = (i, len(people) + person["born"])
        place = f"the town where {person['name']} was born"
        questions += [
            Question(f"Which river flows through {place}?", (town["river"],), needed, needed),
            Question(f"Who founded {place}?", (town["founder"],), needed, needed),
        ]
    return Book(tuple(documents), tuple(questions))


@lru_cache(maxsize=1)
def _world() -> tuple[list[dict], list[dict], list[str]]:
    """People and towns, and the documents about them, people first. Every name is used once."""
    rng = Random("hfsparse invented facts 1")
    names = iter([spell(n).title() for n in rng.sample(SPELLINGS, 5 * PEOPLE + 4 * TOWNS)])
    towns = [
        {
            "town": next(names),
            "river": next(names),
            "founder": f"{next(names)} {next(names)}",
            "year": rng.randrange(1200, 1700),
            "trade": rng.choice(TRADES),
        }
        for _ in range(TOWNS)
    ]
    people = [
        {
            "name": f"{next(names)} {next(names)}",
            "teacher": f"{next(names)} {next(names)}",
            "house": next(names),
            "born": rng.randrange(TOWNS),
            "year": rng.randrange(1750, 1950),
            "trade": rng.choice(TRADES),
        }
        for _ in range(PEOPLE)
    ]
    documents = [_life(person, towns[person["born"]]["town"]) for person in people]
    return people, towns, documents + [_place(town) for town in towns]


def _life(person: dict, town: str) -> str:
    return (
        f"{person['name']}\n{person['name']}, a {person['trade']}, was born in {town} in the year "
        f"{person['year']}. {person['teacher']} taught {person['name']} this trade for "
        f"{person['year'] % 5 + 3} years. The two of them later rebuilt an old house by the road, "
        f"called {person['house']}, where the workshop still stands today."
    )


def _place(town: dict) -> str:
    return (
        f"{town['town']}\n{town['town']} is a town on the banks of the {town['river']}, the river "
        f"that flows through it from north to south. It was founded in {town['year']} by "
        f"{town['founder']}, a {town['trade']}, and has a market hall, two bridges and a long wall."
    )


TASKS = [DocumentQA("qa_1_invented", one_hop), DocumentQA("qa_2_invented", two_hops)]
