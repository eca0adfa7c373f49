"""The proof: `hfsparse eval` of many plans and peers, a few processes a GPU, in one results folder.

    python benchmarks/proof.py ruler MODEL -o DIR --tasks vt,cwe --lengths 4096,8192 --samples 100
        --plan a.yaml --plan b.yaml --arm modelopt:0.7 --batch 8 --workers 4 --limit 540

All options but --workers and --limit are those of `hfsparse eval`. Each task at each length is a
run of its own, the longest first; then one command takes all their results over and writes the
report. Start it again, with more plans or samples, and it goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from queue import SimpleQueue

from journal import end_in_order
from torch import cuda


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command")
    add("model")
    add("-o", "--output", type=Path, required=True)
    add("--tasks", required=True)
    add("--lengths", required=True)
    add("--workers", type=int, default=1, help="processes a GPU, or on the CPU")
    add("--limit", type=float, default=540, help="seconds, after which it ends in order")
    given, others = parser.parse_known_args()
    end_in_order()
    end, free = time.time() + given.limit, SimpleQueue()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cuda.device_count()))))
    for card in (seen.split(",") if cuda.is_available() else [""]) * given.workers:
        free.put(card)
    base = [sys.executable, "-m", "hfsparse", "eval", given.command, given.model, *others]

    def run(unit: tuple[str, str]) -> bool:
        """Whether all of a task at a length is done; it waits for a free place."""
        (length, task), card, start = unit, free.get(), time.time()
        folder = given.output / "parts" / f"{task}-{length}"
        command = [*base, "--tasks", task, "--lengths", length, "-o", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log").open("w") as log:
            told = dict(stdout=log, stderr=log, env={**os.environ, "CUDA_VISIBLE_DEVICES": card})
            try:
                code = subprocess.run(command, timeout=max(0, end - start), **told).returncode
                done = f"failed, see {folder / 'log'}" if code else "done"
            except subprocess.TimeoutExpired:
                done = "not done in time"
        free.put(card)
        print(f"{task}, {length} tokens: {done} after {time.time() - start:.0f} s", flush=True)
        return done == "done"

    lengths = sorted(given.lengths.split(","), key=int, reverse=True)
    units = list(product(lengths, given.tasks.split(",")))
    with ThreadPoolExecutor(free.qsize()) as threads:
        whole = all([*threads.map(run, units)])
    for at, part in enumerate(sorted(given.output.glob("parts/*/results.jsonl")), 1):
        shutil.copy(part, given.output / f"results-{at}.jsonl")
    if not whole:
        sys.exit("not all is done: start this again, it goes on")
    joint = ["--tasks", given.tasks, "--lengths", given.lengths, "-o", str(given.output)]
    sys.exit(subprocess.run([*base, *joint]).returncode)


if __name__ == "__main__":
    main()
