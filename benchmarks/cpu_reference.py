"""Claim: on a CPU, a head at pair density 0.1 costs less time than a full one at 8,192 tokens.

    python -m benchmarks.cpu_reference [--lengths 2048,8192] [--runs 7] [--threads 1]

One layer's prompt of 3 q heads over 1 kv head (head dim 64, float32, random q, k, v), each pattern
set to a pair density, against dense attention by torch's scaled_dot_product_attention. Sparse times
include choosing the blocks. Arms take turns; medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from hfsparse.kernels import dense, reference
from hfsparse.lists import Grid, default_block
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse_eval.run.machine import processor

DENSITIES = (0.05, 0.1, 0.25, 0.5)
SCALE = 64**-0.5
KNOBS: dict[str, Callable] = {  # a pattern of pair density that grows with n, of 4,096 steps
    "streaming": lambda n, S: Streaming(sink=64, recent=max(1, n * S // 4096)),
    "vertical_slash": lambda n, S: VerticalSlash(columns=max(1, n * S // 4096), diagonals=1),
    "block_topk": lambda n, S: BlockTopK(share=max(1, n) / 4096, min_blocks=1),
}


def setting(kind: str, density: float, q, k, grid: Grid) -> tuple[object, float, float]:
    """The pattern whose pair density comes nearest from above, its pair and its block density."""
    low, high = 0, 4096
    while high - low > 1:
        middle = (low + high) // 2
        lists = KNOBS[kind](middle, grid.Sk).lists(q, k, grid, SCALE)
        found = float((lists.pairs() / grid.pairs()[:, None]).mean())
        low, high = (low, middle) if found >= density else (middle, high)
    pattern = KNOBS[kind](high, grid.Sk)
    lists = pattern.lists(q, k, grid, SCALE)
    pairs, blocks = lists.pairs() / grid.pairs()[:, None], lists.blocks() / grid.blocks()[:, None]
    return pattern, float(pairs.mean()), float(blocks.mean())


def medians(arms: dict[str, Callable], runs: int) -> dict[str, float]:
    """Seconds of each arm; they take turns, so that a busy moment hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for run in range(runs + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if run:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def table(S: int, runs: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, S, 64) for heads in (3, 1, 1))
    grid, kv = Grid.causal(1, S, default_block(S)), torch.zeros(3, dtype=torch.int64)
    arms: dict[str, Callable] = {"dense": lambda: dense.prefill(q, k, v, grid, scale=SCALE)}
    rows = []
    for kind in KNOBS:
        for density in DENSITIES:
            pattern, pairs, blocks = setting(kind, density, q, k, grid)
            name = f"{kind} {density}"
            rows.append((name, kind, pairs, blocks))

            def choose(pattern=pattern):
                return pattern.lists(q, k, grid, SCALE)

            arms[name + " choice"] = choose
            arms[name] = lambda choose=choose: reference.prefill(q, k, v, choose(), kv, scale=SCALE)
    took = medians(arms, runs)
    full = took["dense"]
    print(f"\n{S} tokens, blocks of {grid.block}; dense: {1000 * full / 3:.1f} ms a head\n")
    print("| pattern | pair density | block density | ms a head | of which choice | of dense |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, kind, pairs, blocks in rows:
        spent, choice = (1000 * took[n] / 3 for n in (name, name + " choice"))
        ratio = took[name] / full
        print(f"| {kind} | {pairs:.3f} | {blocks:.3f} | {spent:.1f} | {choice:.1f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{processor()}, {os.cpu_count()} cores, {args.threads} threads used, load {load:.1f}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}")
    with torch.inference_mode():
        for length in args.lengths.split(","):
            table(int(length), args.runs)


if __name__ == "__main__":
    main()
