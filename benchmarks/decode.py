"""Claim: a token costs what its weights and the keys that the plan reads cost, on one GPU.

    python -m benchmarks.decode [--lengths 8192,32768,131072] [--batch 1] [--tokens 96]
                                [--static 32768] [--shape llama-3.1-8b] [--steps] [--layer] [--bits]
                                [--plans "no plan; quest 6 %, fused"]

`model.generate`, greedy, random weights in the shape of Llama-3.1-8B (bf16), over caches that are
filled with random keys of the given length; every arm in one run. ms are medians over the tokens
but the first eight, the least of the rounds: a host that others use is slow at times. kvpress,
where it can be imported, shortens the random keys to a quarter (KnormPress), behind all other arms:
it wraps every attention function. What it leaves is a stock cache, so the stock model over a
quarter of the keys stands for it elsewhere. No engine is an arm, since none can be carried to the
machine with the GPU: vLLM's column is what was published of one H100 (`VLLM`), on another host and
another day. The least ms are what the memory allows: bytes of weights and of keys that are read, at
the speed of a large copy, measured in the run. An arm that fails, and SIGTERM, leave the table of
what was measured. Arms that say so wait for `generate` after each step, all others run a step
ahead. --bits compares caches in fewer bits with the whole one, and no other plans; --plans names
the arms of ours that run. --layer times one layer's kernels inside a CUDA graph; --steps shows
where a step's time goes; --shape tiny tries the table out on a CPU.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import Clock, bench_ms, continued
from benchmarks.common.journal import failure
from benchmarks.common.shapes import cache_bytes, endless, filled_cache, plan_of, random_keys
from hfsparse import kernels
from hfsparse.kernels.positions import NewTokens
from hfsparse.lists import PAGE, Band, at_heads
from hfsparse.lists.choice import Choice
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.packed import BITS, said
from hfsparse.lists.places import Place, Places, Table
from hfsparse.patcher.state import state_of
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.packed import PackedFull
from hfsparse.selectors import SELECTORS

STOCK = "stock, dynamic cache"
PLANS = ("no plan", "quest 25 %", "quest 6 %", "half ring", "quest 6 % + half ring")
FUSED = ("no plan, fused", "quest 6 %, fused", "quest 6 % + half ring, fused")
WAITING = ("no plan, waiting", "quest 6 %, waiting", "quest 6 %, waiting, fused")
PACKED = ("no plan", *(f"every page, {said(bits)}" for bits in BITS[1:]))

# ms a token: of none, and of each one before it. The fit of served inter-token latencies of 256 to
# 125K tokens: vLLM 0.19.1, FA3, BF16, Llama-3.1-8B, one H100, one request at a time (vLLM's blog on
# FP8 caches, 2026-04-22).
VLLM = 6.44, 4.37e-5


@lru_cache
def kvpress():
    """The press that keeps a quarter of the keys."""
    from kvpress import KnormPress

    return KnormPress(compression_ratio=0.75)


def filled(model, kind: str, batch: int, length: int, room: int):
    """A cache that has seen `length` random tokens: of the stock model, kvpress or the patch."""
    layers = model.config.num_hidden_layers
    if kind == "dynamic":
        cache = DynamicCache(config=model.config)
        for i in range(layers):
            cache.update(random_keys(model, batch, length), random_keys(model, batch, length), i)
        return cache
    if kind == "kvpress":
        press, cache = kvpress(), DynamicCache(config=model.config)
        for i, layer in enumerate(model.model.layers):
            k, v = random_keys(model, batch, length), random_keys(model, batch, length)
            cache.update(*press.compress(layer.self_attn, None, k, v, None, {}), i)
        return cache
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=length + room)
        at = {"cache_position": torch.arange(length, device=model.device)}
        for i in range(layers):
            cache.update(
                random_keys(model, batch, length), random_keys(model, batch, length), i, at
            )
        return cache
    return filled_cache(model, batch, length, room)


def generated(model, cache, batch: int, length: int, tokens: int) -> tuple[Clock, list]:
    ids = torch.randint(5, model.config.vocab_size, (batch, length + 1), device=model.device)
    clock, out = continued(model, ids, tokens, past_key_values=cache)
    return clock, out[0, length:].tolist()


def measured(model, kind: str, batch: int, length: int, tokens: int) -> tuple[float, float, float]:
    """ms a token, GiB of keys and values, peak GiB (0 where the device doesn't tell)."""
    gc.collect()
    if cuda := model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cache = filled(model, kind, batch, length, tokens + 2)
    held = cache.get_seq_length() if kind == "kvpress" else length
    clock, _ = generated(model, cache, batch, held, tokens)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return clock.ms(), cache_bytes(cache) / 2**30, peak / 2**30


@dataclass
class Row:
    """One arm at one length: the least of its rounds' medians."""

    ms: float
    kv_gib: float
    peak_gib: float
    read: float  # share of the keys that a step reads
    graph: str


Rows = dict[tuple[int, str], Row | str]  # by tokens and arm; a text says why there is none


def measure(
    rows: Rows,
    model,
    lengths: list[int],
    batch: int,
    tokens: int,
    static: list[int],
    rounds: int,
    plans: Sequence[str],
) -> None:
    """Fill in the rows, arm by arm."""

    def row(arm: str, kind: str, length: int, held: int, read: float = 1.0) -> None:
        before = rows.get((length, arm))
        if isinstance(before, str):
            return  # it would fail once more
        try:
            ms, gib, peak = measured(model, kind, batch, held, tokens)
        except Exception as error:
            why = failure(error)
            rows.setdefault((length, arm), why)  # an earlier round stays
            print(f"  {arm}, {length:,}: {why}", file=sys.stderr, flush=True)
            return
        graph = ""
        if kind == "ours":
            state = state_of(model)
            graph = f"{state.graphs}" + ", ahead" * (f"{state.ahead}" == "yes")
        least = min(ms, before.ms) if before else ms
        rows[length, arm] = Row(least, gib, peak, read, graph)
        print(f"  {arm}, {length:,}: {ms:.2f} ms {graph}", file=sys.stderr, flush=True)

    for _ in range(rounds):
        for length in lengths:
            row(STOCK, "dynamic", length, length)
            row("stock over a quarter of the keys", "dynamic", length, length // 4)
            if length in static:
                row("stock, static cache, compiled", "static", length, length)
        for name in plans:
            plan = plan_of(model, name)
            with hfsparse.patch(model, plan, fuse=name.endswith("fused")):
                state_of(model).ahead.never = "it waits" if "waiting" in name else None
                for length in lengths:
                    share = 0.25 if "25" in name else 0.06 if "6 %" in name else 1.0
                    row(f"ours, {name}", "ours", length, length, share)
    try:
        kvpress()
    except Exception as error:  # it asks for other versions of transformers, too
        print(f"  no arm of kvpress: {error}", file=sys.stderr, flush=True)
        return
    for _ in range(rounds):
        for length in lengths:
            row("kvpress, a quarter of the keys", "kvpress", length, length)


def copy_speed(device: torch.device) -> float:
    """Bytes that a large copy reads and writes in a second."""
    size = 2**30 if device.type == "cuda" else 2**26
    given, made = torch.empty(2, size, dtype=torch.uint8, device=device).fill_(1)
    spent = []
    for _ in range(10):
        start = time.perf_counter()
        made.copy_(given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return 2 * size / min(spent)


def table(model, rows: Rows, batch: int, copied: float, vllm: bool) -> str:
    """Markdown. copied: bytes a second of a copy; vllm: whether its line is of this shape."""
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    head = "arm | tokens | ms a token | x stock | tokens/s | GB/s | KV GiB | x dense | peak GiB"
    head += " | least ms | vLLM, H100"
    lines = [
        f"\nBatch {batch}; a step reads {weights / 2**30:.2f} GiB of weights. A copy reads and "
        f"writes {copied / 1e9:.0f} GB/s; least ms: weights and keys at that speed. vLLM: as "
        f"published ({VLLM[0]} ms + {VLLM[1]:.2e} a token, BF16), not measured here.\n"
    ]
    lines += [f"| {head} | graph |\n| --- |" + " ---: |" * 10 + " --- |"]
    for (length, arm), it in sorted(rows.items(), key=lambda item: item[0][0]):
        if isinstance(it, str):
            lines.append(f"| {arm} | {length:,} | {it} |" + " |" * 9)
            continue
        stock = rows.get((length, STOCK))
        known = isinstance(stock, Row)
        gain = f"{stock.ms / it.ms:.2f}" if known else ""
        size = f"{it.kv_gib / stock.kv_gib:.3f}" if known else ""
        read = weights + it.read * it.kv_gib * 2**30
        theirs = f"{VLLM[0] + VLLM[1] * length:.2f}" if vllm else ""
        lines.append(
            f"| {arm} | {length:,} | {it.ms:.2f} | {gain} | {1e3 * batch / it.ms:.0f} "
            f"| {read / it.ms / 1e6:.0f} "
            f"| {it.kv_gib:.2f} | {size} | {it.peak_gib:.1f} "
            f"| {1e3 * read / copied:.2f} | {theirs} | {it.graph} |"
        )
    return "\n".join(lines)


def steps(model, length: int, tokens: int) -> None:
    """Where a replayed step's time goes: the graph alone, the decoder's call, `generate`."""
    for name in ("no plan", "quest 6 %", "quest 6 % + half ring", *FUSED[:2]):
        with hfsparse.patch(model, plan_of(model, name), fuse=name in FUSED):
            cache = filled(model, "ours", 1, length, 400)
            clock, _ = generated(model, cache, 1, length, 24)
            graphs = state_of(model).graphs
            recorded = next(iter(graphs.kept.values()), {}).get(1)
            graph = recorded.graph if recorded else None
            if graph is None:
                print(f"- {name}: no graph: {graphs}", flush=True)
                continue
            alone = bench_ms(graph.launch)
            last = torch.zeros(1, 1, model.config.hidden_size, device=model.device).to(model.dtype)
            with torch.no_grad():
                head = bench_ms(partial(model.lm_head, last))
            seen = cache.get_seq_length()
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)

            def call(cache=cache, ids=ids):
                at = torch.full((1, 1), cache.get_seq_length(), device=model.device)
                with torch.no_grad():
                    model.model(ids, past_key_values=cache, position_ids=at, use_cache=True)

            for _ in range(4):
                call()
            whole, issued = [], []
            for _ in range(20):
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                issued.append(time.perf_counter() - start)
                torch.cuda.synchronize()
                whole.append(time.perf_counter() - start)
            print(
                f"- {name}, {seen:,} tokens: graph {alone:.2f} ms, head {head:.2f} ms, "
                f"decoder {1e3 * statistics.median(whole):.2f} ms "
                f"(host {1e3 * statistics.median(issued):.2f}), generate {clock.ms():.2f} ms, "
                f"in which the device works {(alone + head) / clock.ms():.0%}",
                flush=True,
            )
            if name in ("quest 6 %", "quest 6 %, fused"):
                profiled(call)


def profiled(call: Callable) -> None:
    """The kernels of one replayed step, by name, and the host's Python."""
    import cProfile
    import pstats

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    print(
        found.key_averages().table(
            sort_by="cuda_time_total", row_limit=25, max_name_column_width=60
        )
    )
    looked = cProfile.Profile()
    looked.enable()
    for _ in range(20):
        call()
    looked.disable()
    pstats.Stats(looked).sort_stats("tottime").print_stats(18)


def layer(length: int, batch: int) -> None:
    """One layer's attention, 20 calls in a graph; more caches than one, as a model has.

    In half ring every second kv head is a ring of 64 + 256 tokens, the others choose 6 % of the
    pages; its line and the one before it are all that attention does in a step.
    """
    H, HKV, D, scale = 32, 8, 128, 128**-0.5
    copies = 3 if batch * length <= 300_000 else 1
    shape = batch, HKV, -(-(length + 64) // PAGE) * PAGE, D
    random = {"device": "cuda", "dtype": torch.bfloat16}
    made = [(torch.randn(shape, **random), torch.randn(shape, **random)) for _ in range(copies)]
    pages = [k.unflatten(2, (-1, PAGE)) for k, _ in made]
    sums = [(page.amin(3), page.amax(3)) for page in pages]
    every, odd, even = tuple(range(HKV)), tuple(range(1, HKV, 2)), tuple(range(0, HKV, 2))
    plain = [Table().places([Place(every, *kv)]) for kv in made]
    paged, half = [], []
    for kv, (low, high) in zip(made, sums, strict=True):
        paged.append(Table().places([Place(every, *kv, listed=True, low=low, high=high)]))
        k, v, low, high = (t[:, 1::2].contiguous() for t in (*kv, low, high))
        ring = [torch.randn(batch, len(even), 64 + 320, D, **random) for _ in "kv"]
        rings = Place(even, *ring, Band(64, 256), 320)
        half.append(Table().places([rings, Place(odd, k, v, listed=True, low=low, high=high)]))
    q, new = (torch.randn(batch, n, 1, D, **random) for n in (H, HKV))
    held = torch.full((batch,), length, device="cuda")
    new_tokens = NewTokens(Lengths.of(None, length - 1, 1, batch), held, held[:, None] - 1)

    def need(packed: bool = False) -> kernels.Need:
        return kernels.Need.of(q, *made[0], block=PAGE, lists=True, packed=packed)

    append = kernels.pick(kernels.APPEND, need()).run
    spent = {}

    def timed(name: str, call: Callable) -> None:
        for i in range(copies):
            call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(20):
                call(i % copies)
        spent[name] = bench_ms(graph.replay, 10) / 20 * 1e3

    def read(places, lists=None):
        listed = [lists if part.listed else None for part in places.parts]
        decode = kernels.pick(kernels.DECODE, need(places.packed)).run
        return decode(q, places, new_tokens, listed, scale=scale)

    timed("append", lambda i: append(new, new, plain[i], new_tokens))
    timed("append, summaries", lambda i: append(new, new, paged[i], new_tokens))
    timed("every page", lambda i: read(plain[i]))
    for bits in BITS[1:]:
        packed = [packed_in(bits, *kv, length) for kv in made]
        timed(f"append, {said(bits)}", lambda i, into=packed: append(new, new, into[i], new_tokens))
        timed(f"every page, {said(bits)}", lambda i, held=packed: read(held[i]))
    for share in (0.25, 0.06):
        quest = SELECTORS["quest"](share=share, min_pages=16)
        choose = [partial(select, quest, q, *low, held, scale) for low in sums]
        lists = [call() for call in choose]
        timed(f"choice of {share}", lambda i, choose=choose: choose[i]())
        again = [last_choice(replace(quest, refresh=64), q, *low, held, scale) for low in sums]
        timed(f"choice of {share}, read again (refresh)", lambda i, again=again: again[i]())
        timed(f"reading {share}", lambda i, lists=lists: read(paged[i], lists[i]))

    def whole(places, heads: slice | Tensor) -> None:
        append(new, new, places, new_tokens)
        low, high = next((x.low, x.high) for x in places.parts if x.low is not None)
        read(places, select(quest, q, low, high, held, scale, heads))

    def q_heads(kv_heads: tuple[int, ...]) -> slice | Tensor:
        return at_heads([h * (H // HKV) + n for h in kv_heads for n in range(H // HKV)], q.device)

    all_heads, some = q_heads(every), q_heads(odd)
    timed("quest 6 %: append + choice + reading", lambda i: whole(paged[i], all_heads))
    timed("half ring, quest 6 %: append + choice + reading", lambda i: whole(half[i], some))
    for name, us in spent.items():
        reading = spent.get(name.split(",")[0].replace("choice of", "reading"), 0)
        share = f"{us / (us + reading):.2f}" if reading and name.startswith("choice") else ""
        print(f"| {batch} | {length:,} | {name} | {us:.1f} | {share} |", flush=True)


def packed_in(bits, k: Tensor, v: Tensor, length: int) -> Places:
    """The first tokens of keys and values `[B, H, N, D]`, in so many bits."""
    store = PackedFull(Group(tuple(range(k.shape[1])), bits=bits), k.shape[2])
    store.create(k, v)
    store.append(k, v, Lengths.of(None, 0, length, len(k)))
    return Table().places([store.place()])


def select(quest, q: Tensor, low: Tensor, high: Tensor, *args, **more):
    """Pages chosen by the kernel that serves this."""
    asked = {"tokens": low.shape[2] * PAGE, "chooser": quest}
    kernel = kernels.pick(kernels.SELECT, kernels.Need.of(q, low, low, **asked))
    return kernel.run(quest, q, {"low": low, "high": high}, *args, **more)


def last_choice(quest, q: Tensor, low: Tensor, high: Tensor, held: Tensor, scale) -> Callable:
    """A choice of pages by a selector with `refresh`, which was made and is young."""
    width = quest.budget.width(low.shape[2], q.shape[2])
    choice = Choice.none(*low.shape[:2], width, q.device)
    call = partial(select, quest, q, low, high, held, scale, choice=choice)
    call()
    return call


def main() -> None:
    parser = options.parser(__doc__, "8192,32768,131072", 96, "llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=1)
    static = "lengths at which the static cache runs, too"
    parser.add_argument("--static", default="", type=options.numbers, help=static)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--layer", action="store_true")
    parser.add_argument("--bits", action="store_true")
    named = "arms of ours, with semicolons between"
    parser.add_argument("--plans", default="; ".join((*PLANS, *FUSED, *WAITING)), help=named)
    parser.add_argument("--no-table", action="store_true")
    args = options.parse(parser)
    if args.steps or args.layer:
        options.need_cuda()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{where}; {versions}", flush=True)
    if args.layer:
        print("\n| batch | tokens | what | us a layer | share of choice and reading |")
        print("| ---: | ---: | --- | ---: | ---: |", flush=True)
        for length in args.lengths:
            layer(length, args.batch)
    if args.no_table and not args.steps:
        return
    model = endless(args.shape)
    if args.steps:
        steps(model, args.lengths[-1], args.tokens)
    if not args.no_table:
        rows: Rows = {}
        copied = copy_speed(model.device)
        asked = args.lengths, args.batch, args.tokens, args.static, args.rounds
        plans = [name.strip() for name in args.plans.split(";")]
        if args.bits:
            plans = (*PACKED, *(f"{name}, fused" for name in PACKED))
        try:
            measure(rows, model, *asked, plans)
        finally:
            vllm = args.batch == 1 and args.shape == "llama-3.1-8b"
            print(table(model, rows, args.batch, copied, vllm), flush=True)


if __name__ == "__main__":
    main()
