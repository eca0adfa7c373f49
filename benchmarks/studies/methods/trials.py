"""What the study asks: texts with answers, teacher-forced like the profiler's trials.

`seen` are RULER's tasks with the question at the end of the prompt; in `turns` and `reads` a text
is read first, and up to five questions follow one by one (the profiler's own puzzles, of which
`numbers` and `needles` are calibrated on by no method); `prose` is the perplexity of the last 512
tokens of a long text. A value counts as said if each of its tokens is the model's first choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from math import isnan
from random import Random

import torch

import hfsparse
from benchmarks.common.puzzles import PLAYED
from hfsparse.models.names import text_decoder
from hfsparse.plan import Plan
from hfsparse.profiler.prompts.calibration import encode, fill
from hfsparse.profiler.verify import trials
from hfsparse.profiler.verify.trials import Trial
from hfsparse_eval.run.prompter import Prompter, Sample
from hfsparse_eval.run.samples import Case, Maker
from hfsparse_eval.tasks import TASKS, of_suite

MIN_SCORE = 0.7  # a task counts if the dense model says so large a share of its values
TURNS, WINDOW, SEED = 5, 512, 7
NEVER = ("niah_multivalue", "cwe")  # answers in no order: what is forced on the model would decide
SHOWN = ("pair_density", "cache_share", "decode_share")


@dataclass(frozen=True)
class Kind:
    name: str
    family: str  # of plans
    tasks: tuple[str, ...]
    dense: str = ""  # another kind of the same texts: what the dense model answered there counts


SEEN = tuple(n for n, task in of_suite("ruler").items() if task.ruler and n not in NEVER)
TALKS = tuple(f"{kind}-{ground}" for kind, ground in PLAYED)
KINDS = (
    Kind("seen", "prefill", SEEN),
    Kind("turns", "cache", TALKS),
    Kind("reads", "decode", TALKS, dense="turns"),
    Kind("prose-prefill", "prefill", ("prose",)),
    Kind("prose-cache", "cache", ("prose",), dense="prose-prefill"),
)


def counted(rows: Mapping[str, dict], kind: Kind) -> list[str]:
    """Tasks of a kind that the dense model can do, at every length that was asked."""
    said: dict[tuple[str, str], list[int]] = {}
    for name, row in rows.items():
        kind_name, *place = name.split("/")
        if kind_name == (kind.dense or kind.name) and place[-1] == "dense":
            said.setdefault((place[1], place[0]), []).extend(row.get("said", [1]))
    shares = {at: sum(each) / len(each) for at, each in said.items()}
    return [
        task
        for task in kind.tasks
        if (found := [s for (t, _), s in shares.items() if t == task]) and min(found) >= MIN_SCORE
    ]


class Asker:
    """Makes texts with one tokenizer, and has models answer them."""

    def __init__(self, tokenizer):
        self.tokenizer, self.makers = tokenizer, {}
        self.prompter = Prompter(tokenizer)

    def text(self, kind: Kind, task: str, length: int, index: int) -> Trial:
        if kind.name == "seen":
            if (task, length) not in self.makers:
                self.makers[task, length] = Maker(TASKS[task], length, self.prompter, SEED)
            return self._seen(self.makers[task, length].sample(Case(task, length, None, index)))
        if kind.tasks is TALKS:
            at, count = kind.tasks.index(task), len(PLAYED)
            made = trials.make_trial(self.tokenizer, length, 2 * count * index + at, SEED, PLAYED)
            return replace(made, turns=made.turns[:TURNS])  # even rounds: no question in the text
        rng = Random(f"methods prose {index}")
        return Trial(task, [*chain(*fill(self.tokenizer, "prose", length, rng))], [])

    def _seen(self, sample: Sample) -> Trial:
        """The prompt, and the values in the order and form in which RULER words an answer."""
        turns, last = [], len(sample.answers) - 1
        for i, value in enumerate(sample.answers):
            before, gap = "", " "
            if sample.task == "vt":
                gap = " " if i else ""  # its prompt ends in a blank
            elif i and sample.task != "fwe":
                before = ", and" if i == last else ","
            given = encode(self.tokenizer, before) if before else []
            turns.append((given, encode(self.tokenizer, gap + value)))
        return Trial(sample.task, list(sample.ids), turns)

    @torch.inference_mode()
    def answers(self, model, text: Trial, plan: Plan | None, look: bool) -> dict:
        """What the model says, dense (unpatched) or under a plan; `look`: and what that cost."""
        if plan is None:
            return _answers(model, text)
        with hfsparse.patch(model, plan) as handle:
            found = _answers(model, text)
            if look:
                stats = handle.stats()
                shown = {name: getattr(stats, name) for name in SHOWN}
                found |= {n: None if isnan(x) else round(x, 4) for n, x in shown.items()}
        return found


def _answers(model, text: Trial) -> dict:
    if text.turns:
        found = trials.run_trial(model, text)
        return {
            "said": [int(x) for x in found["said"]],
            "loss": [round(float(x), 4) for x in found["loss"]],
        }
    ids = torch.tensor([text.text], device=model.device)
    hidden = text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    scores = model.get_output_embeddings()(hidden[0, -WINDOW - 1 : -1]).float()
    return {"loss": float(torch.nn.functional.cross_entropy(scores, ids[0, -WINDOW:]))}
