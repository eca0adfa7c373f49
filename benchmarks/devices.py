"""Claim: a model spread over two GPUs takes its decode steps as one CUDA graph, as fast as on one.

    python -m benchmarks.devices [--tokens 2048] [--new 64] [--rounds 2] [--shape llama-3.1-8b]

`model.generate`, greedy, random weights, bf16, four prompts that are left-padded; on one GPU, then
by accelerate's `dispatch_model` with the second half of the layers on another. ms are medians over
the tokens but the first eight, the least of the rounds. What ours says must be what it says on one
GPU, token for token.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys

import torch
import transformers
from accelerate import dispatch_model

import hfsparse
from benchmarks.common.clock import continued
from benchmarks.common.shapes import endless
from hfsparse import bench
from hfsparse.patcher.state import state_of

PADS = 0, 300, 0, 1000  # of 2,048 tokens


def spread(model) -> None:
    """The first half of the layers on one GPU, the rest on another."""
    layers = model.config.num_hidden_layers
    places = {f"model.layers.{i}": int(i >= layers // 2) for i in range(layers)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    dispatch_model(model, places | ends)


def run(model, patched: bool, tokens: int, new: int) -> tuple[float, list, str]:
    """ms a token, what was said, and what became of the graph."""
    torch.manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (len(PADS), tokens), device="cuda:0")
    mask = torch.ones_like(ids)
    for row, pad in zip(mask, PADS, strict=True):
        row[: pad * tokens // 2048] = 0
    with hfsparse.patch(model) if patched else contextlib.nullcontext():
        clock, out = continued(model, ids, new, mask)
        graph = str(state_of(model).graphs) if patched else ""
    return clock.ms(), out.tolist(), graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=tuple(bench.SHAPES))
    args = parser.parse_args()
    if torch.cuda.device_count() < 2:
        sys.exit(f"this measures two CUDA devices, and torch sees {torch.cuda.device_count()}")
    model = endless(args.shape)
    print(
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {len(PADS)} prompts of {args.tokens:,} tokens\n"
    )
    print("| GPUs | stock ms | ours ms | x | graph | same tokens |")
    print("| ---: | ---: | ---: | ---: | --- | --- |", flush=True)
    first = None
    for count in (1, 2):
        if count == 2:
            spread(model)
        least = {False: math.inf, True: math.inf}
        for patched in (False, True) * args.rounds:
            ms, said, graph = run(model, patched, args.tokens, args.new)
            least[patched] = min(least[patched], ms)
        first = first or said
        stock, ours = least.values()
        same = "yes" if said == first else "NO"
        print(f"| {count} | {stock:.2f} | {ours:.2f} | {stock / ours:.2f} | {graph} | {same} |")


if __name__ == "__main__":
    main()
