"""How `generate` chooses a token, and which call it then makes: for whoever is there before it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor
from transformers.generation import GenerationMode

from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.decode import is_step

ALONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # one token of each row at a time
PARTS = 1024  # of a vocabulary, in which the highest score is looked for at once
TYPES = ("token_type_ids", "mm_token_type_ids")  # a new token's are the last one's


class Choosing:
    """How one `generate` chooses, by these of its processors.

    Sampled tokens are drawn with the random numbers that it will draw with itself.
    """

    def __init__(self, config: Any, processors: Sequence[LogitsProcessor]):
        self.samples, self.most, self.processors = config.do_sample, config.max_length, processors
        ends = (getattr(config, f"_{name}_token_tensor", None) for name in ("eos", "pad"))
        self.eos, self.pad = ends

    def left(self, ids: Tensor) -> int:
        """How many tokens may follow ids `[B, n]`, and one that is about to be chosen."""
        return self.most - ids.shape[1] - 1

    def same_numbers(self, device: torch.device) -> Any:
        """Random numbers that are drawn inside are drawn again behind it."""
        if device.type == "cpu":
            return torch.random.fork_rng([], enabled=self.samples)
        return torch.random.fork_rng([device], enabled=self.samples, device_type=device.type)

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        """[B, 1] tokens behind ids `[B, n]`, from a model's logits `[B, Q, V]`."""
        scores = logits[:, -1].to(ids.device)
        if self.processors or self.samples:  # else the highest is the highest in any type
            scores = scores.to(torch.float32, copy=True)
        for processor in self.processors:
            scores = processor(ids, scores)
        if self.samples:  # as torch.multinomial, which would also have the host wait for its checks
            noise = torch.empty_like(scores).exponential_()
            scores = torch.softmax(scores, -1) / noise
        chosen = _highest(scores)
        if len(ids) > 1 and self.eos is not None and self.pad is not None:  # rows that have ended
            eos, fill = self.eos.to(ids.device), self.pad.to(ids.device)
            ended = torch.isin(ids[:, -1:], eos) | (ids[:, -1:] == fill)
            chosen = torch.where(ended, fill, chosen)
        return chosen


def _highest(scores: Tensor) -> Tensor:
    """`scores.argmax(-1, keepdim=True)` of `[B, V]`, part by part: PyTorch reads a row of many
    numbers with one of the GPU's processors."""
    parts = _parts(scores.shape[1])
    best, at = scores.unflatten(-1, (parts, -1)).max(-1)
    part = best.argmax(-1, keepdim=True)
    return at.gather(-1, part) + part * (scores.shape[1] // parts)


@lru_cache
def _parts(numbers: int) -> int:
    """Into how many equal parts so many numbers are cut, at most PARTS."""
    return next(n for n in range(min(PARTS, numbers), 0, -1) if numbers % n == 0)


def is_plain_step(given: dict[str, Any], layers: list[CacheLayer], ids: Tensor) -> bool:
    """Whether a call reads one more token of each row, and asks for nothing but logits."""
    tokens, first = given.get("input_ids"), layers[0]
    if not isinstance(tokens, Tensor) or tokens.shape != (len(ids), 1):
        return False
    known = {"input_ids", "attention_mask", "position_ids", "cache_position", *TYPES}
    more = any(isinstance(x, Tensor) and name not in known for name, x in given.items())
    asked = any(given.get(name) for name in ("output_hidden_states", "output_attentions"))
    asked = asked or given.get("return_dict") is False or given.get("output_router_logits")
    return not more and not asked and is_step(first, 1, first.seen + 1)


def later_call(given: dict[str, Any], tokens: Tensor, at: int) -> dict[str, Any]:
    """A step's call for tokens `[B, Q]`, the first of them `at` columns behind the step's own."""
    Q, made = tokens.shape[1], {**given, "input_ids": tokens}
    if isinstance(mask := given.get("attention_mask"), Tensor):
        made["attention_mask"] = pad(mask, (0, at + Q - 1), value=1)
    for name in ("position_ids", "cache_position"):
        if (position := given.get(name)) is not None:
            made[name] = position + torch.arange(at, at + Q, device=position.device)
    for name in TYPES:
        if (kind := given.get(name)) is not None:
            made[name] = kind.expand(-1, Q)
    if given.get("logits_to_keep") is not None:
        made["logits_to_keep"] = Q
    return made


def cache_layers(cache: Any) -> list[CacheLayer]:
    """Those layers of a cache that are ours."""
    return [x for x in getattr(cache, "layers", ()) if isinstance(x, CacheLayer)]
