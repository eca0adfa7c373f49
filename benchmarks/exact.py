"""Claim: exact mode gives the dense model's tokens sooner than dense steps do, on one GPU.

    python -m benchmarks.exact [--lengths 32768,131072] [--batch 1] [--plans "quest 6 %"] [--fuse]
                               [--counts 1,3,7] [--tokens 192] [--shape llama-3.1-8b]
                               [--model FOLDER --text FILE]

A draft is worth what it costs and how often it is right. What steps cost is timed with random
weights in the shape of Llama-3.1-8B (bf16), over caches that are filled with random keys: a dense
step, as many drafts by the plan as are verified at once, one behind another, and dense steps over
2, 4 and 8 tokens, as verify them; medians, each with the host waiting for it. From them follows
what a token costs at any acceptance a of k drafts: k drafts and a step over k + 1 tokens, over
1 + a + ... + a^k tokens; and how many times as fast as dense steps that is. In a batch all rows go
on as drafted or none, so that a is how often all are right. Random weights accept little: no
`generate` of theirs is timed. Plans are words, as in "quest 3 % refresh 4 + half ring"
(`shapes.plan_of`). --fuse: all steps are fused. With --model and --text a real model goes on from
the text's first tokens, dense and exact: ms a token, and the acceptance that it has. A text that
repeats itself is one that drafts know how to go on with. --shape tiny tries it on a CPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import nullcontext
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import SKIP, continued
from benchmarks.common.shapes import describe, endless, filled_cache, plan_of, tidy
from hfsparse.models.names import cache_name
from hfsparse.patcher.state import state_of
from hfsparse.runtime.call import drafting

PLANS = ("quest 6 %", "quest 6 % + half ring")
COUNTS = (1, 3, 7)  # drafts, as exact mode has them
ACCEPTED = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


@torch.no_grad()
def steps_ms(model, cache, new: int = 1, drafts: int = 0, times: int = 24) -> float:
    """Of a step of `new` tokens a row, or of so many drafts, behind a cache, which is left as it
    was."""
    batch, took = len(cache.layers[0].rows), []
    ids = torch.full((batch, new), 7, device=model.device)
    for _ in range(SKIP + times):
        start = time.perf_counter()
        for _ in range(drafts or 1):
            with drafting() if drafts else nullcontext():
                logits = model(ids, **{cache_name(model): cache}).logits
            logits[0, -1, 0].item()  # the host waits
        took.append(1e3 * (time.perf_counter() - start))
        for layer in cache.layers:
            layer.take_back(new * (drafts or 1))
    return statistics.median(took[SKIP:])


def token_ms(drafts: float, verify: float, count: int, accepted: float) -> float:
    """Of a token, where `count` drafts are each right with this probability."""
    return (drafts + verify) / sum(accepted**i for i in range(count + 1))


def show_steps(model, args) -> None:
    for length, name in product(args.lengths, args.plans):
        tidy()
        with hfsparse.patch(model, plan_of(model, name), exact=True, fuse=args.fuse):
            cache, state = filled_cache(model, args.batch, length, 64), state_of(model)
            dense = steps_ms(model, cache)
            drafts = {n: steps_ms(model, cache, drafts=n) for n in args.counts}
            verify = {n: steps_ms(model, cache, n + 1) for n in args.counts}
            graphs = f"drafts {state.exact.graphs}, verifying {state.graphs}"
        each = ", ".join(f"{n}: {ms / n:.2f}" for n, ms in drafts.items())
        times = ", ".join(f"{n + 1}: {ms:.2f}" for n, ms in verify.items())
        print(f"\n{length:,} tokens, batch {args.batch}, {name}; as graphs: {graphs}")
        print(f"dense step {dense:.2f} ms, a draft of {each} ms, dense steps over {times} ms")
        print(
            "accepted  " + "  ".join(f"{n:>9} drafts" for n in verify) + "   ms a token, of dense"
        )
        for accepted in ACCEPTED:
            told = [token_ms(drafts[n], verify[n], n, accepted) for n in verify]
            cells = (f"{ms:8.2f} {dense / ms:6.2f}x" for ms in told)
            print(f"{accepted:8.2f}  " + "  ".join(cells), flush=True)


def show_text(folder: str, text: Path, lengths: list[int], tokens: int) -> None:
    from hfsparse.models.loading import load

    model, tokenizer = load(folder)
    model.generation_config.eos_token_id = None
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids.to(model.device)
    for length in lengths:
        if ids.shape[1] < length:
            print(f"the text has {ids.shape[1]:,} tokens, not {length:,}", file=sys.stderr)
            continue
        said: list[Tensor] = []
        for name in ("no plan", *PLANS):
            tidy()
            exact = name != "no plan"
            with hfsparse.patch(model, plan_of(model, name), exact=exact) as handle:
                clock, out = continued(model, ids[:, :length], tokens)
                drafts = handle.stats().drafts
            said.append(out)
            steps = [b - a for a, b in pairwise(clock.at[SKIP:])]
            line = f"{length:,} tokens, {name}: {1e3 * statistics.mean(steps):.2f} ms a token"
            if drafts is not None:
                same = "the same" if torch.equal(out, said[0]) else "OTHER"
                line += f", acceptance {drafts.acceptance:.2f}, {same} tokens as dense"
            print(line, flush=True)


def main() -> None:
    made = options.parser(__doc__, "32768,131072", 192, "llama-3.1-8b")
    made.add_argument("--batch", default=1, type=int)
    made.add_argument("--counts", default=COUNTS, type=lambda text: [*map(int, text.split(","))])
    made.add_argument("--plans", default=PLANS, type=lambda text: text.split(","))
    made.add_argument("--fuse", action="store_true")
    made.add_argument("--model", help="a folder or hub name; with --text")
    made.add_argument("--text", type=Path, help="a file whose first tokens are the prompt")
    args = options.parse(made)
    if (args.model is None) != (args.text is None):
        sys.exit("give both --model and --text, or neither")
    if args.model is not None:
        return show_text(args.model, args.text, args.lengths, args.tokens)
    model = endless(args.shape)
    print(describe(model, args.shape))
    return show_steps(model, args)


if __name__ == "__main__":
    main()
