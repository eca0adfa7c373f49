"""Times of the tokens of `model.generate`, and of what a GPU is told."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, LogitsProcessorList

SKIP = 8  # tokens before a step is what it will be: caches grow, graphs are recorded


class Clock(LogitsProcessor):
    """Notes when each token's scores arrive; `generate` waits for the GPU once a token.

    Of the first one it is when the GPU is done with the prompt. settled: called where the tokens
    that are timed begin.
    """

    def __init__(self, settled: Callable[[], None] | None = None):
        self.at: list[float] = []
        self.settled = settled

    def __call__(self, input_ids, scores):
        if not self.at and scores.is_cuda:
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())
        if self.settled is not None and len(self.at) == SKIP + 1:
            self.settled()
        return scores

    def ms(self) -> float:
        """The median of a token, after the first SKIP."""
        return 1e3 * statistics.median(b - a for a, b in pairwise(self.at[SKIP:]))


def continued(
    model,
    ids: Tensor,
    new: int,
    mask: Tensor | None = None,
    settled: Callable[[], None] | None = None,
    **more,
) -> tuple[Clock, Any]:
    """`new` greedy tokens by `generate`, and the clock that saw them; settled: as of `Clock`."""
    clock = Clock(settled)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([clock]),
        **more,
    )
    return clock, out


def prompted(model, tokens: int, new: int, **more) -> tuple[Clock, float, Cache]:
    """A random prompt and `new` tokens by `generate`: the clock, when it began, the cache."""
    torch.manual_seed(tokens)
    ids = torch.randint(5, model.config.vocab_size, (1, tokens), device=model.device)
    start = time.perf_counter()
    clock, out = continued(model, ids, new, return_dict_in_generate=True, **more)
    return clock, start, out.past_key_values


def bench_ms(run: Callable, times: int = 20) -> float:
    """Of one of so many runs on the GPU, one behind another."""
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times
