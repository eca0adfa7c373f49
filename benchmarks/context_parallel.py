"""Claim: ranks that share a prompt's tokens read it sooner than one card, and each holds a part.

    python -m benchmarks.context_parallel [--lengths 131072,1048576] [--tokens 32] [--rounds 1]
                                          [--shape llama-3.1-8b] [--density 0.10]
    torchrun --nproc-per-node 2 -m benchmarks.context_parallel [the same] [--way exact,star]

`model.generate`, greedy, one random prompt, random weights (bf16), whole on each rank. The plan
keeps every fourth kv head full: its q heads read a prompt by block_topk at the density (1: every
key), and new tokens 6 % of its pages (quest); the others are rings of 64 + 256. Without torchrun it
is one card, which reads long prompts in chunks. Of each arm: seconds to the first token, ms a token
(the median after the first eight), the least of the rounds; then of the rank that holds most: the
share of the keys that it holds, and its peak. Each arm reads a short prompt first. The first rank
prints the table. --shape tiny tries it on a CPU.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed
from transformers import PreTrainedModel

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import SKIP, prompted
from benchmarks.common.journal import failure
from benchmarks.common.shapes import describe, endless, plan_of, tidy
from hfsparse import ContextParallel
from hfsparse.patcher import Patched
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Plan

RANKS, RANK = (int(os.environ.get(name, n)) for name, n in (("WORLD_SIZE", 1), ("RANK", 0)))
WARM = 20_480
HEAD = "arm | tokens | first token s | ms a token | keys held | peak GiB"


def begin() -> None:
    """Meet the other ranks."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if cuda else "gloo")


def quarter_full(model: PreTrainedModel, density: float) -> Plan:
    blocks = PATTERNS["block_topk"](share=density, min_blocks=2) if density < 1 else None
    return plan_of(model, "quarter full, quest 6 %", blocks)


def most(number: float) -> float:
    """The largest of all ranks'."""
    if RANKS == 1:
        return number
    told = [None] * RANKS
    distributed.all_gather_object(told, number)
    return max(told)


def measure(model: PreTrainedModel, length: int, tokens: int, handle: Patched) -> tuple[float, ...]:
    """Seconds to the first token, ms a token, share of the keys held, peak GiB."""
    tidy()
    if cuda := model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    if RANKS > 1:
        distributed.barrier()
    clock, start, _ = prompted(model, length, tokens)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return clock.at[0] - start, clock.ms(), most(handle.stats().cache_share), most(peak)


def rows(model: PreTrainedModel, arm: str, args, handle: Patched) -> list[str]:
    found = []
    prompted(model, min(WARM, *args.lengths), SKIP)
    for length in args.lengths:
        try:
            taken = [measure(model, length, args.tokens, handle) for _ in range(args.rounds)]
        except Exception as error:
            found.append(f"| {arm} | {length:,} | {failure(error)} |" + " |" * 3)
            continue
        first, ms, held, peak = (min(each) for each in zip(*taken, strict=True))
        found.append(f"| {arm} | {length:,} | {first:.3f} | {ms:.2f} | {held:.3f} | {peak:.1f} |")
        if RANK == 0:
            print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    asked = options.parser(__doc__, "131072,1048576", 32, "llama-3.1-8b")
    asked.add_argument("--density", type=float, default=0.10)
    asked.add_argument("--way", default="exact,star")
    args = options.parse(asked)
    if RANKS > 1:
        begin()
    torch.manual_seed(0)  # every rank has the same weights
    model, lines = endless(args.shape), []
    plan = quarter_full(model, args.density)
    for way in args.way.split(",") if RANKS > 1 else ["one card"]:
        context = ContextParallel(distributed.group.WORLD, way) if RANKS > 1 else None
        with hfsparse.patch(model, plan, context_parallel=context) as handle:
            lines += rows(model, way, args, handle)
    if RANK == 0:
        print(f"{RANKS} ranks; density {args.density}. {describe(model, args.shape)}\n")
        print(f"| {HEAD} |", "| --- | ---: | ---: | ---: | ---: | ---: |", *lines, sep="\n")
    if RANKS > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
