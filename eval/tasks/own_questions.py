"""Questions of the user's own: one JSON object a line, with the prompt and its right answers.

{"prompt": "…", "answers": ["12 May", "May 12"], "id": "contract-7", "turns": [{"prompt": "And …?",
 "answers": ["…"]}]}

`id` (else the line's number) and `turns` (what is asked next, over the same KV cache) may be left
out. Prompts are run whole, as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from hfsparse import reading
from hfsparse.errors import UsageError
from hfsparse.plan.words import show
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.draft import Ask, Draft

TURN_KEYS = {"prompt", "answers"}
KEYS = TURN_KEYS | {"id", "turns"}


NAME = "custom"  # of all of them, in result lines


@dataclass(frozen=True)
class Question:
    """A task of one sample, whose draft is given; conversations have the questions of all turns."""

    id: str
    line: int  # of the file
    draft: Draft
    new_tokens: int = 64  # of each answer
    metric: str = "part"
    name: str = NAME
    suite, ruler, default, placed = NAME, False, True, False

    def step(self, length: int) -> int:
        """Nothing is shortened: prompts are run whole."""
        return 0

    def fitted(self, tokens: Callable[[str], int], length: int) -> Question:
        return self

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        return self.draft


def read(path: Path, **set) -> tuple[list[Question], str]:
    """The file's questions, and its name and hash; UsageError names the first line that is bad.

    set: `new_tokens` and `metric` of every question, where they are not the usual ones.
    """
    content, mark = text.read(path)
    items: dict[str, Question] = {}
    for number, line in reading.rows(content):
        try:
            item = _question(reading.parse(line), number)
            if item.id in items:
                raise ValueError(f"id {item.id} is that of line {items[item.id].line}, too")
        except ValueError as problem:
            raise UsageError(f"{path}, line {number}: {problem}") from None
        items[item.id] = replace(item, **set)
    if not items:
        raise UsageError(f"{path} holds no question: give one JSON object a line")
    return [*items.values()], mark


def _question(row, number: int) -> Question:
    _check_keys(row, KEYS)
    turns = row.get("turns", [])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("turns is no list of objects")
    for turn in turns:
        _check_keys(turn, TURN_KEYS)
    first, *later = (_read_ask(turn) for turn in [row, *turns])
    name = row.get("id", number)
    if not isinstance(name, str | int) or name == "":
        raise ValueError("id is no string")
    answers = tuple(answer for ask in (first, *later) for answer in ask.answers)
    asks = (Ask("", "", first.answers), *later) if later else ()
    return Question(str(name), number, Draft("", first.question, "", "", answers, (), None, asks))


def _check_keys(row, known: set[str]) -> None:
    if not isinstance(row, dict) or row.keys() - known:
        found = [show(key) for key in row if key not in known] if isinstance(row, dict) else []
        unknown = f", not {', '.join(found)}" if found else ""
        raise ValueError(f"expected an object with {', '.join(sorted(known))}{unknown}")


def _read_ask(turn: dict) -> Ask:
    prompt, answers = turn.get("prompt"), turn.get("answers")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt is missing, empty or no string")
    if not isinstance(answers, list) or not answers:
        raise ValueError("answers is no list with an answer in it")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError("answers holds something that is empty or no string")
    return Ask(prompt, "", tuple(answers))
