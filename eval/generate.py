"""Greedy answers, timed, that stop as soon as the score can't change; long ones go to their end.

A sample with turns is a conversation over one KV cache: its text is read before any question is
known, then each question follows what was said before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import signature
from statistics import mean

import torch
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList

from hfsparse.graphs import parameters
from hfsparse.patcher import CACHES

from .samples import Sample, Turn
from .tasks import score

# transformers 4.57 takes the model's own sampling where ours is what is usual.
OLDER = "use_model_defaults" in signature(GenerationMixin.generate).parameters
OURS = {"use_model_defaults": False} if OLDER else {}


@dataclass(frozen=True)
class Answer:
    text: str
    score: float  # 0 to 1
    new_tokens: int
    seconds: float  # in all
    first_token_seconds: float  # of the first answer, the prompt included
    more: dict = field(default_factory=dict)  # further fields of the result line


class _Watch(StoppingCriteria):
    """Notes when the first token came; stops once every answer was said (a score only rises).

    Long answers (`sequence`) are compared to their end.
    """

    def __init__(self, tokenizer, given: int, answers: Sequence[str], metric: str):
        self.tokenizer = tokenizer
        self.given = given
        self.answers = answers
        self.metric = metric
        self.first: float | None = None

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        text = decode(self.tokenizer, input_ids[0, self.given :])  # waits for the GPU
        if self.first is None:
            self.first = time.perf_counter()
        done = self.metric != "sequence" and score(text, self.answers, self.metric) == 1.0
        return torch.tensor([done], device=input_ids.device)


@torch.inference_mode()
def answer(model, tokenizer, sample: Sample, cap: int | None = None) -> Answer:
    """The model's greedy continuation of `sample`, of at most `cap` tokens if that is fewer.

    For a sample with turns: all continuations, the mean of their scores, and a record of each.
    """
    limit = min(sample.new_tokens, cap or sample.new_tokens)
    if sample.turns:
        return _converse(model, tokenizer, sample, limit)
    start = time.perf_counter()
    watch = _Watch(tokenizer, len(sample.ids), sample.answers, sample.metric)
    new, _ = _say(model, sample.ids, limit, watch)
    text = decode(tokenizer, new)
    seconds = time.perf_counter() - start
    found = score(text, sample.answers, sample.metric)
    more = {"output_ids": new} if sample.metric == "sequence" else {}  # to compare arms by token
    return Answer(text, found, len(new), round(seconds, 4), round(watch.first - start, 4), more)


def _converse(model, tokenizer, sample: Sample, limit: int) -> Answer:
    """Every turn goes on over the cache of the turns before it.

    A turn with a given answer is said on a copy of the cache, since a ring can't be taken back.
    """
    start = time.perf_counter()
    first, told, ids, cache = None, [], list(sample.ids), None
    if sample.turns[0].ids:  # nothing but text so far; its next token is thrown away
        _, cache = _say(model, ids, 1)
    for turn in sample.turns:
        ids += turn.ids
        began = time.perf_counter()
        watch = _Watch(tokenizer, len(ids), turn.answers, sample.metric)
        new, used = _say(model, ids, limit, watch, deepcopy(cache) if turn.given else cache)
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


def _say(model, ids: Sequence[int], limit: int, watch: _Watch | None = None, cache=None):
    """The new tokens after `ids`, of which `cache` may hold the first, and the cache with them."""
    given = torch.tensor([ids], device=model.device)
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        generation_config=_greedy(model, limit),
        stopping_criteria=StoppingCriteriaList([watch] if watch else []),
        **OURS,
        **({} if cache is None else {_cache_name(model): cache}),
    )
    return out.sequences[0, len(ids) :].tolist(), out.past_key_values


def _cache_name(model) -> str:
    """What this model's forward calls its cache: transformers 5.24 renamed it."""
    known = parameters(type(model.get_decoder()))
    return next(name for name in CACHES if name in known)


def _without_end(ids: list[int], stop: int | list[int] | None) -> list[int]:
    """Without the token that ended the answer: what follows in a chat ends it anew."""
    stops = stop if isinstance(stop, list) else [stop]
    return ids[:-1] if ids and ids[-1] in stops else ids


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _greedy(model, limit: int) -> GenerationConfig:
    """Plain greedy, whatever sampling or penalties the model's own settings ask for."""
    own = model.generation_config
    stop = own.eos_token_id
    pad = own.pad_token_id
    if pad is None and stop is not None:
        pad = stop[0] if isinstance(stop, list) else stop
    return GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=stop,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
        return_dict_in_generate=True,
    )
