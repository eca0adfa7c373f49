"""Questions of the user's own: one JSON object a line, with the prompt and its right answers.

{"prompt": "…", "answers": ["12 May", "May 12"], "id": "contract-7", "turns": [{"prompt": "And …?",
 "answers": ["…"]}]}

`id` (else the line's number) and `turns` (what is asked next, over the same KV cache) may be left
out. Prompts are run whole, as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfsparse import reading
from hfsparse.errors import UsageError
from hfsparse.plan.words import show
from hfsparse_eval.run.prompter import Prompter, Sample
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.draft import Ask, Draft

TURN_KEYS = {"prompt", "answers"}
KEYS = TURN_KEYS | {"id", "turns"}


@dataclass(frozen=True)
class Item:
    id: str
    line: int
    draft: Draft


@dataclass(frozen=True)
class Own:
    """Names a sample as `Case` does; lengths are rounded up to powers of two."""

    id: str
    length: int
    item: Item
    task: str = "custom"
    depth: float | None = None


def read(path: Path) -> tuple[list[Item], str]:
    """The file's questions, and its name and hash; UsageError names the first line that is bad."""
    content, mark = text.read(path)
    items: dict[str, Item] = {}
    for number, line in reading.rows(content):
        try:
            item = _item(reading.parse(line), number)
            if item.id in items:
                raise ValueError(f"id {item.id} is that of line {items[item.id].line}, too")
        except ValueError as problem:
            raise UsageError(f"{path}, line {number}: {problem}") from None
        items[item.id] = item
    if not items:
        raise UsageError(f"{path} holds no question: give one JSON object a line")
    return [*items.values()], mark


def _item(row, number: int) -> Item:
    _check_keys(row, KEYS)
    turns = row.get("turns", [])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("turns is no list of objects")
    for turn in turns:
        _check_keys(turn, TURN_KEYS)
    first, *later = (_ask(turn) for turn in [row, *turns])
    name = row.get("id", number)
    if not isinstance(name, str | int) or name == "":
        raise ValueError("id is no string")
    answers = tuple(answer for ask in (first, *later) for answer in ask.answers)
    asks = (Ask("", "", first.answers), *later) if later else ()
    return Item(str(name), number, Draft("", first.question, "", "", answers, (), None, asks))


def _check_keys(row, known: set[str]) -> None:
    if not isinstance(row, dict) or row.keys() - known:
        found = [show(key) for key in row if key not in known] if isinstance(row, dict) else []
        unknown = f", not {', '.join(found)}" if found else ""
        raise ValueError(f"expected an object with {', '.join(sorted(known))}{unknown}")


def _ask(turn: dict) -> Ask:
    prompt, answers = turn.get("prompt"), turn.get("answers")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt is missing, empty or no string")
    if not isinstance(answers, list) or not answers:
        raise ValueError("answers is no list with an answer in it")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError("answers holds something that is empty or no string")
    return Ask(prompt, "", tuple(answers))


class Questions:
    """Every question as a sample, shortest first, with room for answers of `new_tokens`."""

    def __init__(
        self,
        items: Sequence[Item],
        prompter: Prompter,
        window: int | None,
        new_tokens: int,
        metric: str = "part",
    ):
        self.prompter, self.new_tokens, self.metric = prompter, new_tokens, metric
        sizes = {item.id: prompter.real(item.draft, new_tokens) for item in items}
        for item in items:
            if window and sizes[item.id] > window:
                raise UsageError(
                    f"line {item.line} (id {item.id}) needs {sizes[item.id]} tokens with its "
                    f"answers, this model's window is {window}: shorten or leave it out"
                )
        ordered = sorted(items, key=lambda item: sizes[item.id])
        self.cases = [Own(i.id, 1 << (sizes[i.id] - 1).bit_length(), i) for i in ordered]

    def sample(self, case: Own) -> Sample:
        named = dict(id=case.id, task=case.task, seed=0, length=case.length, metric=self.metric)
        return self.prompter.sample(case.item.draft, self.new_tokens, **named)
