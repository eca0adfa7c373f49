"""What ranks that share a model's heads do, and one process that has them all."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hfsparse
from hfsparse import Plan
from hfsparse.plan.files import DataFile
from hfsparse.selectors.lowrank import LowRank
from hfsparse.selectors.lsh import Lsh
from tests.patcher.families import (
    SIZES,
    STREAM,
    evicting,
    full,
    left_padded,
    mixed,
    plan_of,
    tokens,
)
from tests.patcher.runs import continue_with, forward, generate

MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
Q_HEADS, KV_HEADS, LENGTH = 8, 4, 300


def save_models(folder: Path) -> None:
    for name, (model, config) in MODELS.items():
        torch.manual_seed(0)
        heads = dict(num_attention_heads=Q_HEADS, num_key_value_heads=KV_HEADS)
        model(config(**{**SIZES, "num_hidden_layers": 2}, **heads)).save_pretrained(folder / name)


def tables(model) -> Plan:
    """Each kv head another selector; tables and planes are not those of another head."""
    torch.manual_seed(1)
    shape = model.config.num_hidden_layers, KV_HEADS, 16, 16
    moments = {name: torch.randn(shape) for name in ("keys", "queries")}
    table = {name: t @ t.mT for name, t in moments.items()}
    planes = {"mean": torch.randn(shape[:3])}
    few = dict(share=0.06, min_pages=3)
    made = {"lowrank": table, "lsh": planes}
    decode = ("lowrank", "lsh", "lowrank", "lsh"), ("lsh", "lowrank", "full", "lowrank")
    plan = full(model)
    return replace(
        plan,
        patterns={"lowrank": LowRank(**few, rank=2), "lsh": Lsh(**few, bits=4, tables=4)},
        layers=tuple(replace(plan.layers[0], decode=own) for own in decode),
        data={name: DataFile.of(f"{name}.safetensors", each) for name, each in made.items()},
    )


def rings(model) -> Plan:
    """One head a ring, which is another rank's."""

    def layer(index, windowed):
        cache = ["full", "full", "full", "s"]
        return ["full"] * 6 + ["s"] * 2, cache, ["full", "full", "full", "ring"]

    return plan_of(model, layer, s=STREAM)


PLANS = {plan.__name__: plan for plan in (full, rings, mixed, tables, evicting)}


def answer_padded(model) -> tuple[Any, ...]:
    """A left-padded batch, greedily: tokens and the logits of each step."""
    ids, mask = left_padded(LENGTH)
    found = generate(model, ids, mask, new=5)
    return found.sequences, torch.stack(found.logits, 1)


def answer_in_chunks(model) -> tuple[Any, ...]:
    ids = tokens(1, LENGTH)
    found = generate(model, ids, new=5, prefill_chunk_size=128)
    return found.sequences, torch.stack(found.logits, 1)


def answer_twice(model) -> tuple[Any, ...]:
    """A second turn of 40 tokens, which is a chunk, and a third of 9, which are steps."""
    (ids, mask), logits, more = left_padded(LENGTH), [], {}
    for new in (ids, tokens(3, 40, seed=1), tokens(3, 9, seed=2)):
        mask = mask if new is ids else continue_with(ids, mask, new.shape[1])
        found = forward(model, new, mask, **more)
        more = {"cache": found.past_key_values}
        logits.append(found.logits[:, -9:])
    return torch.cat(logits, 1).argmax(-1), torch.cat(logits, 1)


WAYS = {"padded": answer_padded, "chunks": answer_in_chunks, "turns": answer_twice}


def answer(model) -> dict[tuple[str, str], Any]:
    """What a model answers under each plan, in each way, and what it counted."""
    found = {}
    for name, plan in PLANS.items():
        with hfsparse.patch(model, plan(model)) as handle:
            for way, ask in WAYS.items():
                if (name, way) != ("evicting", "chunks"):
                    found[name, way] = ask(model)
            found[name, "stats"] = handle.stats(gather=True)
            found[name, "own stats"] = handle.stats()
            found[name, "explain"] = handle.explain()
    return found


def load(folder: Path, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def sharded(folder: Path):
    """By the newer way of asking, where there is one."""
    try:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_plan="auto", tp_size=distributed.get_world_size())
    except (ImportError, TypeError):
        return load(folder, tp_plan="auto")
    return load(folder, distributed_config=config)


def ask_all(folder: Path) -> dict[str, Any]:
    found = {name: answer(sharded(folder / name)) for name in MODELS}
    return found
