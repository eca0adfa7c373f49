"""Claim: keys in the host's memory cost a step what the pages cost that the GPU lacks.

    python -m benchmarks.host [--lengths 131072] [--tokens 96] [--share 0.06] [--hot 0.12]
                              [--rings] [--rounds 2] [--shape llama-3.1-8b] [--arms REGEX]
    python -m benchmarks.host --lengths 1047552 --rings --rounds 1
    python -m benchmarks.host --model PATH --lengths 24576 --tokens 256

`model.generate`, greedy, random weights (bf16), over caches that are filled with random keys of the
given length; every arm in one run. Steps read a share of the pages (quest), once with every key on
the GPU and otherwise with keys in pinned memory of the host, as they are or in 8 or 4 bits, and a
hot set of the stated share; with and without fusing. ms are medians over the tokens but the first
eight, the least of the rounds. Bytes are those allocated in each memory, beside those of the stock
cache. --rings: every second kv head is a ring of 64 + 256, as a million tokens ask for on one card:
all heads would take 128 GiB. 1,047,552 and the answer are at most 2^20 tokens, since PyTorch gives
out pinned memory in powers of two.

The hit rate is that of random weights and keys, whose choices change more from step to step than
those of a trained model. With --model it is a trained one's, and no time is told: texts of prose
and of code are read, their last --tokens one by one, as they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import torch
from transformers import DynamicCache

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import SKIP, continued
from benchmarks.common.facts import read
from benchmarks.common.journal import failure
from benchmarks.common.shapes import describe, endless, filled_cache, plan_of, tidy
from hfsparse.lists import PAGE
from hfsparse.models.loading import load
from hfsparse.patcher.state import state_of
from hfsparse.plan import Plan
from hfsparse.plan.kept import Full
from hfsparse.profiler.prompts.calibration import fill

RESIDENT, HOST = "on the GPU", "in host memory"
HOSTED = {HOST: 16, f"{HOST}, 8 bits": 8, f"{HOST}, 4 bits": 4}  # bits
ARMS = [f"{arm}{fused}" for fused in ("", ", fused") for arm in (RESIDENT, *HOSTED)]


@dataclass
class Row:
    """One arm at one length: the least of its rounds' medians, and what it holds."""

    ms: float
    gpu: int  # bytes
    host: int
    dense: int
    hits: float
    graph: str


def plan(model, arm: str, share: float, hot: float, rings: bool) -> Plan:
    """Chosen pages of keys that lie where the arm says."""
    made = plan_of(model, "quest 6 % + half ring" if rings else "quest 6 %")
    patterns = {**made.patterns, "quest": replace(made.patterns["quest"], share=share)}
    if arm.startswith(RESIDENT):
        return replace(made, patterns=patterns)
    patterns["host"] = Full(HOSTED[arm.removesuffix(", fused")], host=True, hot=hot)
    layers = tuple(
        replace(x, cache=tuple("host" if word == "full" else word for word in x.cache))
        for x in made.layers
    )
    return replace(made, patterns=patterns, layers=layers)


def run(model, arm: str, follows: Plan, length: int, tokens: int) -> Row:
    """One arm at one length."""
    tidy()
    with hfsparse.patch(model, follows, fuse="fused" in arm) as handle:
        cache = filled_cache(model, 1, length, tokens + 2)
        ids = torch.randint(5, model.config.vocab_size, (1, length + 1), device=model.device)
        clock, _ = continued(model, ids, tokens, past_key_values=cache)
        stats = handle.stats()
        held = stats.kv_bytes, stats.host_bytes, stats.kv_bytes_dense, stats.hit_rate
        return Row(clock.ms(), *held, str(state_of(model).graphs))


def shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def page_bytes(cache) -> float:
    """Bytes of a page of one kv head in host memory."""
    stores = (store for layer in cache.layers for store in layer.stores if store.outside())
    store = next(stores)
    held = sum(t.nbytes for t in store.outside())
    return held * PAGE / (store.capacity * len(store.group.heads))


@torch.inference_mode()
def hits(model, tokenizer, args) -> Iterator[str]:
    """Of a trained model: a line of Markdown for each text and hot set."""
    yield "| text | tokens | read | hot set | hit rate | least, most of a layer | fetched a step |"
    yield "| --- |" + " ---: |" * 6
    for kind, length in product(("prose", "code"), args.lengths):
        parts = fill(tokenizer, kind, length + args.tokens, Random(f"host {kind}"))
        ids = torch.tensor([[x for part in parts for x in part]], device=model.device)
        prompt, *steps = ids[:, : length + args.tokens].split([length, *[1] * args.tokens], 1)
        for hot in args.hots:
            with hfsparse.patch(model, plan(model, HOST, args.share, hot, args.rings)) as handle:
                cache = DynamicCache()
                for each in (prompt, *steps[:SKIP]):
                    read(model, each, cache)
                handle.reset_stats()
                for each in steps[SKIP:]:
                    read(model, each, cache)
                stats = handle.stats()
            units = [layer.units for layer in stats.layers]
            rates = [sum(each.done) / sum(each.dense) for each in units if sum(each.dense)]
            missed = sum(sum(each.dense) - sum(each.done) for each in units)
            fetched = missed * page_bytes(cache) / (args.tokens - SKIP)
            yield (
                f"| {kind} | {length:,} | {args.share:g} | {hot:g} | {stats.hit_rate:.3f} "
                f"| {min(rates):.2f}, {max(rates):.2f} | {fetched / 2**20:.2f} MiB |"
            )
            del cache
            tidy()


def table(rows: dict[tuple[int, str], Row | str]) -> str:
    """Markdown."""
    head = "keys | tokens | ms a token | x resident | GPU GiB | x dense | host GiB | hit rate"
    lines = [f"| {head} | graph |", "| --- |" + " ---: |" * 7 + " --- |"]
    for (length, arm), it in sorted(rows.items(), key=lambda item: item[0][0]):
        if isinstance(it, str):
            lines.append(f"| {arm} | {length:,} | {it} |" + " |" * 6)
            continue
        beside = rows.get((length, f"{RESIDENT}{', fused' * arm.endswith(', fused')}"))
        times = f"{it.ms / beside.ms:.2f}" if isinstance(beside, Row) else ""
        hits = f"{it.hits:.3f}" if it.host else ""
        lines.append(
            f"| {arm} | {length:,} | {it.ms:.2f} | {times} | {it.gpu / 2**30:.2f} "
            f"| {it.gpu / it.dense:.3f} | {it.host / 2**30:.2f} | {hits} | {it.graph} |"
        )
    return "\n".join(lines)


def main() -> None:
    made = options.parser(__doc__, lengths="131072", tokens=96, shape="llama-3.1-8b")
    made.add_argument("--share", type=float, default=0.06, help="of the pages, read by a step")
    made.add_argument("--hot", type=float, default=0.12, help="of the pages, on the GPU")
    made.add_argument("--rings", action="store_true", help="every second kv head a ring")
    made.add_argument("--arms", default="", help="a regular expression: of these alone")
    made.add_argument("--model", help="a trained one: its hit rate, by hot sets")
    made.add_argument("--hots", type=shares, default=[0.08, 0.12, 0.25], help="of these")
    args = options.parse(made)
    options.need_cuda()
    if args.model:
        model, tokenizer = load(args.model, "auto", "auto")
        for line in hits(model, tokenizer, args):
            print(line, flush=True)
        return
    model = endless(args.shape)
    print(describe(model, args.shape))
    print(
        f"A step reads {args.share:g} of the pages, the hot set holds {args.hot:g}.\n", flush=True
    )
    rows: dict[tuple[int, str], Row | str] = {}
    try:
        for _ in range(args.rounds):
            for length in args.lengths:
                for arm in (arm for arm in ARMS if re.search(args.arms, arm)):
                    before = rows.get((length, arm))
                    if isinstance(before, str):
                        continue  # it would fail once more
                    try:
                        follows = plan(model, arm, args.share, args.hot, args.rings)
                        row = run(model, arm, follows, length, args.tokens)
                    except Exception as error:
                        rows.setdefault((length, arm), failure(error))
                        print(f"  {arm}, {length:,}: {failure(error)}", file=sys.stderr, flush=True)
                        continue
                    print(f"  {arm}, {length:,}: {row.ms:.2f} ms", file=sys.stderr, flush=True)
                    if before is None or row.ms < before.ms:
                        rows[length, arm] = row
    finally:
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
