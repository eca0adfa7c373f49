"""Prompts whose last tokens are read over keys in fewer bits, and what such keys come back as."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from hfsparse.lists.packed import Bits, pack, unpack
from hfsparse.profiler.prompts.calibration import (
    KINDS,
    Prompt,
    encode,
    fill,
    frame,
    hide,
    make_prompt,
    to_ids,
)
from hfsparse.profiler.prompts.puzzles import needle

TAILS = {"prose": 128, "retrieval": 64, "needle": 64}
MOST, EVERY = 30, 8  # an outlier is so many times as large, of one pair of channels in so many


def prompt_of(tokenizer, kind: str, length: int, i: int) -> Prompt:
    """The i-th of a kind: as calibration has them; a needle is one number in prose."""
    if kind != "needle":
        return make_prompt(tokenizer, length, i * len(KINDS) + KINDS.index(kind), 0)
    rng = Random(f"bits {i}")
    puzzle = needle(rng, 1)
    (ask,) = puzzle.asks
    head, tail = frame(tokenizer, f"{puzzle.task}\n\n", f"\n\n{ask.lead} what?")
    facts = [encode(tokenizer, f"{fact}\n\n") for fact in puzzle.facts]
    lead, answer = encode(tokenizer, ask.lead), encode(tokenizer, ask.value)
    room = length - sum(map(len, (head, *facts, tail, lead, answer)))
    body = hide(facts, fill(tokenizer, "prose", room, rng), rng)
    ids = to_ids(head + body + tail + lead + answer)
    return Prompt(f"needle-{i}", ids, (length - len(answer), length))


def stepped(t: Tensor, bits: Bits, over: int) -> Tensor:
    """t `[..., PAGE, D]` as it comes back from so many bits."""
    ends = t.amin(over, keepdim=True), t.amax(over, keepdim=True)
    return unpack(pack(t, *ends, bits), *ends, bits)


def outliers(shape: tuple[int, int, int], seed: int = 0) -> list[Tensor]:
    """How many times larger keys of layers are, `[Hkv, 1, 1, D]`; channels of a pair are alike."""
    layers, heads, dim = shape
    made, found = torch.Generator().manual_seed(seed), []
    for _ in range(layers):
        size = MOST ** torch.rand(heads, 1, 1, dim // 2, generator=made)
        few = torch.rand(heads, 1, 1, dim // 2, generator=made) < 1 / EVERY
        found.append(torch.where(few, size, 1).repeat(1, 1, 1, 2))
    return found
