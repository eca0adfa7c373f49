"""Claim: a hybrid's decode step is replayed whole, its linear layers' states included: 2x stock.

    python -m benchmarks.hybrid [--lengths 32768] [--batch 1] [--tokens 64] [--rounds 2]
                                [--shape qwen3.5-9b]

`model.generate`, greedy, random weights in the shape of Qwen3.5-9B (bf16): 24 gated delta layers
and 8 that attend, whose caches are filled with random keys of the given length behind a short true
prompt, the same for each arm. ms are medians over the tokens but the first eight, the least of the
rounds. "as stock" counts the first tokens that are the stock model's; rounding may part them. An
arm that fails, and SIGTERM, leave the table of what was measured. --shape tiny tries it on a CPU.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import takewhile

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import continued
from benchmarks.common.journal import failure
from benchmarks.common.shapes import describe, plan_of, random_model
from hfsparse.lists.lengths import Lengths
from hfsparse.models.layers import layer_shapes
from hfsparse.models.names import cache_name, text_decoder
from hfsparse.patcher.adopt import adopt
from hfsparse.patcher.state import is_patched, state_of
from hfsparse.plan import Plan
from hfsparse.runtime.cache.layer import CacheLayer

STOCK = "stock"
PLANS = ("no plan", "quest 6 %", "quest 6 % + half ring", "no plan, fused", "quest 6 %, fused")
PROMPT = 64  # tokens that are read, so that linear layers have states
SHAPES = {  # beyond the defaults of Qwen3_5TextConfig, which are the 9B's
    "qwen3.5-9b": {},
    "tiny": dict(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
}  # fmt: skip


def build(shape: str) -> PreTrainedModel:
    config = transformers.Qwen3_5TextConfig(**SHAPES[shape], max_position_embeddings=1 << 20)
    return random_model(transformers.Qwen3_5ForCausalLM, config)


def hybrid_plan(model: PreTrainedModel, name: str) -> Plan | None:
    """A plan by the words of its name, for the layers that attend."""
    plan = plan_of(model, name)
    if plan is None:
        return None
    whole = Plan.full(plan.model).layers
    three = zip(layer_shapes(model), plan.layers, whole, strict=True)
    return replace(plan, layers=tuple(own if it.free else full for it, own, full in three))


@torch.no_grad()
def filled(model: PreTrainedModel, batch: int, length: int, room: int) -> DynamicCache:
    """A cache that has read PROMPT tokens, with random keys behind them up to `length`."""
    cache, config = DynamicCache(config=model.config), model.config
    if is_patched(model):
        adopt(cache, text_decoder(model), reserve=length + room)
    ids = torch.arange(batch * PROMPT, device=model.device).view(batch, -1) * 7919
    named = {cache_name(model): cache, "logits_to_keep": 1}
    model(ids % config.vocab_size, use_cache=True, **named)
    made = torch.Generator(model.device).manual_seed(length)
    more = dict(device=model.device, dtype=model.dtype, generator=made)
    shape = batch, config.num_key_value_heads, length - PROMPT, config.head_dim
    lengths = Lengths.of(None, PROMPT, length - PROMPT, batch)
    for it, layer in zip(layer_shapes(model), cache.layers, strict=True):
        if not it.attends:
            continue
        k, v = (torch.randn(shape, **more) for _ in "kv")
        if not isinstance(layer, CacheLayer):
            layer.update(k, v)
            continue
        for store in layer.stores:
            at = list(store.group.heads)
            store.append(k[:, at], v[:, at], lengths)
        layer.rows, layer.seen, layer.stored = lengths.rows, length, length
    return cache


def held_bytes(cache: DynamicCache) -> tuple[int, int]:
    """Of keys and values (page summaries included), and of linear layers' states."""
    keys = states = 0
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            tables = (*layer.conv_states.values(), *layer.recurrent_states.values())
            states += sum(t.nbytes for t in tables if t is not None)
        elif isinstance(layer, CacheLayer):
            keys += layer.bytes()
        else:
            keys += layer.keys.nbytes + layer.values.nbytes
    return keys, states


@dataclass
class Row:
    """One arm at one length: the least of its rounds' medians."""

    ms: float
    kv_gib: float
    state_gib: float
    peak_gib: float
    said: list[int]
    graph: str


Rows = dict[tuple[int, str], Row | str]  # by tokens and arm; a text says why there is none


def measured(model: PreTrainedModel, batch: int, length: int, tokens: int, ours: bool) -> Row:
    gc.collect()
    if cuda := model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cache = filled(model, batch, length, tokens + 2)
    ids = torch.full((batch, length + 1), 7, device=model.device)
    clock, out = continued(model, ids, tokens, **{cache_name(model): cache})
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    keys, states = (n / 2**30 for n in held_bytes(cache))
    graph = str(state_of(model).graphs) if ours else ""
    return Row(clock.ms(), keys, states, peak / 2**30, out[0, length + 1 :].tolist(), graph)


def measure(rows: Rows, model, lengths: list[int], batch: int, tokens: int, rounds: int) -> None:
    """Fill in the rows, arm by arm."""

    def row(arm: str, length: int, ours: bool) -> None:
        before = rows.get((length, arm))
        if isinstance(before, str):
            return  # it would fail once more
        try:
            found = measured(model, batch, length, tokens, ours)
        except Exception as error:
            rows.setdefault((length, arm), failure(error))  # an earlier round stays
            print(f"  {arm}, {length:,}: {rows[length, arm]}", file=sys.stderr, flush=True)
            return
        rows[length, arm] = min(found, before or found, key=lambda it: it.ms)
        told = f"{found.ms:.2f} ms {found.graph}"
        print(f"  {arm}, {length:,}: {told}", file=sys.stderr, flush=True)

    for _ in range(rounds):
        for length in lengths:
            row(STOCK, length, ours=False)
        for name in PLANS:
            try:
                with hfsparse.patch(model, hybrid_plan(model, name), fuse="fused" in name):
                    for length in lengths:
                        row(f"ours, {name}", length, ours=True)
            except Exception as error:
                for length in lengths:
                    rows.setdefault((length, f"ours, {name}"), failure(error))


def table(rows: Rows) -> str:
    """Markdown."""
    head = "arm | tokens | ms a token | x stock | KV GiB | states GiB | peak GiB | as stock | graph"
    lines = [f"| {head} |", "| --- |" + " ---: |" * 7 + " --- |"]
    for (length, arm), it in sorted(rows.items(), key=lambda item: item[0][0]):
        if isinstance(it, str):
            lines.append(f"| {arm} | {length:,} | {it} |" + " |" * 6)
            continue
        stock = rows.get((length, STOCK))
        gain = alike = ""
        if isinstance(stock, Row):
            gain = f"{stock.ms / it.ms:.2f}"
            same = takewhile(lambda pair: pair[0] == pair[1], zip(stock.said, it.said, strict=True))
            alike = f"{len([*same])} of {len(it.said)}"
        lines.append(
            f"| {arm} | {length:,} | {it.ms:.2f} | {gain} | {it.kv_gib:.2f} | {it.state_gib:.2f} "
            f"| {it.peak_gib:.1f} | {alike} | {it.graph} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = options.parser(__doc__, "32768", 64, "qwen3.5-9b", SHAPES)
    parser.add_argument("--batch", type=int, default=1)
    args = options.parse(parser)
    if not hasattr(transformers, "Qwen3_5ForCausalLM"):
        sys.exit(f"transformers {transformers.__version__} has no Qwen3.5: 5.17 has it")
    if min(args.lengths) <= PROMPT:
        sys.exit(f"--lengths {min(args.lengths)}: give more than {PROMPT} tokens")
    model = build(args.shape)
    kernels = [name for name in ("fla", "causal_conv1d", "mamba_ssm") if find_spec(name)]
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    print(describe(model, args.shape))
    print(
        f"Kernels for linear layers: {', '.join(kernels) or 'none, PyTorch serves stock and ours'}."
        f" Batch {args.batch}; a step reads {weights / 2**30:.2f} GiB of weights.\n",
        flush=True,
    )
    rows: Rows = {}
    try:
        measure(rows, model, args.lengths, args.batch, args.tokens, args.rounds)
    finally:
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
