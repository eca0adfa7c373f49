"""Claim: rows of a batch that have ended cost a step no keys (not yet measured).

    python -m benchmarks.ended [--batch 32] [--lengths 8192] [--tokens 72] [--shape llama-3.1-8b]
                               [--plans "half ring, fused; quest 6 % + half ring, fused"] [--stock]

`model.generate`, greedy, random weights (bf16, float32 on a CPU) and prompts, which are read in
chunks; tokens alone are asked for. After half of the tokens half of the rows end. Medians of a
token, before and after. --stock runs the stock model, too, whose rows read on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from itertools import pairwise

import torch
import transformers
from transformers import StoppingCriteria, StoppingCriteriaList

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import SKIP
from benchmarks.common.journal import failure
from benchmarks.common.shapes import STOCK, endless, plan_of, tidy
from hfsparse.patcher.state import is_patched, state_of

PLANS = ("half ring, fused", "quest 6 % + half ring, fused")
END, PAD = 7, 0
CHUNK = 16384  # tokens of all rows that are read at once
PAUSE = 12  # tokens after the rows' end: it is none that is foreseen, steps wait for a while


class Ending(StoppingCriteria):
    """Has the first rows of a batch end with token number `last`, and notes when tokens arrive."""

    def __init__(self, rows: int, last: int):
        self.rows, self.last = rows, last
        self.at: list[float] = []

    def __call__(self, input_ids, scores, **more):
        self.at.append(time.perf_counter())
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if len(self.at) == self.last:
            input_ids[: self.rows, -1] = END
            done[: self.rows] = True
        return done


def line(model, name: str, batch: int, length: int, tokens: int) -> str:
    """A row of the table: ms of a token while all rows go on, and once half have ended."""
    torch.manual_seed(0)
    ids = torch.randint(8, model.config.vocab_size, (batch, length), device=model.device)
    clock, last = Ending(batch // 2, tokens // 2), tokens // 2
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=PAD,
        prefill_chunk_size=max(1, CHUNK // batch),
        suppress_tokens=[END],
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    assert int((out[:, -1] == PAD).sum()) >= batch // 2
    spent = [1e3 * (b - a) for a, b in pairwise(clock.at)]
    alive, half = (statistics.median(t) for t in (spent[SKIP:last], spent[last + PAUSE :]))
    graph = ""
    if is_patched(model):
        graph = f"{state_of(model).graphs}" + ", ahead" * (f"{state_of(model).ahead}" == "yes")
    rate = f"{1e3 * batch / alive:.0f}"
    return f"| {name} | {batch} | {length:,} | {alive:.2f} | {rate} | {half:.2f} | {graph} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lengths", default=[8192], type=options.numbers)
    parser.add_argument("--tokens", type=int, default=72)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--plans", default="; ".join(PLANS), help="with semicolons between")
    args = options.parse(parser)
    model = endless(args.shape)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{where}; {versions}", flush=True)
    print("\n| arm | batch | tokens | ms, all rows | tokens/s | ms, half of them | graph |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)
    plans = [name.strip() for name in args.plans.split(";")]
    for name in plans + [STOCK] * args.stock:
        patched = nullcontext()
        if name != STOCK:
            patched = hfsparse.patch(model, plan_of(model, name), fuse=name.endswith("fused"))
        with patched:
            for length in args.lengths:
                try:
                    said = line(model, name, args.batch, length, args.tokens)
                except Exception as error:
                    said = f"| {name} | {args.batch} | {length:,} | {failure(error)} | | | |"
                print(said, flush=True)
                tidy()


if __name__ == "__main__":
    main()
