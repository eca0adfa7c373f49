"""Greedy answers, timed, that stop as soon as the score can't change; long ones go to their end.

A sample with turns is a conversation over one KV cache: its text is read before any question is
known, then each question follows what was said before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import mean

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from hfsparse.models.greedy import greedy
from hfsparse.models.loading import input_ids
from hfsparse.models.names import cache_name, find_cache, text_decoder
from hfsparse_eval.run.prompter import Sample, Turn
from hfsparse_eval.tasks.scores import METRICS, score


@dataclass(frozen=True)
class Answer:
    text: str
    score: float  # 0 to 1
    new_tokens: int
    seconds: float  # in all
    first_token_seconds: float  # of the first answer, the prompt included
    more: dict = field(default_factory=dict)  # further fields of the result line


@dataclass(frozen=True)
class _Wanted:
    """What one row of a batch is to say, and its limit of new tokens."""

    answers: Sequence[str]
    metric: str
    limit: int


class _Watch(StoppingCriteria):
    """Ends each row at its end of text, at its limit, or once its answers were said.

    Answers whose metric compares them to their end (`Metric.to_end`) go on after that.
    """

    def __init__(self, tokenizer, wanted: Sequence[_Wanted]):
        self.tokenizer, self.wanted = tokenizer, wanted
        self.first: float | None = None  # when the first token came
        self.length: dict[int, int] = {}  # new tokens of the rows that have ended

    def begin(self, given: int, stop: int | list[int] | None) -> None:
        self.given, self.stop = given, stop if isinstance(stop, list) else [stop]

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        new = input_ids[:, self.given :].tolist()  # waits for the GPU
        if self.first is None:
            self.first = time.perf_counter()
        for row, (wanted, ids) in enumerate(zip(self.wanted, new, strict=True)):
            if row not in self.length and self._ended(wanted, ids):
                self.length[row] = len(ids)
        ended = [row in self.length for row in range(len(new))]
        return torch.tensor(ended, device=input_ids.device)

    def _ended(self, wanted: _Wanted, ids: list[int]) -> bool:
        if len(ids) == wanted.limit or ids[-1] in self.stop:
            return True
        if METRICS[wanted.metric].to_end:
            return False
        return score(decode(self.tokenizer, ids), wanted.answers, wanted.metric) == 1.0


def answer(model, tokenizer, sample: Sample, cap: int | None = None) -> Answer:
    """The model's greedy continuation of `sample`, of at most `cap` tokens if that is fewer.

    For a sample with turns: all continuations, the mean of their scores, and a record of each.
    """
    if sample.turns:
        return _converse(model, tokenizer, sample, cap)
    return together(model, tokenizer, [sample], cap)[0]


@torch.inference_mode()
def together(
    model, tokenizer, samples: Sequence[Sample], cap: int | None = None, cache=None
) -> list[Answer]:
    """What `answer` gives for each; times are the batch's, shared alike among its samples.

    cache: holds the prompts, padded on the left, but for their last tokens.
    """
    start = time.perf_counter()
    watch = _Watch(tokenizer, [_Wanted(s.answers, s.metric, _limit(s, cap)) for s in samples])
    rows, _ = _say(model, [sample.ids for sample in samples], watch, cache)
    texts = [decode(tokenizer, ids) for ids in rows]
    each = (time.perf_counter() - start) / len(samples)
    first = (watch.first - start) / len(samples)
    return [
        Answer(
            text,
            score(text, sample.answers, sample.metric),
            len(ids),
            round(each, 4),
            round(first, 4),
            {"output_ids": ids} if METRICS[sample.metric].to_end else {},  # to compare by token
        )
        for sample, ids, text in zip(samples, rows, texts, strict=True)
    ]


def _limit(sample: Sample, cap: int | None) -> int:
    return min(sample.new_tokens, cap or sample.new_tokens)


@torch.inference_mode()
def _converse(model, tokenizer, sample: Sample, cap: int | None) -> Answer:
    """Every turn goes on over the cache of the turns before it.

    A turn with a given answer is said on a copy of the cache, since a ring can't be taken back;
    later turns then read the questions and answers before them again, but not the text.
    """
    start = time.perf_counter()
    first, told, ids, cache = None, [], list(sample.ids), None
    if sample.turns[0].ids:  # nothing but text so far
        cache = _read(model, ids)
    elif sample.turns[0].given:  # the first question is read with the text; its last token is left
        cache = _read(model, ids[:-1])
    for turn in sample.turns:
        ids += turn.ids
        began = time.perf_counter()
        watch = _Watch(tokenizer, [_Wanted(turn.answers, sample.metric, _limit(sample, cap))])
        (new,), used = _say(model, [ids], watch, deepcopy(cache) if turn.given else cache)
        text = decode(tokenizer, new)
        first = first or watch.first
        told.append(_record(text, turn, sample.metric, len(new), time.perf_counter() - began))
        if turn.given:
            ids += turn.given
        else:
            ids += _without_end(new, model.generation_config.eos_token_id)
            cache = used
    return Answer(
        text="\n".join(turn["output"] for turn in told),
        score=mean(turn["score"] for turn in told),
        new_tokens=sum(turn["new_tokens"] for turn in told),
        seconds=round(time.perf_counter() - start, 4),
        first_token_seconds=round(first - start, 4),
        more={"turns": told},
    )


def _record(text: str, turn: Turn, metric: str, tokens: int, seconds: float) -> dict:
    return {
        "score": score(text, turn.answers, metric),
        "answers": turn.answers,
        "output": text,
        "new_tokens": tokens,
        "seconds": round(seconds, 4),
    }


def _say(model, prompts: Sequence[Sequence[int]], watch: _Watch, cache=None):
    """The new tokens after each prompt, and the cache with them; `cache` may hold the first ones.

    Prompts are padded on the left.
    """
    width = max(map(len, prompts))
    ids = input_ids(model, [[0] * (width - len(p)) + [*p] for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with greedy(model, max(wanted.limit for wanted in watch.wanted)) as settings:
        watch.begin(width, settings.eos_token_id)
        out = model.generate(
            ids,
            attention_mask=mask.to(ids.device),
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([watch]),
            **({} if cache is None else {cache_name(text_decoder(model)): cache}),
        )
    new = out.sequences[:, width:].tolist()
    used = find_cache(out)
    return [ids[: watch.length[row]] for row, ids in enumerate(new)], used


def _read(model, ids: Sequence[int]):
    """The cache of these tokens; the one that would follow is thrown away."""
    return _say(model, [ids], _Watch(None, [_Wanted((), "all", 1)]))[1]


def _without_end(ids: list[int], stop: int | list[int] | None) -> list[int]:
    """Without the token that ended the answer: what follows in a chat ends it anew."""
    stops = stop if isinstance(stop, list) else [stop]
    return ids[:-1] if ids and ids[-1] in stops else ids


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
