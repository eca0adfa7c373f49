"""Random plans, thresholds, paddings and turn lengths, against the oracle."""

from __future__ import annotations

import random

import pytest
import torch

from tests.patcher.families import FAMILIES, left_padded, plan_of, tiny, tokens
from tests.patcher.runs import both, close, continue_with, forward

CASES = 24


def random_plan(rng, model):
    Hq, Hkv = model.config.num_attention_heads, model.config.num_key_value_heads
    rate = rng.choice([0, 0.125, 0.25, 0.5, 1])
    stream = dict(sink=rng.randint(0, 9), recent=rng.randint(1, 60))
    grow = dict(sink=rng.randint(0, 3), recent=rng.randint(1, 9), recent_per_token=rate)
    patterns = dict(
        stream=("streaming", stream),
        grow=("streaming", grow),
        vs=("vertical_slash", dict(columns=rng.randint(1, 50), diagonals=rng.randint(1, 120))),
        blocks=("block_topk", dict(share=rng.uniform(0.05, 0.6), min_blocks=rng.randint(1, 3))),
        quest=("quest", dict(share=rng.uniform(0.05, 0.6), min_pages=2)),
    )

    def layer(index, windowed):
        prefill, cache, decode = [], [], []
        for _ in range(Hkv):
            kept = "full" if windowed else rng.choice(["full", "full", "stream", "grow"])
            free = ["full", "stream", "grow", *([] if windowed else ["vs", "blocks"])]
            prefill += [kept if kept != "full" else rng.choice(free) for _ in range(Hq // Hkv)]
            cache.append(kept)
            fits = "full" if windowed else rng.choice(["full", "quest"])
            decode.append("ring" if kept != "full" else fits)
        return prefill, cache, decode

    below = [rng.choice([0, 0, rng.randint(1, 300)]) for _ in range(3)]
    return plan_of(model, layer, below, **patterns)


@pytest.mark.parametrize("seed", range(CASES))
def test_a_random_conversation_equals_the_oracle(seed):
    rng = random.Random(seed)
    model = tiny(rng.choice(list(FAMILIES)))
    length = rng.choice([rng.randint(1, 40), rng.randint(41, 300)])
    rows = rng.randint(1, 4)
    pads = [0, *(rng.randint(0, length - 1) for _ in range(rows - 1))]
    turns = [rng.choice([1, 1, rng.randint(2, 16), rng.randint(17, 90)]) for _ in range(4)]
    plan = random_plan(rng, model)

    def talk(m, cache):
        ids, mask = left_padded(length, pads, seed=seed)
        out = forward(m, ids, mask, **cache)
        logits = [out.logits[mask.bool()]]
        for turn, new in enumerate(turns):
            mask = continue_with(ids, mask, new)
            more = tokens(rows, new, seed=turn)
            out = forward(m, more, mask, cache=out.past_key_values)
            logits.append(out.logits.flatten(0, 1))
        return torch.cat(logits)

    got, want, _ = both(model, plan, talk)
    close(got, want)
