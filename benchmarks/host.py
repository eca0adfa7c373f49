"""Claim: keys in the host's memory cost a step what the pages cost that the GPU lacks.

    python -m benchmarks.host [--lengths 131072] [--tokens 96] [--share 0.06] [--hot 0.12]
                              [--rings] [--rounds 2] [--shape llama-3.1-8b] [--arms REGEX]
    python -m benchmarks.host --lengths 131008 --steady 5.5,4,0
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

The hit rate is that of the steps that are timed. Random weights choose other pages from step to
step than before, more than trained ones do. --steady N gives their queries a part that no token
changes, N times as large as the part that tokens do, so that choices last: see `steady`. What a
trained model's hit rate is, --model tells, and no time: texts of prose and of code are read, their
last --tokens one by one, as they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import torch
from torch import nn
from transformers import DynamicCache

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import SKIP, continued
from benchmarks.common.facts import read
from benchmarks.common.journal import failure
from benchmarks.common.shapes import describe, endless, filled_cache, plan_of, tidy
from hfsparse.lists import PAGE
from hfsparse.models.loading import load
from hfsparse.models.names import text_decoder
from hfsparse.patcher.state import state_of
from hfsparse.plan import Plan
from hfsparse.plan.kept import Full
from hfsparse.profiler.prompts.calibration import fill

RESIDENT, HOST = "on the GPU", "in host memory"
HOSTED = {HOST: 16, f"{HOST}, 8 bits": 8, f"{HOST}, 4 bits": 4}  # bits
Key = tuple[int, float | None, str]  # tokens, how steady queries are, an arm
ARMS = [f"{arm}{fused}" for fused in ("", ", fused") for arm in (RESIDENT, *HOSTED)]


@dataclass
class Row:
    """One arm at one length: the least of its rounds' medians, and what it holds."""

    ms: float
    gpu: int  # bytes
    host: int
    dense: int
    hits: float  # of the steps that are timed
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


@torch.no_grad()
def steady(model, times: float) -> None:
    """Give each layer's queries a part that no token changes, `times` as large as the rest.

    It is a bias, as Qwen2's queries have one, in the half of the channels that rope turns least:
    there lie the large values of trained models' queries (arXiv 2502.01563), and from token to
    token rope leaves them where they are. Layers, heads and channels draw it once for all sizes.
    """
    dim = model.config.head_dim
    for n, layer in enumerate(text_decoder(model).layers):
        project = layer.self_attn.q_proj
        weight, generator = project.weight.float(), torch.Generator().manual_seed(n)
        drawn = torch.randn(len(weight), generator=generator)
        drawn.view(-1, 2, dim // 2)[..., : dim // 4] = 0
        # What tokens change is as large as a weight's rows are long, behind a norm.
        held = times * drawn.to(weight.device) * weight.norm(dim=1)
        if project.bias is None:
            project.bias = nn.Parameter(torch.empty_like(project.weight[:, 0]))
        project.bias.copy_(held)


def run(model, arm: str, follows: Plan, length: int, tokens: int) -> Row:
    """One arm at one length."""
    tidy()
    with hfsparse.patch(model, follows, fuse="fused" in arm) as handle:
        cache = filled_cache(model, 1, length, tokens + 2)
        ids = torch.randint(5, model.config.vocab_size, (1, length + 1), device=model.device)
        clock, _ = continued(model, ids, tokens, settled=handle.reset_stats, past_key_values=cache)
        stats = handle.stats()
        held = stats.kv_bytes, stats.host_bytes, stats.kv_bytes_dense, stats.hit_rate
        return Row(clock.ms(), *held, str(state_of(model).graphs))


def numbers(text: str) -> list[float]:
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


def table(rows: dict[Key, Row | str]) -> str:
    """Markdown."""
    head = "keys | tokens | steady | hit rate | ms a token | x resident | GPU GiB | x dense"
    lines = [f"| {head} | host GiB | graph |", "| --- |" + " ---: |" * 8 + " --- |"]
    for (length, size, arm), it in sorted(rows.items(), key=lambda item: item[0][:1]):
        first = f"| {arm} | {length:,} | {'' if size is None else f'{size:g}'} |"
        if isinstance(it, str):
            lines.append(f"{first} | {it} |" + " |" * 5)
            continue
        beside = rows.get((length, size, f"{RESIDENT}{', fused' * arm.endswith(', fused')}"))
        times = f"{it.ms / beside.ms:.2f}" if isinstance(beside, Row) else ""
        hits = f"{it.hits:.3f}" if it.host else ""
        lines.append(
            f"{first} {hits} | {it.ms:.2f} | {times} | {it.gpu / 2**30:.2f} "
            f"| {it.gpu / it.dense:.3f} | {it.host / 2**30:.2f} | {it.graph} |"
        )
    return "\n".join(lines)


def main() -> None:
    made = options.parser(__doc__, lengths="131072", tokens=96, shape="llama-3.1-8b")
    made.add_argument("--share", type=float, default=0.06, help="of the pages, read by a step")
    made.add_argument("--hot", type=float, default=0.12, help="of the pages, on the GPU")
    made.add_argument("--rings", action="store_true", help="every second kv head a ring")
    made.add_argument("--arms", default="", help="a regular expression: of these alone")
    made.add_argument("--steady", type=numbers, default=[None], help="sizes of queries' fixed part")
    made.add_argument("--model", help="a trained one: its hit rate, by hot sets")
    made.add_argument("--hots", type=numbers, default=[0.08, 0.12, 0.25], help="of these")
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
    rows: dict[Key, Row | str] = {}
    arms = [arm for arm in ARMS if re.search(args.arms, arm)]
    try:
        for _, *key in product(range(args.rounds), args.lengths, args.steady, arms):
            length, size, arm = key = tuple(key)
            before = rows.get(key)
            if isinstance(before, str):
                continue  # it would fail once more
            named = f"{arm}, {length:,}" + ("" if size is None else f", steady {size:g}")
            try:
                if size is not None:
                    steady(model, size)
                follows = plan(model, arm, args.share, args.hot, args.rings)
                row = run(model, arm, follows, length, args.tokens)
            except Exception as error:
                rows.setdefault(key, failure(error))
                print(f"  {named}: {failure(error)}", file=sys.stderr, flush=True)
                continue
            print(f"  {named}: {row.ms:.2f} ms", file=sys.stderr, flush=True)
            if before is None or row.ms < before.ms:
                rows[key] = row
    finally:
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
