"""The plans of the proof: recipes, and published methods at what `balanced` came to use.

    python -m benchmarks.studies.proof_plans MODEL -o DIR --lengths 4096,8192

`balanced` (within --budgets, then verified), `safe` and `small-cache` are made first. Then
`minference` gets the shares that the verified `balanced` is expected to use at the longest length,
`moa`, `duo` and a window alike on all heads (a little more than) its cache share. A plan of a
recipe that is there is not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, Plan

SHARES = ("prefill-density", "cache-share", "decode-share")
SINK, RECENT = 4, 64  # of the window, which then grows with the text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--lengths", required=True, help="of calibration prompts, by commas")
    parser.add_argument(
        "--budgets", nargs=3, type=float, default=(0.25, 0.4, 0.25), help=", ".join(SHARES)
    )
    parser.add_argument("--samples", help="of each length; else each recipe's own")
    parser.add_argument("--limit", type=float, default=540, help="seconds of one plan")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(5) as threads:
        others = [threads.submit(made, given, recipe, {}) for recipe in ("safe", "small-cache")]
        plan = made(given, "balanced", dict(zip(SHARES, given.budgets, strict=True)))
        if plan is None:
            sys.exit("no balanced plan: the others wait for its shares")
        used = plan.expected[max(plan.expected)]
        names = "pair_density", "cache_share", "decode_share"
        pairs, cache, read = (used.get(f"{n}_free", used[n]) for n in names)  # as budgets mean them
        uniform(plan, cache).save(given.output / "uniform.yaml")
        for recipe, budgets in {
            "minference": (pairs, cache, read),
            "moa": (1.0, cache, 1.0),
            "duo": (1.0, cache, 1.0),
        }.items():
            shares = dict(zip(SHARES, budgets, strict=True))
            others.append(threads.submit(made, given, recipe, shares))
        if not all(other.result() for other in others):
            sys.exit("not all plans were made: start this again")


def made(given, recipe: str, budgets: dict[str, float]) -> Plan | None:
    """The plan of a recipe within other budgets, in a process of its own."""
    path = given.output / f"{recipe}.yaml"
    if not path.exists():
        flags = [f"--{name}={share:.4f}" for name, share in budgets.items()]
        flags += [f"--lengths={given.lengths}", f"--recipe={recipe}", f"--output={path}"]
        flags += [f"--samples={given.samples}"] if given.samples else []
        command = [sys.executable, "-m", "hfsparse", "profile", given.model, *flags]
        with path.with_suffix(".log").open("w") as log, suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=given.limit, stdout=log, stderr=log)
    plan = Plan.load(path) if path.exists() else None
    told = plan.expected[max(plan.expected)] if plan else f"not made, see {path.stem}.log"
    print(f"{recipe}: {told}", flush=True)
    return plan


def uniform(plan: Plan, share: float) -> Plan:
    """A window of that share of the text on all heads, and nothing else."""
    window = Streaming(SINK, RECENT, round(share, 4))
    heads, kv = plan.model.q_heads, plan.model.kv_heads
    layer = Layer(("window",) * heads, ("window",) * kv, ("ring",) * kv)
    layers = (layer,) * plan.model.layers
    return Plan(plan.model, {"window": window}, layers, below=plan.below)


if __name__ == "__main__":
    main()
