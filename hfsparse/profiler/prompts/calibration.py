"""Calibration prompts, made offline from what any Python installation holds.

    for prompt in make_prompts(tokenizer, length=2048, count=4, seed=0): model(prompt.ids)

Four kinds in turn: `retrieval` and `multihop` hide facts in a text and end with a question and its
answer; `prose` and `code` are plain text. The wording is deliberately not that of RULER, which
`hfsparse eval` runs: a plan must not be calibrated on its own test. Or the user's own texts, one
JSON object a line. Every prompt has exactly `length` tokens; the same seed, Python and tokenizer
give the same prompts.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from hfsparse import reading
from hfsparse.errors import UsageError
from hfsparse.models.chat import frames
from hfsparse.plan.words import show
from hfsparse.profiler.prompts.puzzles import PUZZLES

KINDS = ("retrieval", "multihop", "prose", "code")
NOISE = (
    "The wind has turned. A boat lies in the bay. Somebody sweeps the yard. So the day goes by.\n"
)
PASSAGE_LINES = 12  # facts go between passages, so none may be much longer than this


@dataclass(frozen=True)
class Prompt:
    """One calibration prompt: `ids` is `[1, length]`."""

    name: str
    ids: Tensor
    answer_span: tuple[int, int] | None  # first token of the answer and the one past it


def make_prompts(
    tokenizer, length: int, count: int, seed: int, data: str | Path | None = None
) -> list[Prompt]:
    """`count` prompts of exactly `length` tokens; fewer only if `data` has fewer so long."""
    if data is not None:
        return read_own_texts(tokenizer, length, count, seed, data)
    return [make_prompt(tokenizer, length, index, seed) for index in range(count)]


def make_prompt(tokenizer, length: int, index: int, seed: int) -> Prompt:
    """The `index`th prompt. Every second round swaps prose and code under the hidden facts."""
    turn, kind = index // len(KINDS), KINDS[index % len(KINDS)]
    rng = Random(f"hfsparse {kind} {index} {seed}")
    if kind in ("prose", "code"):
        start = bos(tokenizer)
        body = fill(tokenizer, kind, length - len(start), rng)
        return Prompt(f"{kind}-{index}", to_ids(start + list(chain(*body))), None)

    ground = ("prose", "code")[(turn + (kind == "multihop")) % 2]
    puzzle = PUZZLES[kind, ground](rng, facts=max(3, min(8, length // 256)))
    head, tail = frame(tokenizer, f"{puzzle.task}\n\n", f"\n\n{puzzle.question}")
    facts = [encode(tokenizer, f"{fact}\n\n") for fact in puzzle.facts]
    answer = encode(tokenizer, puzzle.answer)
    room = length - len(head) - sum(map(len, facts)) - len(tail) - len(answer)
    if room <= 0:
        raise UsageError(
            f"calibration prompts of {length} tokens are too short: the {kind} question needs "
            f"{length - room + 1}; give longer --lengths"
        )
    body = hide(facts, fill(tokenizer, ground, room, rng), rng)
    ids = head + body + tail + answer
    return Prompt(f"{kind}-{ground}-{index}", to_ids(ids), (length - len(answer), length))


# ---- tokens


def to_ids(tokens: list[int]) -> Tensor:
    return torch.tensor([tokens], device="cpu")


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def bos(tokenizer) -> list[int]:
    """The token that this tokenizer puts before every text, if any."""
    token = tokenizer.bos_token_id
    return [token] if token is not None and tokenizer("a")["input_ids"][0] == token else []


def frame(tokenizer, before: str, after: str) -> tuple[list[int], list[int]]:
    """Tokens around a long text in a user's turn: everything before it, and up to the answer."""
    if not getattr(tokenizer, "chat_template", None):
        tail = f"{after}\n" if after else ""
        return bos(tokenizer) + encode(tokenizer, before), encode(tokenizer, tail)
    head, tail = frames(tokenizer)
    return encode(tokenizer, head + before), encode(tokenizer, after + tail)


def fill(tokenizer, kind: str, room: int, rng: Random) -> list[list[int]]:
    """Passages of `kind` with exactly `room` tokens; the last is cut to fit."""
    passages = []
    for text in cycle(_passages(kind, rng)):
        passages.append(encode(tokenizer, text)[:room])
        room -= len(passages[-1])
        if room == 0:
            return passages
    raise UsageError(
        f"this Python has no {kind} to calibrate with (no standard-library sources): give --data"
    )


def hide(facts: list[list[int]], passages: list[list[int]], rng: Random) -> list[int]:
    """Put each fact, in order, before a passage, one fact in each equal stretch of the text."""
    total = sum(map(len, passages))
    waiting = [(total * (i + rng.random()) / len(facts), fact) for i, fact in enumerate(facts)]
    tokens, read = [], 0
    for passage in passages:
        read += len(passage)
        while waiting and waiting[0][0] < read:
            tokens += waiting.pop(0)[1]
        tokens += passage
    return tokens


# ---- texts


def _passages(kind: str, rng: Random) -> Iterator[str]:
    """Paragraphs of one document after another, the documents in an order drawn from `rng`."""
    if kind == "noise":
        yield NOISE
        return
    prose = _read_prose() if kind == "prose" else {}
    names = sorted(prose) if kind == "prose" else _list_modules()
    rng.shuffle(names)
    for name in names:
        document = prose[name] if kind == "prose" else _read_source(name)
        lines: list[str] = []
        for line in document.strip().splitlines():
            lines.append(line.rstrip())
            if not line.strip() or len(lines) == PASSAGE_LINES:
                yield "\n".join(lines) + "\n"
                lines = []
        yield "\n".join(lines) + "\n\n"


def _read_prose() -> dict[str, str]:
    """Python's own help topics; where a distribution leaves them out, its modules' docstrings."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        docs = {name: ast.get_docstring(ast.parse(_read_source(name))) for name in _list_modules()}
        return {name: doc for name, doc in docs.items() if doc}
    return topics


def _list_modules() -> list[str]:
    """Standard-library modules whose source is here. The names are the same on every platform."""
    return [name for name in sorted(sys.stdlib_module_names) if _locate(name).is_file()]


def _locate(module: str) -> Path:
    return Path(sysconfig.get_paths()["stdlib"], f"{module}.py")


def _read_source(module: str) -> str:
    return _locate(module).read_text(encoding="utf-8", errors="ignore")


# ---- the user's own texts


def read_own_texts(tokenizer, length: int, count: int, seed: int, file: str | Path) -> list[Prompt]:
    """Up to `count` texts of `file`, drawn by `seed`, from those with at least `length` tokens.

    A longer text loses its start, so the end, where a question usually is, stays.
    """
    rows = read_jsonl(file)
    Random(f"hfsparse data {seed}").shuffle(rows)
    prompts, longest = [], 0
    for line, row in rows:
        if "prompt" in row:
            head, tail = frame(tokenizer, "", "")
            body = encode(tokenizer, row["prompt"])
            answer = encode(tokenizer, row.get("answer", ""))
        else:
            head, body, tail, answer = (bos(tokenizer), encode(tokenizer, row["text"]), [], [])
        room = length - len(head) - len(tail) - len(answer)
        if room <= 0:
            raise UsageError(
                f"{file}, line {line}: the answer leaves no room for the prompt in {length} tokens"
            )
        longest = max(longest, length - room + len(body))
        if len(body) >= room:
            span = (length - len(answer), length) if answer else None
            ids = head + body[-room:] + tail + answer
            prompts.append(Prompt(f"data-{line}", to_ids(ids), span))
        if len(prompts) == count:
            break
    if not prompts:
        raise UsageError(
            f"{file}: no text has {length} tokens (the longest has {longest}); "
            "give longer texts or shorter --lengths"
        )
    return prompts


def read_jsonl(file: str | Path) -> list[tuple[int, dict[str, str]]]:
    """Line number and object of each line that isn't blank."""
    try:
        content = reading.text(file)
    except FileNotFoundError:
        raise UsageError(f"there is no calibration file {file}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read the calibration file {file}: {reading.why(error)}") from None
    rows = [(number, _parse_row(file, number, line)) for number, line in reading.rows(content)]
    if not rows:
        raise UsageError(f"the calibration file {file} is empty")
    return rows


def _parse_row(file: str | Path, number: int, line: str) -> dict[str, str]:
    try:
        row = reading.parse(line)
    except ValueError as error:
        raise UsageError(f"{file}, line {number} is {error}") from None
    wanted = '"text", or "prompt" and perhaps "answer"'
    if not isinstance(row, dict) or not ({"text", "prompt"} & row.keys()):
        found = f", not with {', '.join(map(show, row))}" if row and isinstance(row, dict) else ""
        raise UsageError(f"{file}, line {number}: expected an object with {wanted}{found}")
    keys = ("prompt", "answer") if "prompt" in row else ("text",)
    if unread := [show(key) for key in row if key not in keys]:
        problem = f"{', '.join(unread)} would not be read beside {keys[0]}"
        raise UsageError(f"{file}, line {number}: {problem}: give {wanted}")
    for key in keys:
        if not isinstance(row.get(key, ""), str):
            raise UsageError(f"{file}, line {number}: {key} is not a string")
    return row
