"""Claim: under a plan, ranks that share a model's heads answer sooner than one card.

    python -m benchmarks.tensor_parallel [--lengths 8192,131072] [--tokens 96] [--rounds 2]
                                         [--shape llama-3.1-8b] [--density 0.10] [--arms REGEX]
    torchrun --nproc-per-node 2 -m benchmarks.tensor_parallel [the same]

`model.generate`, greedy, one random prompt, random weights in the shape of Llama-3.1-8B (bf16),
which the first rank saves to a temporary folder and all load by `DistributedConfig`. Of each arm:
seconds to the first token, then ms a token, the median after the first eight; the least of the
rounds. `plan`: every q head reads a prompt by block_topk at the density, every kv head's steps read
6 % of their pages (quest); `fused`: its steps are compiled. The first rank prints the table.
--shape tiny tries it on a CPU.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import distributed
from transformers import LlamaForCausalLM, PreTrainedModel

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import prompted
from benchmarks.common.journal import failure
from benchmarks.common.shapes import describe, endless, plan_of, tidy
from hfsparse.patcher import Patched
from hfsparse.patcher.state import state_of
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Plan

RANKS, RANK = (int(os.environ.get(name, n)) for name, n in (("WORLD_SIZE", 1), ("RANK", 0)))
STOCK, NONE, PLAN, FUSED = ("stock", "no plan", "plan", "plan, fused")


def load(shape: str) -> PreTrainedModel:
    """The model, whole, or this rank's part of it."""
    if RANKS == 1:
        return endless(shape)
    from transformers.distributed import DistributedConfig

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if cuda else "gloo")
    folder = [tempfile.mkdtemp() if RANK == 0 else None]
    distributed.broadcast_object_list(folder)
    if RANK == 0:
        endless(shape).save_pretrained(folder[0])
        tidy()
    distributed.barrier()
    config = DistributedConfig(tp_plan="auto")
    model = LlamaForCausalLM.from_pretrained(
        folder[0], dtype="auto", distributed_config=config
    ).eval()
    distributed.barrier()
    if RANK == 0:
        shutil.rmtree(Path(folder[0]))
    model.generation_config.eos_token_id = None
    return model


def planned(model: PreTrainedModel, arm: str, density: float) -> Plan | None:
    blocks = PATTERNS["block_topk"](share=density, min_blocks=2)
    return None if arm == NONE else plan_of(model, "quest 6 %", blocks)


def measure(model: PreTrainedModel, length: int, tokens: int) -> tuple[float, float, float]:
    """Seconds to the first token, ms a token, peak GiB of this rank."""
    tidy()
    if cuda := model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    if RANKS > 1:
        distributed.barrier()
    clock, start, _ = prompted(model, length, tokens)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return clock.at[0] - start, clock.ms(), peak


def rows(model: PreTrainedModel, arm: str, args, handle: Patched | None = None) -> list[str]:
    found = []
    for length in args.lengths:
        try:
            taken = [measure(model, length, args.tokens) for _ in range(args.rounds + 1)][1:]
        except Exception as error:
            found.append(f"| {arm} | {length:,} | {failure(error)} |" + " |" * 4)
            continue
        first, ms, _ = (min(each) for each in zip(*taken, strict=True))
        peak = max(each[-1] for each in taken)
        more = "|"
        if handle is not None:
            state = state_of(model)
            ahead = ", ahead" if str(state.ahead) == "yes" else ""
            more = f"{handle.stats().pair_density:.3f} | {state.graphs}{ahead}"
            handle.reset_stats()
        found.append(f"| {arm} | {length:,} | {first:.3f} | {ms:.2f} | {peak:.1f} | {more} |")
        if RANK == 0:
            print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    asked = options.parser(__doc__, "8192,131072", 96, "llama-3.1-8b")
    asked.add_argument("--density", type=float, default=0.10)
    asked.add_argument("--arms", default=".", help="a regular expression: of these alone")
    args = options.parse(asked)
    model, lines = load(args.shape), []
    for arm in (each for each in (STOCK, NONE, PLAN, FUSED) if re.search(args.arms, each)):
        if arm == STOCK:
            lines += rows(model, arm, args)
            continue
        plan = planned(model, arm, args.density)
        with hfsparse.patch(model, plan, fuse=arm == FUSED) as handle:
            lines += rows(model, arm, args, handle)
    if RANK == 0:
        print(f"{RANKS} ranks; density {args.density}. {describe(model, args.shape)}\n")
        print("| arm | tokens | first token s | ms a token | peak GiB | pair density | graph |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | --- |", *lines, sep="\n")
    if RANKS > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
