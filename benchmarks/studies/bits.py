"""What a cache in fewer bits costs: `.venv/bin/python -m benchmarks.studies.bits MODEL`.

Calibration prompts are read once, densely; then their last tokens are read over what a cache would
hold of the others: of prose the last 128, of questions the last 64 or more, whose answer counts.
Beside the way of the stores (keys by page and channel, values by token) stands keys by token. Both
are asked of the model and of the same function with channels that stand out: some pairs of rope's
have their keys times up to 30, and their queries divided by as much. `check` reads two prompts by
the stores themselves, under a plan.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from statistics import mean

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hfsparse
from benchmarks.common.coded import TAILS, outliers, prompt_of, stepped
from hfsparse import Plan
from hfsparse.lists import PAGE
from hfsparse.lists.packed import BITS, Bits, said
from hfsparse.plan import Layer, ModelId
from hfsparse.plan.kept import Full
from hfsparse.profiler.prompts.calibration import Prompt

WAYS = {  # bits of keys and values, the dimension that keys' ends are over
    "int8": (8, -2),
    "int4": (4, -2),
    "fp8": ("fp8", -2),
    "int8, keys by token": (8, -1),
    "int4, keys by token": (4, -1),
    "fp8, keys by token": ("fp8", -1),
}


def packed(cache: DynamicCache, bits: Bits, over: int, times: list[Tensor]) -> DynamicCache:
    """The cache with its full pages in so many bits; keys of a layer times `[Hkv, 1, 1, D]`."""
    cache = deepcopy(cache)
    for layer, by in zip(cache.layers, times, strict=True):
        whole = layer.keys.shape[2] // PAGE * PAGE
        pages = (t[:, :, :whole].unflatten(2, (-1, PAGE)) for t in (layer.keys, layer.values))
        k, v = next(pages) * by, next(pages)
        layer.keys[:, :, :whole] = (stepped(k, bits, over) / by).flatten(2, 3)
        layer.values[:, :, :whole] = stepped(v, bits, -1).flatten(2, 3)
    return cache


@torch.no_grad()
def read(model, ids: Tensor, cache, span: tuple[int, int]) -> tuple[float, bool]:
    """Nats a token of a span of the prompt, and whether all are first choices; its end is read."""
    seen = cache.get_seq_length()
    logits = model(ids[:, seen:], past_key_values=cache).logits[0].float()
    first, end = span
    logits = logits[first - seen - 1 : end - seen - 1].log_softmax(-1)
    said = ids[0, first:end]
    nats = -logits.gather(1, said[:, None]).mean().item()
    return nats, bool((logits.argmax(-1) == said).all())


def plan_of(model, bits: Bits) -> Plan:
    """Every head full, in so many bits."""
    this = ModelId.of(model)
    words = ("full",) * this.q_heads, ("it",) * this.kv_heads, ("full",) * this.kv_heads
    return Plan(this, {"it": Full(bits)}, (Layer(*words),) * this.layers)


@torch.no_grad()
def ask(model, prompt: Prompt, tail: int, times: list[Tensor], check: bool) -> dict:
    """Nats and right answers, by way and model."""
    ids, length = prompt.ids, prompt.ids.shape[1]
    span = prompt.answer_span or (length - tail + 1, length)
    tail = max(tail, length - span[0] + 16)
    cache = model(ids[:, :-tail], logits_to_keep=1).past_key_values
    found = {("model's type", "model"): read(model, ids, deepcopy(cache), span)}
    for name, given in WAYS.items():
        for of, by in (("model", [torch.ones(1)] * len(times)), ("outliers", times)):
            found[name, of] = read(model, ids, packed(cache, *given, by), span)
    for bits in BITS[1:] if check else ():
        with hfsparse.patch(model, plan_of(model, bits)):
            ours = model(ids[:, :-tail], logits_to_keep=1).past_key_values
            found[f"{said(bits)}, by the stores", "model"] = read(model, ids, ours, span)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", choices=TAILS, default=[*TAILS])
    parser.add_argument("--samples", type=int, default=8, help="prompts of each kind")
    parser.add_argument("--check", type=int, default=1, help="of these, read by the stores, too")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    this = ModelId.of(model)
    times = outliers((this.layers, this.kv_heads, this.head_dim))
    for kind in options.kinds:
        tail = TAILS[kind]
        rows: dict[tuple, list] = {}
        for i in range(options.samples):
            prompt = prompt_of(tokenizer, kind, options.length, i)
            for way, got in ask(model, prompt, tail, times, i < options.check).items():
                rows.setdefault(way, []).append(got)
            told = [f"{way} {got[i][0]:.4f}" for (way, of), got in rows.items() if len(got) > i]
            print(f"{kind} {i}:", ", ".join(told), flush=True)
        for (way, of), got in rows.items():
            dense = rows["model's type", "model"][: len(got)]
            lost = [a[0] - b[0] for a, b in zip(got, dense, strict=True)]
            right = sum(each[1] for each in got)
            print(
                f"{kind}, {way}, {of}: {mean(lost):+.4f} nats (most {max(lost):+.4f}), "
                f"right {right} of {len(got)} (dense {sum(each[1] for each in dense)})",
                flush=True,
            )


if __name__ == "__main__":
    main()
