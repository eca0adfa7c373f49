"""Is a window priced alike as a pattern of q heads and as a ring of their kv head?

    python -m benchmarks.studies.window_prices MODEL [--lengths 1024,2048] [--prompts 2] [--seed 0]

`balanced` sums a pattern's first-order effect over sampled rows and takes its size by q head, a
ring's over all rows and by kv head. The table has the effect of the same window, summed over all
heads of all layers, in these two ways and in one between them, by q head over all rows: the first
step is what sampling adds, the second what heads of a group make up for. Means over prompts.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch

from hfsparse.lists import Grid, default_block
from hfsparse.models.loading import load
from hfsparse.patterns.streaming import Streaming
from hfsparse.profiler.measure.capture import Seen, capture
from hfsparse.profiler.measure.effects import Candidates
from hfsparse.profiler.measure.exact import attention, sample_rows
from hfsparse.profiler.methods.one_pass import short_sighted_plan
from hfsparse.profiler.prompts.calibration import make_prompts

SINK = 64
PARTS = (32, 8)  # of a prompt, that a window spans


def price(seen: Seen, windows: dict[str, Streaming]) -> dict[str, np.ndarray]:
    """Of one layer and each window: as patterns, by q head over all rows, and as rings."""
    heads, length = seen.q.shape[1:3]
    kv_heads = seen.k.shape[1]
    grid = Grid.causal(1, length, default_block(length, seen.k.device), seen.k.device)
    every, (rows, weight) = torch.arange(length), sample_rows(length, seen.keys)
    values = seen.v[0].float().repeat_interleave(heads // kv_heads, 0)
    masks = {
        name: window.lists(seen.q, seen.k, grid, seen.logits.scale).mask(every)[0]
        for name, window in windows.items()
    }
    effects = {name: torch.empty(heads, length) for name in windows}
    for head in range(heads):
        mass = attention(seen, every, head)
        for name, mask in masks.items():
            kept = mass * mask[head]
            change = (kept / kept.sum(-1, keepdim=True) - mass) @ values[head]
            effects[name][head] = (seen.grad[0, head].float() * change).sum(-1)
    found = {}
    for name, effect in effects.items():
        whole = effect.sum(1)
        sampled = (effect[:, rows] * weight).sum(1)
        rings = whole.view(kv_heads, -1).sum(1)
        found[name] = np.array([float(t.abs().sum()) for t in (sampled, whole, rings)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--lengths", default="1024,2048")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load(args.model, "cpu", "float32")
    print("| tokens | window | as patterns | by q head, all rows | as rings | first / last |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in map(int, args.lengths.split(",")):
        windows = {f"last{length // part}": Streaming(SINK, length // part) for part in PARTS}
        short = short_sighted_plan(model, Candidates({}, windows, {}))
        found = [
            capture(model, prompt.ids, short, partial(price, windows=windows))
            for prompt in make_prompts(tokenizer, length, args.prompts, args.seed)
        ]
        for name in windows:
            sums = [sum(layer[name] for layer in layers) for layers in found]
            sampled, whole, rings = np.mean(sums, 0)
            cells = f"{sampled:.2f} | {whole:.2f} | {rings:.2f} | {sampled / rings:.2f}"
            print(f"| {length} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
