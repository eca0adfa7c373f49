"""What ranks that share a prompt's tokens do, and one process that reads them all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM
from transformers.cache_utils import Cache

import hfsparse
from hfsparse import ContextParallel, Plan
from hfsparse.kernels import TABLES, Kernel
from hfsparse.lists import PAGE, PageLists
from hfsparse.models.names import text_decoder
from hfsparse.patcher.adopt import adopt
from hfsparse.runtime.call import use_tables
from hfsparse.runtime.parts import Parts, share_exactly
from tests.patcher.families import (
    QUEST,
    SIZES,
    WINDOW,
    corrected,
    evicting,
    fresh,
    full,
    growing,
    heads,
    hosted,
    left_padded,
    mixed,
    packing,
    plan_of,
    rotated,
    streaming,
    tokens,
)
from tests.patcher.runs import forward, generate
from tests.patcher.shared_work import telling

NEW, TURN = 5, 9
UNIT = PAGE  # what parts are made of, in short prompts on a CPU
PART = 2 * UNIT


def model_of(case: str):
    family = CASES[case][0]
    return gpt_oss() if family == "gpt-oss" else fresh(family)


def gpt_oss():
    """Sink logits, in layers with a window and without."""
    torch.manual_seed(0)
    more = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW)
    more |= dict(num_local_experts=2, num_experts_per_tok=1)
    return GptOssForCausalLM(GptOssConfig(**{**SIZES, **more})).eval()


def again(model) -> Plan:
    """Pages that layer 1 reads as layer 0 chose them, and chosen units beside full heads."""
    Hq, Hkv = heads(model)
    words = ["quest"] * Hkv, ["again"] * Hkv, ["units"] + ["full"] * (Hkv - 1)

    def layer(index, windowed):
        return ["full"] * Hq, ["full"] * Hkv, words[index]

    units = "quest", {**QUEST[1], "unit": 16}
    return plan_of(model, layer, quest=QUEST, again=("reuse", {}), units=units)


def in_bits(model) -> Plan:
    """Full heads and rings in 8 bits: each rank holds its own newest two pages as they came."""
    return packing(model, bits=8, kinds=("full", "ring"))


def late(model) -> Plan:
    """Thresholds that the whole prompt is on the other side of than a rank's part."""
    return mixed(model, below=(200, 120, 200))


BITS = "fewer bits"  # where a rank has other pages in them than one process
# By name: family, plan, rows, and whether its heads choose by content, so that what a prompt reads
# depends on its chunks.


class Ranks(NamedTuple):
    """What tells parts of a prompt, without a group."""

    ranks: int
    question: int = 0
    anchor: int | None = None


class Star(NamedTuple):
    length: int
    question: int


CASES = {
    "full": ("llama", full, 2, False),
    "one q head a kv head": ("qwen3", streaming, 1, False),
    "growing rings": ("llama", growing, 1, False),
    "windows": ("mistral-window", streaming, 1, False),
    "windows beside full layers": ("gemma3", mixed, 1, True),
    "sink logits": ("gpt-oss", streaming, 1, False),
    "mixed": ("mistral", mixed, 1, True),
    "thresholds": ("qwen2", late, 2, True),
    "choices read again": ("llama", again, 1, False),
    BITS: ("llama", in_bits, 1, True),
}
# In the way of Star Attention: a plan, and how long the anchor is.
STARS = {"full": (full, None), "short anchor": (full, 40), "no anchor": (full, 0)}
STARS["rings"] = streaming, None
STAR = Star(length=600, question=20)
FEW = ("full", "mixed", "growing rings")  # that more ranks are asked


def length_of(case: str, ranks: int) -> int:
    """Tokens of a prompt, no multiple of anything; where chunks matter its parts are one long."""
    return 2 * ranks * PART - (5 if CASES[case][3] else 83)


def answer(case: str, model, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and their logits, and the logits of a turn of a few tokens behind them."""
    ids = tokens(CASES[case][2], length_of(case, ranks))
    if CASES[case][3] and not distributed.is_initialized():
        found = generate_behind_parts(model, ids)
    else:
        out = generate(model, ids, new=NEW)
        found = out.sequences, torch.stack(out.logits, 1), out.past_key_values
    turn = torch.cat([found[0][:, -1:], tokens(len(ids), TURN - 1, seed=1)], 1)
    return *found[:2], forward(model, turn, cache=found[2]).logits


def generate_behind_parts(model, ids: Tensor) -> tuple[Tensor, Tensor, Cache]:
    """Greedy tokens behind a prompt whose parts are read as chunks; their logits, and the cache."""
    cache, logits, found = DynamicCache(), [], ids
    adopt(cache, text_decoder(model), expected=ids.shape[1])
    for part in ids.split(PART, 1):
        last = forward(model, part, cache=cache).logits[:, -1]
    for at in range(NEW):
        logits.append(last.float())
        found = torch.cat([found, last.argmax(-1, keepdim=True)], 1)
        if at < NEW - 1:
            last = forward(model, found[:, -1:], cache=cache).logits[:, -1]
    return found, torch.stack(logits, 1), cache


def by_parts(parts: Parts) -> Kernel:
    """Of one process: the choice of pages that ranks make, each of its own."""
    pages = [[p for a, b in own for p in range(a // PAGE, -(-b // PAGE))] for own in parts.kept]
    held = [sum(b - a for a, b in own) for own in parts.kept]

    def choose(selector, q, index, length, scale, at, below, choice, read) -> PageLists:
        B, total = len(length), int(length.max())
        named = []
        for rank, (own, n) in enumerate(zip(pages, held, strict=True)):
            if rank == len(pages) - 1:  # which has what is new
                own = [*own, *range(own[-1] + 1, -(-total // PAGE))]
                n += total - parts.tokens
            own, mine = torch.tensor(own), torch.full((B,), n)
            each = PAGE // selector.budget.unit
            units = (own[:, None] * each + torch.arange(each)).flatten()
            some = {name: t[:, :, own] for name, t in index.items()}
            found = TABLES.select[-1].run(selector, q, some, mine, scale, at, below, None, read)
            used = torch.arange(found.pages.shape[2]) < found.count[..., None]
            named.append(units[found.pages].masked_fill(~used, 1 << 30))
        named = torch.cat(named, -1).sort(-1).values
        real = named < 1 << 30
        return PageLists(named.masked_fill(~real, 0), real.sum(-1), selector.budget.unit)

    return Kernel("by parts", choose, lambda need: None)


def answer_alone(case: str, ranks: int) -> tuple[Any, ...]:
    """What one process answers that chooses its pages as ranks do; and its figures."""
    model, plan, length = model_of(case), CASES[case][1], length_of(case, ranks)

    parts = share_exactly(length, UNIT, Ranks(ranks))
    tables = TABLES._replace(select=(by_parts(parts),))
    with hfsparse.patch(model, plan(model)) as handle, use_tables(tables):
        return *answer(case, model, ranks), handle.stats()


def ask(cases) -> dict[str, Any]:
    """Each case, and what this rank and all of them tell of it."""
    group, found = distributed.group.WORLD, {}
    for case in cases:
        model = model_of(case)
        with hfsparse.patch(model, CASES[case][1](model), context_parallel=group) as handle:
            told = answer(case, model, distributed.get_world_size())
            found[case] = *told, handle.stats(), handle.stats(gather=True), handle.explain()
    return found


def answer_in_beams(model) -> Tensor:
    return generate(model, tokens(2, 311), new=NEW, num_beams=3, num_return_sequences=2).sequences


def ask_beams() -> Tensor:
    model = fresh("llama")
    with hfsparse.patch(model, streaming(model), context_parallel=distributed.group.WORLD):
        return answer_in_beams(model)


def ask_star(cases=("full", "rings")) -> dict[str, Any]:
    return {case: answer_star(*STARS[case]) for case in cases}


def answer_star(plan, anchor) -> tuple[Tensor, Tensor]:
    context = ContextParallel(distributed.group.WORLD, "star", STAR.question, anchor)
    model = fresh("llama")
    with hfsparse.patch(model, plan(model), context_parallel=context):
        found = generate(model, tokens(1, STAR.length), new=NEW)
    return found.sequences, torch.stack(found.logits, 1)


def ask_refused(folder: Path) -> dict[str, Any]:
    """What can't be shared, in the words of this rank, and a cache that is saved."""
    said, model, rank = {}, fresh("llama"), distributed.get_rank()
    group, ids, long = distributed.group.WORLD, tokens(1, 100), tokens(1, 300)
    patch = partial(hfsparse.patch, context_parallel=group)
    with telling(said, "no group"):
        hfsparse.patch(model, context_parallel="all")
    with telling(said, "way"):
        ContextParallel(group, "ring")
    with telling(said, "question"):
        ContextParallel(group, "star", question=0)
    with telling(said, "anchor"):
        ContextParallel(group, "star", anchor=-1)
    with telling(said, "anchor of another type"):
        ContextParallel(group, "star", anchor="1")
    with telling(said, "anchor of exact"):
        ContextParallel(group, anchor=128)
    with telling(said, "two plans"):
        patch(model, (full, streaming)[rank](model))
    with telling(said, "two ways"):
        hfsparse.patch(model, context_parallel=ContextParallel(group, ("exact", "star")[rank]))
    for option in ("exact", "fuse"):
        with telling(said, option):
            patch(model, mixed(model), **{option: True})
    with telling(said, "evicting"):
        patch(model, evicting(model))
    with telling(said, "means"):
        patch(model, corrected(model))
    with telling(said, "hosted"):
        patch(model, hosted(model))
    with telling(said, "rope"):
        patch(rotated("dynamic"))
    with patch(model, mixed(model)) as handle:
        with telling(said, "short"):
            generate(model, ids)
        with telling(said, "padded"):
            generate(model, *left_padded(300))
        with telling(said, "chunks"):
            generate(model, long, prefill_chunk_size=64)
        with telling(said, "drafts"):
            generate(model, long, prompt_lookup_num_tokens=3)
        with telling(said, "other prompts"):
            generate(model, tokens(1, 300, seed=rank))
        with telling(said, "no cache"):
            forward(model, long, use_cache=False)
        with telling(said, "hidden states"):
            forward(model, long, output_hidden_states=True)
        cache = forward(model, long).past_key_values
        with telling(said, "crop"):
            cache.crop(-1)
        with telling(said, "keys"):
            str(cache.layers[0].keys)
        handle.save(cache, folder / f"cache-{rank}", long)
        again = handle.load(folder / f"cache-{rank}", long)
        ways = [forward(model, tokens(1, 1), cache=each).logits for each in (cache, again)]
    return {"refused": said, "saved": ways}


def ask_two(folder: Path) -> dict[str, Any]:
    found = {"star": ask_star(STARS), "beams": ask_beams()}
    return {**found, **ask(CASES), **ask_refused(folder)}


def ask_four(folder: Path) -> dict[str, Any]:
    """And whether a cache is taken that two ranks had."""
    said, model = {}, fresh("llama")
    with (
        hfsparse.patch(model, mixed(model), context_parallel=distributed.group.WORLD) as handle,
        telling(said, "two ranks"),
    ):
        handle.load(folder / "cache-0")
    return {"star": ask_star(), **ask(FEW), "refused": said}


def ask_one(folder: Path) -> dict[str, Any]:
    """A group of one rank: a star of one part reads all."""
    return {"star": ask_star()}
