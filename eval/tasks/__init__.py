"""The tasks of an evaluation. A task is one file here, with a list TASKS, and its line in FILES.

A task knows no tokenizer and no model: it draws a `Draft` (`draft.py`: text, question, answers, and
the characters of the text that hold the answers) from a random generator and a haystack size.
`run/samples.py` finds the largest size that fits a length in a model's own tokens. So this is all
that a file has to say:

    @dataclass(frozen=True)
    class Towers:
        name: str = "towers"
        new_tokens: int = 16
        metric: str = "all"
        suite, ruler, default, placed = "ruler", False, False, True

        def step(self, length): return 10
        def fitted(self, tokens, length): return self
        def draw(self, rng, size, depth=None): return Draft(…)

    TASKS = [Towers()]

It then runs by `hfsparse eval ruler MODEL --tasks towers`. A new score goes into `scores.METRICS`
by the task's own file. Unlike RULER's, no task repeats a key or a value inside a sample, so that an
answer has one place.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from random import Random
from typing import Protocol

from hfsparse_eval.tasks.documents import WITH_DATA, Book, DocumentQA
from hfsparse_eval.tasks.draft import Draft

# In the order in which a suite's tasks run.
FILES = """
needles
variable_tracking
word_counting
invented_documents
conversations
long_answers
""".split()


class Task(Protocol):
    """What a run asks of a task. Implementations are frozen: a task is the same for all samples."""

    name: str  # its own, of result lines and of --tasks; letters, digits and underscores
    suite: str  # the command that runs it: ruler, turns, decode (custom: the user's own questions)
    ruler: bool  # whether it is RULER's: only those enter the effective length
    default: bool  # whether its command runs it where --tasks is not given
    placed: bool  # whether its answers stand at places, which `recall` can look at (`Draft.gold`)
    new_tokens: int  # the most tokens of an answer (of each, in turns), once fitted
    metric: str  # of scores.METRICS: how an answer is scored against `Draft.answers`

    def step(self, length: int) -> int:
        """By how much the haystack of a sample too long for `length` tokens is shortened.

        0 where there is no haystack: the draft is taken as it is.
        """
        ...

    def fitted(self, tokens: Callable[[str], int], length: int) -> Task:
        """This task, with what depends on the length or on a tokenizer set: caps, examples, counts.

        tokens: the number of tokens of a text. Most tasks return themselves.
        """
        ...

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        """A sample of `size` words, lines, documents, …: whatever the task counts.

        The same state of `rng` gives the same draft for ever. depth: percent of the haystack at
        which a grid wants the needle; a task without such a place ignores it. A draft with `asks`
        is a conversation: its text is read first, then each is asked in turn over one KV cache.
        """
        ...


TASKS: dict[str, Task] = {
    task.name: task for file in FILES for task in import_module(f"{__name__}.{file}").TASKS
}


def of_suite(suite: str) -> dict[str, Task]:
    """The tasks that a command can run without further data."""
    return {name: task for name, task in TASKS.items() if task.suite == suite}


def with_books(squad: Book | None = None, hotpotqa: Book | None = None) -> dict[str, Task]:
    """RULER's suite, and the real qa_1 and qa_2 where their questions are given."""
    books = zip(WITH_DATA, (squad, hotpotqa), strict=True)
    real = {name: DocumentQA(name, lambda b=book: b) for name, book in books if book}
    return of_suite("ruler") | real


def is_rulers(name: str) -> bool:
    """Whether results of this name are RULER's: its own tasks, and those that stand in for them."""
    return name in WITH_DATA or (name in TASKS and TASKS[name].ruler)
