"""What a budget of bytes costs with rings alone, and with rings and fewer bits.

    python -m benchmarks.studies.budgets MODEL [--length 1024] [--at 8192] [--shares 0.25]
        [--samples 3] [--trials 12] [--seed 0]

`balanced` chooses for cache and decode from full heads and rings, in 16 bits and in 16, 8 or 4, of
the same measurements; bytes are those of rows of `--at` tokens, of a model in a type of two. Its
expected loss is the sum of effects. Then the patched model, in float32, is asked trials that chose
nothing: the table has the nats a token that values lost against dense, mean over trials with their
95 % interval. Values that cost the dense model more than KNOWN nats a token are left out.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
import transformers

import hfsparse
from hfsparse.interval import interval
from hfsparse.models.loading import load
from hfsparse.patcher.figures import predict
from hfsparse.plan import ModelId, Plan
from hfsparse.profiler.job import Job
from hfsparse.profiler.methods import balanced, one_pass
from hfsparse.profiler.run import prepare
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.solve.allocation import Budget, Infeasible, allocate, sum_losses
from hfsparse.profiler.verify.trials import LEVELS, make_trial, run_trial

KNOWN = 2.0  # nats a token that a value costs the dense model, at most
BITS = {"rings": (16,), "rings and bits": (16, 8, 4)}


def choose_plans(job: Job, shares: list[float], at: int) -> dict[str, tuple[Plan, float]]:
    """Plans with the loss that is expected of them; all candidates are measured in one go."""
    length, this = max(job.prompts), ModelId.of(job.model)
    names = balanced.candidates(length, [])
    names = replace(names, patterns=dict(islice(names.patterns.items(), 1)))
    names = balanced.in_bits(job, names, [8, 4])
    means, every, found = one_pass.measure_prompts(job, names), [*names.rings], {}
    for share in shares:
        for arm, bits in BITS.items():
            rings = {word: ring for word, ring in names.rings.items() if ring.bits in bits}
            packed = {word: full for word, full in names.packed.items() if full.bits in bits}
            own, kept = replace(names, rings=rings, packed=packed), [*map(every.index, rings)]
            part = {
                n: {x: t[:, kept] if x.startswith("ring") else t for x, t in some.items()}
                for n, some in means.items()
            }
            costs = one_pass.price_candidates(own, length, this.head_dim, at, itemsize=2)
            options = balanced.options(part, own, costs)
            try:
                layers = tuple(allocate(options, Budget(1, share, 1)))
            except Infeasible as error:
                print(f"{share:g} {arm}: {error}")
                continue
            used = one_pass.patterns_in_use(rings | packed, layers)
            plan = Plan(this, used, layers, job.below)
            found[f"{share:g} {arm}"] = plan, sum_losses(options, layers).sum()
    return found


def tabulate(rows: list[dict[str, np.ndarray]], plans: dict, config, at: int) -> str:
    lines = [
        "| plan | share of bytes | expected loss | nats a token lost |",
        "| --- | --- | --- | --- |",
    ]
    for name, (plan, expected) in plans.items():
        lost = [(row[name] - row["dense"])[row["dense"] <= KNOWN] for row in rows]
        means = [each.mean() for each in lost if len(each)]
        low, high = interval(means) if len(means) > 1 else (np.nan, np.nan)
        share = predict(config, plan, at, itemsize=2).cache_share
        told = f"{np.mean(means):.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {name} | {share:.3f} | {expected:.1f} | {told} |")
    values = sum(int((row["dense"] <= KNOWN).sum()) for row in rows)
    return "\n".join([*lines, f"{len(rows)} trials, {values} values"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--at", type=int, default=8192, help="tokens in the row that bytes are of")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25])
    parser.add_argument("--samples", type=int, default=3, help="prompts that choose")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, (model, tokenizer) = time.time(), load(args.model, "cpu", "float32")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args}", flush=True)
    settings = Settings(samples=args.samples, seed=args.seed, verify=False, progress=True)
    job = prepare(model, tokenizer, settings, (args.length,))
    plans = choose_plans(job, args.shares, args.at)
    for name, (plan, _) in plans.items():
        words = [word for layer in plan.layers for word in layer.cache]
        counts = ", ".join(f"{words.count(word)} {word}" for word in sorted({*words}))
        print(f"{name}: {counts}", flush=True)
    print(f"{time.time() - start:.0f} seconds to choose", flush=True)
    tasks, rows = LEVELS[0] | LEVELS[1], []
    for i in range(args.trials):
        trial = make_trial(tokenizer, args.length, i, args.seed + 1, tasks)
        row = {"dense": run_trial(model, trial)["loss"]}
        for name, (plan, _) in plans.items():
            with hfsparse.patch(model, plan):
                row[name] = run_trial(model, trial)["loss"]
        rows.append(row)
        print(f"\n{trial.task}\n{tabulate(rows, plans, model.config, args.at)}", flush=True)
    print(f"{time.time() - start:.0f} seconds")


if __name__ == "__main__":
    main()
