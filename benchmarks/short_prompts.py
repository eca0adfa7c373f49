"""Claim: a short prompt, whose time is the host's, is as fast under a patch as without one.

    python -m benchmarks.short_prompts [--lengths 128,512,1024,2048] [--rounds 15]
                                       [--shape llama-3.1-8b] [--layers N]

Random weights, bf16 (float32 on a CPU), one prompt. The arms share their weights and take turns:
`stock` (sdpa), `no plan`, and a plan of half rings and `quest` 6 % whose `below` no prompt reaches.
Medians of all rounds, each with a new cache: milliseconds to the first token, and of the step
behind it, which stores what a short prompt has let wait; operations that each of them dispatches.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

import hfsparse
from benchmarks.common.shapes import NONE, STOCK, describe, plan_of
from hfsparse import bench
from hfsparse.plan import Below

UNDER = "a plan, under its below"
ARMS = (STOCK, NONE, UNDER)
BELOW = 1 << 16
TARGET = 0.98


class Operations(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        return function(*args, **(kwargs or {}))


def arms_of(shape: str, layers: int | None) -> dict[str, PreTrainedModel]:
    """A model an arm, all of the same weights."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    stock = bench.random_model(shape, device, torch.bfloat16 if cuda else torch.float32)
    if layers is not None:
        del stock.model.layers[layers:]
        stock.config.num_hidden_layers = layers
    shared = {id(t): t for t in (*stock.parameters(), *stock.buffers())}
    arms = {name: copy.deepcopy(stock, {**shared}) for name in ARMS}
    hfsparse.patch(arms[NONE])
    plan = plan_of(arms[UNDER], "quest 6 % + half ring")
    hfsparse.patch(arms[UNDER], replace(plan, below=Below(BELOW, BELOW, BELOW)))
    return arms


def turn(model: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Milliseconds to the first token, and of the step behind it."""
    cache, took = DynamicCache(), []
    for new in (ids, ids[:, :1]):
        more = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        took.append(bench.timed(model.device, lambda new=new, more=more: model(new, **more))[0])
    return took[0] * 1e3, took[1] * 1e3


@torch.inference_mode()
def operations(model: PreTrainedModel, ids: Tensor) -> tuple[int, int]:
    """Of a prompt, and of the step behind it."""
    cache, seen = DynamicCache(), []
    for new in (ids, ids[:, :1]):
        with Operations() as found:
            model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seen.append(found.seen)
    return seen[0], seen[1]


HEAD = (
    "tokens | arm | first token ms | of stock's speed | step behind it ms | both | operations"
    " | of the step"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="128,512,1024,2048")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=tuple(bench.SHAPES))
    parser.add_argument("--layers", type=int, help="as many of the shape's layers")
    args = parser.parse_args()
    arms = arms_of(args.shape, args.layers)
    print(f"{describe(arms[STOCK], args.shape)}\n", flush=True)
    print(f"| {HEAD} |\n|" + " --- |" * (HEAD.count("|") + 1), flush=True)
    worst = 1.0
    for tokens in map(int, args.lengths.split(",")):
        ids = torch.randint(0, arms[STOCK].config.vocab_size, (1, tokens))
        ids, took = ids.to(arms[STOCK].device), defaultdict(list)
        for at in range(args.rounds + 2):
            for name, model in arms.items():
                found = turn(model, ids)
                took[name] += [found] if at > 1 else []
        medians = {
            name: [statistics.median(each) for each in zip(*found, strict=True)]
            for name, found in took.items()
        }
        for name, (first, step) in medians.items():
            speed = medians[STOCK][0] / first
            worst = min(worst, speed)
            both = sum(medians[STOCK]) / (first + step)
            cells = f"{first:.1f} | {speed:.3f} | {step:.1f} | {both:.3f}"
            prompt, behind = operations(arms[name], ids)
            print(f"| {tokens:,} | {name} | {cells} | {prompt} | {behind} |", flush=True)
    met = "met" if worst >= TARGET else "missed"
    print(f"\n- target: {TARGET} of stock's speed at every length, {met} ({worst:.3f} at worst)")


if __name__ == "__main__":
    main()
