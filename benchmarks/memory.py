"""Claim: `hfsparse check` knows from the config alone how much memory a prompt takes.

    python -m benchmarks.memory [--lengths 32768,131072,262144] [--out FOLDER]
                                [--shape llama-3.1-8b]

`model.generate` reads one random prompt and gives a few tokens; random weights, bf16 (float32 on a
CPU). `stock` is the unpatched model, in one piece; the others are patched, prompts above 131,072
tokens in chunks, as hfsparse reads them by itself: without a plan, with every second kv head full
and with every fourth, the rest rings of 64 + 256. Beside peak and KV bytes as torch counted them is
what `hfsparse.patcher.memory` predicts. With --out each row is on the disk (FOLDER/memory.jsonl)
when its arm is done, and the script, started again, goes on with the next one.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch

import hfsparse
from benchmarks.common.clock import prompted
from benchmarks.common.journal import Journal, end_in_order
from benchmarks.common.shapes import (
    NONE,
    STOCK,
    cache_bytes,
    chunk_of,
    describe,
    endless,
    plan_of,
    room_of,
    tidy,
)
from hfsparse import bench
from hfsparse.patcher import memory
from hfsparse.plan import ModelId, Plan

ARMS = (STOCK, NONE, "half ring", "quarter full")
NEW = 4  # tokens generated
TARGET = 5  # per cent that a predicted peak may be off


def run(model, arm: str, tokens: int) -> dict:
    """Bytes that one arm takes, and those predicted."""
    cuda, size = model.device.type == "cuda", model.dtype.itemsize
    follows = None if arm == STOCK else plan_of(model, arm) or Plan.full(ModelId.of(model))
    chunk = chunk_of(arm, tokens)
    known = memory.predict(model.config, follows, tokens + NEW, 1, chunk, size)
    row = {"predicted_peak": known.peak, "predicted_kv": known.cache}
    if known.peak > (room := room_of(model)):
        needs, has = known.peak / 2**30, room / 2**30
        return {"failed": f"needs {needs:.1f} GiB of {has:.1f}", **row}
    tidy()
    patched = hfsparse.patch(model, follows) if follows else contextlib.nullcontext()
    with patched:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        _, _, cache = prompted(model, tokens, NEW)
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return {"peak": peak, "kv": cache_bytes(cache), **row}


def table(rows: dict[str, dict]) -> str:
    """Markdown, in the order of the arms."""
    head = "arm | tokens | peak GiB | predicted | off by | KV GiB | predicted | off by"
    lines = [f"| {head} |", "| --- |" + " ---: |" * 7]
    worst = None
    for name, row in rows.items():
        arm, tokens = name.rsplit(" @ ", 1)
        cells = []
        for what in ("peak", "kv"):
            found, known = row.get(what), row.get(f"predicted_{what}")
            cells += ["" if n is None else f"{n / 2**30:.2f}" for n in (found, known)]
            cells.append("" if None in (found, known) else f"{100 * (known / found - 1):+.1f} %")
        if "failed" in row:
            cells[0] = row["failed"]
        elif row["peak"]:
            worst = max(worst or 0, 100 * abs(row["predicted_peak"] / row["peak"] - 1))
        lines.append(f"| {arm} | {int(tokens):,} | {' | '.join(cells)} |")
    if worst is not None:
        met = "met" if worst <= TARGET else "missed"
        lines.append(f"\nPeaks are predicted within {worst:.1f} %; target {TARGET}: {met}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="32768,131072,262144")
    parser.add_argument("--out", type=Path, help="folder of the rows")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=tuple(bench.SHAPES))
    args = parser.parse_args()
    end_in_order()
    model = endless(args.shape)
    made = f"{describe(model, args.shape)} Prompt and {NEW} tokens."
    journal = Journal(args.out and args.out / "memory.jsonl", made)
    try:
        for tokens in (int(n) for n in args.lengths.split(",")):
            for arm in ARMS:
                what = (model, arm, tokens)
                journal.row(f"{arm} @ {tokens}", lambda what=what: run(*what))
    finally:
        print(f"{made}\n\n{table(journal.rows)}", flush=True)


if __name__ == "__main__":
    main()
