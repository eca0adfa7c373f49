"""Claim: a prompt of 1,048,576 tokens is read and answered on one GPU of 80 GB.

    python -m benchmarks.million --out FOLDER [--tokens 1048576] [--dense 131072,262144]
                                 [--pattern block_topk|antidiagonal] [--shape llama-3.1-8b]
                                 [--density 0.10] [--bits 4] [--gib 80] [--chunk 8192]

`model.generate`, greedy, random weights, bf16 (float32 on a CPU), one random prompt, in chunks as
hfsparse reads long prompts by itself. The plan keeps every fourth kv head full: its q heads read a
tenth of the visible key blocks of a prompt, and new tokens 6 % of its pages (quest); the others are
rings of 64 + 256; --bits: of what both keep. --gib: no more of the GPU's memory is taken. --chunk:
tokens that are read at a time, not as `generate` chooses. Beside it the stock model (sdpa,
in one piece) and the patched one without a plan at the lengths of --dense, as far as `hfsparse
check`'s arithmetic says they fit. Each arm reads a short prompt first, so that nothing is compiled
in the time to the first token (but steps that are fused: those compile in the first ones, which no
median counts). ms are medians over the tokens but the first eight.

A row is on the disk (FOLDER/million.jsonl) when its arm is done. Started again, the script goes on
with the next one. A row that failed stays as well: delete its line to have it tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import torch

import hfsparse
from benchmarks.common.clock import SKIP, prompted
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
from hfsparse.patcher import generation, memory
from hfsparse.patcher.state import state_of
from hfsparse.patterns import PATTERNS
from hfsparse.plan import ModelId, Plan

TTFT, MS = 60.0, 10.0  # targets at 1,048,576 tokens: seconds, milliseconds a token
WARM = 20_480, 8_192  # tokens of the short prompt, and of its chunks
SHOWN = "ttft_s ms kv_gib peak_gib predicted_gib block_density".split()
OURS, FUSED = "quarter full", "quarter full, fused"


def plan(model, arm: str, pattern: str, density: float, kept: str) -> Plan | None:
    """What an arm follows; None: the unpatched model. kept: in how many bits, as plans say it."""
    if arm == STOCK:
        return None
    if arm == NONE:
        return Plan.full(ModelId.of(model))
    budget = {"block_topk": {"share": density}, "antidiagonal": {"max_share": density}}[pattern]
    return plan_of(model, f"quarter full, quest 6 %{kept}", PATTERNS[pattern](**budget))


def run(
    model,
    arm: str,
    follows: Plan | None,
    tokens: int,
    new: int,
    warm: tuple,
    room: float,
    piece: int,
) -> dict:
    """One arm at one length: seconds, milliseconds, GiB."""
    cuda = model.device.type == "cuda"
    config, chunk = model.config, (arm != STOCK and piece) or chunk_of(arm, tokens)
    size = model.dtype.itemsize
    known = None if arm == STOCK else follows
    predicted = memory.predict(config, known, tokens + new, 1, chunk, size).peak / 2**30
    if predicted > room:
        return {"failed": f"needs {predicted:.1f} GiB of {room:.1f}", "predicted_gib": predicted}
    tidy()  # of an arm that failed
    with contextlib.ExitStack() as stack:
        handle = None
        if follows is not None:
            handle = stack.enter_context(hfsparse.patch(model, follows, fuse=arm == FUSED))
        at, short = warm
        prompted(model, at, SKIP, **({"prefill_chunk_size": short} if chunk else {}))
        tidy()
        if handle is not None:
            handle.reset_stats()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        clock, start, cache = prompted(
            model, tokens, new, **({"prefill_chunk_size": chunk} if chunk else {})
        )
        row = {
            "ttft_s": clock.at[0] - start,
            "ms": clock.ms(),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            "predicted_gib": predicted,
            "kv_gib": cache_bytes(cache) / 2**30,
            "block_density": None,
            "graph": "",
        }
        if handle is not None:
            row["block_density"] = density(follows, handle.stats())
            row["graph"] = str(state_of(model).graphs)
    return row


def density(follows: Plan, stats) -> float:
    """Blocks computed, of the heads that are no rings: a share of dense attention's."""
    found = [
        share
        for words, layer in zip(follows.layers, stats.layers, strict=True)
        for word, share in zip(words.prefill, layer.block_density, strict=True)
        if word != "stream"
    ]
    return sum(found) / len(found)


def table(rows: dict[str, dict], target_at: str) -> str:
    """Markdown, in the order of the arms."""
    head = "arm | tokens | TTFT s | ms a token | KV GiB | peak GiB | predicted GiB | block density"
    lines = [f"| {head} | graph |", "| --- |" + " ---: |" * 7 + " --- |"]
    for name, row in rows.items():
        arm, tokens = name.rsplit(" @ ", 1)
        if "failed" in row:
            lines.append(f"| {arm} | {int(tokens):,} | {row['failed']} |" + " |" * 6)
            continue
        shown = ["" if row[key] is None else f"{row[key]:.3f}" for key in SHOWN]
        lines.append(f"| {arm} | {int(tokens):,} | {' | '.join(shown)} | {row['graph']} |")
    row = rows.get(target_at, {})
    for what, key, most in (("s to the first token", "ttft_s", TTFT), ("ms a token", "ms", MS)):
        if key in row:
            met = "met" if row[key] <= most else "missed"
            lines.append(f"\n{row[key]:.2f} {what}; target {most:.0f} at 1,048,576 tokens: {met}")
    return "\n".join(lines)


def fits(model, room: float, piece: int, *how) -> str:
    """The longest prompts that fit in so many GiB, by `hfsparse check`'s arithmetic."""
    told = []
    for arm, chunk in ((STOCK, 0), (NONE, piece), (OURS, piece)):
        follows, size = plan(model, arm, *how), model.dtype.itemsize
        most = memory.longest(model.config, follows, int(room * 2**30), 1, chunk, size)
        told.append(f"{arm} {most:,}")
    return f"Tokens that fit in {room:.1f} GiB: {', '.join(told)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--new", type=int, default=64, help="tokens generated")
    parser.add_argument("--dense", default="131072,262144", help="lengths of the other arms")
    parser.add_argument("--pattern", default="block_topk", choices=("block_topk", "antidiagonal"))
    parser.add_argument("--shape", default="llama-3.1-8b", choices=tuple(bench.SHAPES))
    parser.add_argument("--density", type=float, default=0.10, help="of full heads' blocks")
    parser.add_argument("--bits", default="16", choices=("16", "8", "4", "fp8"))
    parser.add_argument("--gib", type=float, help="of the GPU's memory")
    parser.add_argument("--chunk", type=int, default=0, help="tokens at a time")
    parser.add_argument("--no-fused", action="store_true", help="no arm that torch.compile fuses")
    parser.add_argument("--warm", default=",".join(map(str, WARM)), help="short prompt, its chunks")
    args = parser.parse_args()
    if args.new < SKIP + 3:
        sys.exit(
            f"--new {args.new}: the first {SKIP} tokens are not timed, give {SKIP + 3} or more"
        )
    end_in_order()
    model = endless(args.shape)
    room = args.gib or room_of(model) / 2**30
    if args.gib and model.device.type == "cuda":
        whole = torch.cuda.get_device_properties(model.device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.gib * 2**30 / whole)
    kept = {"16": "", "fp8": ", fp8"}.get(args.bits, f", {args.bits} bits")
    how = args.pattern, args.density, kept
    made = (
        f"{describe(model, args.shape)} Pattern {args.pattern}, density {args.density}{kept}, "
        f"{args.new} new tokens; {room:.1f} GiB."
    )
    journal = Journal(args.out / "million.jsonl", made)
    lengths = [int(n) for n in args.dense.split(",") if n]
    arms = [(OURS, args.tokens), *((arm, n) for n in lengths for arm in (STOCK, NONE, OURS))]
    arms += [] if args.no_fused else [(FUSED, args.tokens)]
    warm = tuple(int(n) for n in args.warm.split(","))
    try:
        for arm, tokens in arms:
            follows = plan(model, arm, *how)
            what = model, arm, follows, tokens, args.new, warm, room, args.chunk
            journal.row(f"{arm} @ {tokens}", lambda what=what: run(*what))
    finally:
        print(f"{made}\n\n{table(journal.rows, f'{OURS} @ {1 << 20}')}", flush=True)
    if torch.cuda.is_available():
        print(f"\n{fits(model, room, args.chunk or generation.CHUNK, *how)}")


if __name__ == "__main__":
    main()
