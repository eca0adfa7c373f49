"""Claim: on a CPU a plan never costs much, and pays at long prompts, of one layer and of a model.

    python -m benchmarks.cpu_reference [--lengths 2048,8192] [--runs 7] [--threads 1]
    python -m benchmarks.cpu_reference --model .cache/smollm2 [--plan PLAN] [--busy] [--steps]

One layer's prompt of 3 q heads over 1 kv head (head dim 64, float32, random q, k, v), each pattern
set to a pair density, against dense attention by torch's scaled_dot_product_attention. Sparse times
include choosing the blocks. With --model: whole prompts of random tokens, the model as it is and
under a plan (that of a model of its shape will do), or with --steps each token behind them; --busy
keeps every core at other work meanwhile. Arms take turns; medians, of layers in CPU time, of models
in both. Of steps the operations that PyTorch is asked for are counted, too, those that only look at
a tensor in another way (views) left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hfsparse
from hfsparse.kernels import cpu, dense
from hfsparse.lists import Grid, default_block
from hfsparse.models.loading import load
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.plan import Plan
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


def medians(arms: dict[str, Callable], runs: int) -> dict[str, tuple[float, float]]:
    """Seconds of each arm by the clock and of CPU time; they take turns, so that a busy moment hits
    all of them."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for run in range(runs + 1):
        for name, arm in arms.items():
            start, spent = time.perf_counter(), time.process_time()
            arm()
            if run:  # the first warms up
                seconds[name].append((time.perf_counter() - start, time.process_time() - spent))
    return {
        name: tuple(map(statistics.median, zip(*taken, strict=True)))
        for name, taken in seconds.items()
    }


def _spin(parent: int) -> None:
    while os.getppid() == parent:  # killed or not
        sum(range(100_000))


@contextmanager
def load_on_every_core() -> Iterator[None]:
    """As many processes as there are cores, each at work until the block ends."""
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_spin, args=(os.getpid(),), daemon=True)
        for _ in range(os.cpu_count())
    ]
    for other in others:
        other.start()
    time.sleep(5)  # they have imported what they need, and spin
    try:
        yield
    finally:
        for other in others:
            other.terminate()


def prompts(folder: str, plan: str, lengths: list[int], runs: int) -> None:
    """Whole prompts: the model as it is, and under the plan."""
    model, _ = load(folder)
    print("\n| tokens | pair density | dense, s | plan, s | of dense | of its CPU time |")
    print("| --- | --- | --- | --- | --- | --- |")
    for length in lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, length))

        def read(ids=ids):
            return model(ids, use_cache=True, logits_to_keep=1)

        density = []

        def under_the_plan(read=read, density=density):
            with hfsparse.patch(model, Plan.load(plan), allow={"fingerprint"}) as handle:
                read()
                density.append(handle.stats().pair_density)

        took = medians({"dense": read, "plan": under_the_plan}, runs)
        (dense_s, dense_cpu), (plan_s, plan_cpu) = took["dense"], took["plan"]
        print(
            f"| {length:,} | {density[-1]:.2f} | {dense_s:.2f} | {plan_s:.2f} "
            f"| {plan_s / dense_s:.2f} | {plan_cpu / dense_cpu:.2f} |",
            flush=True,
        )


class Operations(TorchDispatchMode):
    """Counts the operations that run inside, views left out."""

    count = 0

    def __torch_dispatch__(self, run, types, args=(), kwargs=None):
        self.count += not run.is_view and run.name() != "aten::_unsafe_view"
        return run(*args, **(kwargs or {}))


def steps(folder: str, plan: str, lengths: list[int], runs: int) -> None:
    """Tokens behind a prompt, one at a time: the model as it is, and under the plan."""
    model, other = load(folder)[0], load(folder)[0]
    hfsparse.patch(other, Plan.load(plan), allow={"fingerprint"})
    print("\n| tokens | dense, ms | plan, ms | of dense | of its CPU time | operations |")
    print("| --- | --- | --- | --- | --- | --- |")
    for length in lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, length))
        arms, counted = {}, []
        for name, each in (("dense", model), ("plan", other)):
            cache = each(ids, use_cache=True, logits_to_keep=1).past_key_values

            def step(each=each, cache=cache, ids=ids[:, -1:]):
                each(ids, past_key_values=cache)

            step()
            with Operations() as operations:
                step()
            arms[name] = step
            counted.append(operations.count)
        took = medians(arms, runs)
        (dense_s, dense_cpu), (plan_s, plan_cpu) = took["dense"], took["plan"]
        print(
            f"| {length:,} | {1000 * dense_s:.0f} | {1000 * plan_s:.0f} | {plan_s / dense_s:.2f} "
            f"| {plan_cpu / dense_cpu:.2f} | {counted[0]:,}, {counted[1]:,} |",
            flush=True,
        )


def table(S: int, runs: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, S, 64) for heads in (3, 1, 1))
    grid = replace(Grid.causal(1, S, default_block(S)), padded=False, past=False)  # as of a prompt
    kv = torch.zeros(3, dtype=torch.int64)
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
            arms[name] = lambda choose=choose: cpu.prefill(q, k, v, choose(), kv, scale=SCALE)
    took = {name: spent for name, (_, spent) in medians(arms, runs).items()}
    full = took["dense"]
    print(f"\n{S} tokens, blocks of {grid.block}; dense: {1000 * full / 3:.1f} ms (CPU) a head\n")
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
    parser.add_argument("--model", help="folder of a model, whose whole prompts are read")
    parser.add_argument("--plan", default="benchmarks/results/demo-plan.yaml")
    parser.add_argument("--steps", action="store_true", help="the model's steps, not its prompts")
    parser.add_argument("--busy", action="store_true", help="every core has other work, too")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{processor()}, {os.cpu_count()} cores, {args.threads} threads used, load {load:.1f}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}")
    with torch.inference_mode(), load_on_every_core() if args.busy else nullcontext():
        if args.model:
            measure = steps if args.steps else prompts
            measure(args.model, args.plan, lengths, args.runs)
            return
        for length in lengths:
            table(length, args.runs)


if __name__ == "__main__":
    main()
