"""Paired trials: facts hidden in a long text, asked for one by one once the text has been read.

A trial is a conversation on given tokens. Every answer but its value is given, and a value counts
as said if each of its tokens is the model's first choice, which is what greedy decoding would say.
In every second round (`-known`) the first question is at the end of the text; otherwise the
text is read before any question is known. Values are drawn anew: no plan was calibrated on them.
Completions ask nothing: the text goes on with the beginning of what it has said before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, takewhile
from random import Random

import numpy as np
import torch
from transformers import PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.models.chat import frames
from hfsparse.models.logits import read_logits
from hfsparse.profiler.prompts import calibration as prompts
from hfsparse.profiler.prompts.puzzles import COMPLETIONS, OTHERS, PUZZLES, Ask
from hfsparse.profiler.verify.reader import open_reader
from hfsparse.runtime.decode import STEP

TASKS = OTHERS | PUZZLES
LEVELS = TASKS, COMPLETIONS  # the second for models that can do nothing of the first
KNOWN = "-known"  # of tasks whose first question is at the end of the text


@dataclass(frozen=True)
class Trial:
    """Tokens of a conversation; each value follows what is given before it."""

    task: str  # kind-ground, or kind-ground-known
    text: list[int]  # read in one go
    turns: list[tuple[list[int], list[int]]]  # given, value


def name_task(index: int, tasks: Mapping[tuple[str, str], Callable] = TASKS) -> str:
    """The task of the `index`th trial."""
    kind, ground = list(tasks)[index % len(tasks)]
    return f"{kind}-{ground}{KNOWN if index // len(tasks) % 2 else ''}"


def make_trial(
    tokenizer, length: int, index: int, seed: int, tasks: Mapping[tuple[str, str], Callable] = TASKS
) -> Trial:
    """The `index`th trial, of exactly `length` tokens; `tasks` make puzzles, by kind and ground."""
    task = name_task(index, tasks)
    kind, ground = task.removesuffix(KNOWN).split("-")
    rng = Random(f"hfsparse trial {kind} {ground} {index} {seed}")
    puzzle = tasks[kind, ground](rng, facts=max(4, min(8, length // 256)))
    asked = rng.sample(puzzle.asks, len(puzzle.asks))
    first, *later = (_make_turn(tokenizer, ask, i == 0) for i, ask in enumerate(asked))
    head = prompts.bos(tokenizer)
    if asked[0].question:
        head, _ = prompts.frame(
            tokenizer, "Read the text below. Questions about it follow.\n\n", ""
        )
    facts = [prompts.encode(tokenizer, f"{fact}\n\n") for fact in puzzle.facts]
    turns = [first, *later]
    while len(turns) > 1 and sum(map(len, chain.from_iterable(turns))) > length // 2:
        turns.pop()
    room = length - sum(map(len, [head, *facts, *chain.from_iterable(turns)]))
    if room <= 0:
        raise UsageError(
            f"trials of {length} tokens are too short: the {kind} questions need "
            f"{length - room + 1}; give longer --lengths, or --no-verify"
        )
    body = prompts.hide(facts, prompts.fill(tokenizer, ground, room, rng), rng)
    text = head + body
    if task.endswith(KNOWN):
        text, turns[0] = text + first[0], ([], first[1])
    return Trial(task, text, turns)


def _make_turn(tokenizer, ask: Ask, first: bool) -> tuple[list[int], list[int]]:
    """Tokens from the end of the text, or of the answer before, up to the value; and the value."""
    before = _join_turns(tokenizer, ask.question, first) + ask.lead
    both = prompts.encode(tokenizer, before + ask.value)
    alone = prompts.encode(tokenizer, before)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(both, alone, strict=False))))
    return both[:same], both[same:]


def _join_turns(tokenizer, question: str, first: bool) -> str:
    """What is between the text, or the answer before, and the answer to this question."""
    if not question:
        return "\n\n"
    if not getattr(tokenizer, "chat_template", None):
        return f"\n\n{question}\n"
    if first:
        return f"\n\n{question}{frames(tokenizer)[1]}"
    _, _, between, tail = frames(tokenizer, turns=3)
    return between + question + tail


@torch.no_grad()
def run_trial(model: PreTrainedModel, trial: Trial) -> dict[str, np.ndarray]:
    """By value: whether it was `said`, and its `loss` (nats a token). Patched or not."""
    read, said, loss = open_reader(model), [], []
    last = read(trial.text)[:, -1:]
    for given, value in trial.turns:
        last = read(given)[:, -1:] if given else last
        steps = (value[at : at + STEP] for at in range(0, len(value), STEP))  # decode, not prompt
        hidden = torch.cat([last, *map(read, steps)], 1)
        scores = read_logits(model, hidden[:, :-1])[0].float().log_softmax(-1)
        wanted = torch.tensor(value, device=scores.device)
        said.append(bool((scores.argmax(-1) == wanted).all()))
        loss.append(-float(scores.gather(1, wanted[:, None]).mean()))
        last = hidden[:, -1:]
    return {"said": np.array(said), "loss": np.array(loss)}
