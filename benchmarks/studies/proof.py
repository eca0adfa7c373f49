"""The proof: `hfsparse eval` of many plans and peers, a few processes a GPU, in one results folder.

    python -m benchmarks.studies.proof ruler MODEL -o DIR --tasks vt,cwe --lengths 4096,8192
        --samples 100 --plan a.yaml --plan b.yaml --arm modelopt:0.7 --workers 4 --limit 540
    python -m benchmarks.studies.proof report -o DIR

Other options are those of `hfsparse eval`. Each task at each length is a run of its own in
DIR/parts, the longest first. Start it again, with more plans or samples, and it goes on. At the
end, or by `report` alone, what is there is merged into DIR and reported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from queue import SimpleQueue

from benchmarks.common.journal import cards, end_in_order
from hfsparse_eval.report import page as report
from hfsparse_eval.run.results import Results, Settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command")
    add("model", nargs="?")
    add("-o", "--output", type=Path, required=True)
    add("--tasks", default="")
    add("--lengths", default="")
    add("--workers", type=int, default=1, help="processes a GPU, or on the CPU")
    # Padded prompts take a mask, which dense attention is slow and large with: only short ones.
    add("--together", type=int, default=16384, help="ruler: tokens of a batch of samples")
    add("--limit", type=float, default=540, help="seconds, after which it ends in order")
    given, others = parser.parse_known_args()
    if given.command == "report":
        return merge(given.output)
    if not (given.model and given.tasks and given.lengths):
        parser.error("give a model, --tasks and --lengths; or `report`")
    whole = run_all(given, others)
    merge(given.output)
    if not whole:
        sys.exit("not all is done: start this again, it goes on")


def run_all(given, others: list[str]) -> bool:
    """Whether every task at every length is done."""
    end_in_order()
    end, free = time.time() + given.limit, SimpleQueue()
    for card in (cards() or [""]) * given.workers:
        free.put(card)
    base = [sys.executable, "-m", "hfsparse", "eval", given.command, given.model, *others]

    def run(unit: tuple[str, str]) -> bool:
        """Whether it is done; it waits for a free place."""
        (length, task), card, start = unit, free.get(), time.time()
        folder = given.output / "parts" / f"{task}-{length}"
        command = [*base, "--tasks", task, "--lengths", length, "-o", str(folder)]
        if given.command == "ruler":
            command += ["--batch", str(max(1, given.together // int(length)))]
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
    with ThreadPoolExecutor(free.qsize()) as threads:
        return all([*threads.map(run, product(lengths, given.tasks.split(",")))])


def merge(folder: Path) -> None:
    """The parts' results as those of one run, and its report."""
    runs = [json.loads(run.read_text("utf-8")) for run in sorted(folder.glob("parts/*/run.json"))]
    if not runs:
        sys.exit(f"no results in {folder / 'parts'} yet")
    for at, part in enumerate(sorted(folder.glob("parts/*/results.jsonl")), 1):
        shutil.copy(part, folder / f"results-{at}.jsonl")
    arms = {(arm["arm"], arm["plan"]): arm for run in runs for arm in run["arms"]}
    same = {json.dumps([run["settings"], session]) for run in runs for session in run["sessions"]}
    for settings, session in map(json.loads, sorted(same)):  # other settings are refused
        results = Results(folder, Settings(**settings), session, [*arms.values()])
    for path in report.save(results):
        print(path)


if __name__ == "__main__":
    main()
