"""Texts that hide facts, one of which is asked for, and how an answer to it is judged."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.common.puzzles import PLAYED
from hfsparse.models.names import cache_name, text_decoder
from hfsparse.profiler.verify.trials import Trial, make_trial

SEED = 11


def make_text(tokenizer, length: int, index: int) -> Trial:
    """A prompt of exactly `length` tokens that ends before the one value that is asked for."""
    at = index % len(PLAYED) + 2 * len(PLAYED) * (index // len(PLAYED))  # even rounds: not known
    wanted, short = length, 1
    while short:  # its other turns are left out, and longer texts may hide more facts
        made = make_trial(tokenizer, wanted, at, SEED, PLAYED)
        given, value = made.turns[0]
        short = length - len(made.text) - len(given)
        wanted += short
    return Trial(made.task, made.text + given, [([], value)])


def read(model, ids: Tensor, cache) -> Tensor:
    decoder = text_decoder(model)
    more = {cache_name(decoder): cache}
    return decoder(input_ids=ids, use_cache=True, **more).last_hidden_state


def judge(scores: Tensor, values: list[list[int]]) -> dict[str, np.ndarray]:
    """Of scores `[B, n, vocabulary]` at the places that predict values: said, and nats a token."""
    said, loss = [], []
    for row, value in zip(scores, values, strict=True):
        wanted, own = torch.tensor(value, device=row.device), row[: len(value)].float()
        said.append(bool((own.argmax(-1) == wanted).all()))
        loss.append(float(cross_entropy(own, wanted)))
    return {"said": np.array(said), "loss": np.array(loss)}


def tail_of(values: list[list[int]], device) -> Tensor:
    """Values side by side `[B, longest]`; behind short ones stands anything."""
    longest = max(map(len, values))
    return torch.tensor([v + [v[-1]] * (longest - len(v)) for v in values], device=device)
