"""Answers of several samples at once, in a batch padded on the left."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from .generate import OURS, Answer, _greedy, decode
from .samples import Sample
from .tasks import score


class _Watch(StoppingCriteria):
    """Stops each row once all its answers were said, at the end of text, or at its own limit."""

    def __init__(self, tokenizer, samples: Sequence[Sample], limits: Sequence[int], stop):
        self.tokenizer, self.samples, self.limits = tokenizer, samples, limits
        self.start = max(len(sample.ids) for sample in samples)
        self.stop = stop if isinstance(stop, list) else [stop]
        self.first: float | None = None
        self.length: dict[int, int] = {}  # new tokens of the rows that have ended

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        new = input_ids[:, self.start :].tolist()  # waits for the GPU
        if self.first is None:
            self.first = time.perf_counter()
        for row, (sample, limit, ids) in enumerate(
            zip(self.samples, self.limits, new, strict=True)
        ):
            if row not in self.length and (len(ids) == limit or self._ended(sample, ids)):
                self.length[row] = len(ids)
        ended = [row in self.length for row in range(len(new))]
        return torch.tensor(ended, device=input_ids.device)

    def _ended(self, sample: Sample, ids: list[int]) -> bool:
        if ids[-1] in self.stop:
            return True
        return score(decode(self.tokenizer, ids), sample.answers, sample.metric) == 1.0


@torch.inference_mode()
def together(model, tokenizer, samples: Sequence[Sample], cap: int | None = None) -> list[Answer]:
    """What `answer` gives for each; times are the batch's, shared alike among its samples."""
    start = time.perf_counter()
    width = max(len(sample.ids) for sample in samples)
    ids = torch.tensor([[0] * (width - len(s.ids)) + list(s.ids) for s in samples])
    mask = torch.tensor([[0] * (width - len(s.ids)) + [1] * len(s.ids) for s in samples])
    limits = [min(s.new_tokens, cap or s.new_tokens) for s in samples]
    config = _greedy(model, max(limits))
    watch = _Watch(tokenizer, samples, limits, config.eos_token_id)
    new = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([watch]),
        **OURS,
    ).sequences[:, width:]
    texts = [decode(tokenizer, row[: watch.length[i]]) for i, row in enumerate(new.tolist())]
    each = (time.perf_counter() - start) / len(samples)
    first = (watch.first - start) / len(samples)
    return [
        Answer(
            text,
            score(text, sample.answers, sample.metric),
            watch.length[i],
            round(each, 4),
            round(first, 4),
        )
        for i, (sample, text) in enumerate(zip(samples, texts, strict=True))
    ]
