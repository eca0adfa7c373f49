"""Greedy answers, timed, that stop as soon as the score can't change."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .samples import Sample
from .tasks import score


@dataclass(frozen=True)
class Answer:
    text: str
    new_tokens: int
    seconds: float  # in all
    first_token_seconds: float


class _Watch(StoppingCriteria):
    """Notes when the first token came; stops once every answer was said (a score only rises)."""

    def __init__(self, tokenizer, sample: Sample):
        self.tokenizer = tokenizer
        self.sample = sample
        self.first: float | None = None

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        text = decode(self.tokenizer, input_ids[0, len(self.sample.ids) :])  # waits for the GPU
        if self.first is None:
            self.first = time.perf_counter()
        done = score(text, self.sample.answers, self.sample.metric) == 1.0
        return torch.tensor([done], device=input_ids.device)


@torch.inference_mode()
def answer(model, tokenizer, sample: Sample, cap: int | None = None) -> Answer:
    """The model's greedy continuation of `sample`, of at most `cap` tokens if that is fewer."""
    ids = torch.tensor([sample.ids], device=model.device)
    watch = _Watch(tokenizer, sample)
    limit = min(sample.new_tokens, cap or sample.new_tokens)
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_greedy(model, limit),
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    new = out[0, len(sample.ids) :]
    text = decode(tokenizer, new)
    seconds = time.perf_counter() - start
    return Answer(text, len(new), round(seconds, 4), round(watch.first - start, 4))


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
    )
