"""What ranks that share a model's heads do, and one process that has them all."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hfsparse
from hfsparse import Plan
from hfsparse.patcher.state import state_of
from hfsparse.plan.files import DataFile
from hfsparse.selectors.lowrank import LowRank
from hfsparse.selectors.lsh import Lsh
from tests.patcher.families import (
    BLOCKS,
    QUEST,
    SIZES,
    STREAM,
    VS,
    evicting,
    full,
    left_padded,
    plan_of,
    tokens,
)
from tests.patcher.runs import continue_with, forward, generate
from tests.patcher.test_ahead import stand_in

Q_HEADS, KV_HEADS, LENGTH, NEW = 8, 4, 300, 5


def tables(model) -> Plan:
    """Selectors whose tables and planes are other ones for each head."""
    torch.manual_seed(1)
    shape = len(model.model.layers), KV_HEADS, 16, 16
    moments = {name: torch.randn(shape) for name in ("keys", "queries")}
    made = {"lowrank": {name: t @ t.mT for name, t in moments.items()}}
    made["lsh"] = {"mean": torch.randn(shape[:3])}
    few = dict(share=0.06, min_pages=3)
    decode = ("lowrank", "lsh", "lowrank", "lsh"), ("lsh", "lowrank", "full", "lowrank")
    plan = full(model)
    return replace(
        plan,
        patterns={"lowrank": LowRank(**few, rank=2), "lsh": Lsh(**few, bits=4, tables=4)},
        layers=tuple(replace(plan.layers[0], decode=own) for own in decode),
        data={name: DataFile.of(f"{name}.safetensors", each) for name, each in made.items()},
    )


def uneven(model) -> Plan:
    """Patterns, a ring and chosen pages; no rank has the words of another."""

    def layer(index, windowed):
        prompt, decode = ["vs", "blocks", "full", "s", "full", "vs"], ["quest", "full", "full"]
        turn = -1 if index else 1
        cache = ["full"] * 3 + ["s"]
        return [*prompt[::turn], "s", "s"], cache, [*decode[::turn], "ring"]

    return plan_of(model, layer, s=STREAM, vs=VS, blocks=BLOCKS, quest=QUEST)


def late(model) -> Plan:
    """The last rank's heads alone choose pages, from some steps behind a prompt on."""

    def layer(index, windowed):
        return ["full"] * Q_HEADS, ["full"] * KV_HEADS, ["full"] * 2 + ["quest"] * 2

    return plan_of(model, layer, below=(0, LENGTH + 9, 0), quest=QUEST)


# Which model, under which plans. Ranks of the last one have all heads: its norms go over them.
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, (full, uneven, tables)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, (uneven, evicting)),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, (uneven,)),
}


def save_models(folder: Path) -> None:
    heads = dict(num_attention_heads=Q_HEADS, num_key_value_heads=KV_HEADS, num_hidden_layers=2)
    for name, (model, config, _) in MODELS.items():
        torch.manual_seed(0)
        model(config(**SIZES | heads)).save_pretrained(folder / name)
    one = LlamaConfig(**SIZES | heads | dict(num_key_value_heads=1))
    LlamaForCausalLM(one).save_pretrained(folder / "one kv head")


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory) -> Path:
    """Where ranks find the models, and leave their answers."""
    folder = tmp_path_factory.mktemp("ranks")
    save_models(folder)
    return folder


def answer_padded(model) -> tuple[Any, ...]:
    """A left-padded batch, greedily: tokens and the logits of each step."""
    found = generate(model, *left_padded(LENGTH), new=NEW)
    return found.sequences, torch.stack(found.logits, 1)


def answer_in_chunks(model) -> tuple[Any, ...]:
    found = generate(model, tokens(1, LENGTH), new=NEW, prefill_chunk_size=128)
    return found.sequences, torch.stack(found.logits, 1)


def answer_in_turns(model) -> tuple[Any, ...]:
    """A second turn of 40 tokens, which is a chunk, and a third of 9, which are steps."""
    (ids, mask), logits, more = left_padded(LENGTH), [], {}
    for new in (ids, tokens(3, 40, seed=1), tokens(3, 9, seed=2)):
        mask = mask if new is ids else continue_with(ids, mask, new.shape[1])
        found = forward(model, new, mask, **more)
        more = {"cache": found.past_key_values}
        logits.append(found.logits[:, -9:])
    return torch.cat(logits, 1).argmax(-1), torch.cat(logits, 1)


WAYS = {"padded": answer_padded, "chunks": answer_in_chunks, "turns": answer_in_turns}
if transformers.__version__.startswith("5.0."):
    del WAYS["chunks"]  # generate makes no cache for them
CASES = [
    (name, plan.__name__, way)
    for name, (*_, plans) in MODELS.items()
    for plan in plans
    for way in WAYS
    if (plan, way) != (evicting, "chunks")  # which it reads otherwise than one call
]


def answer(name: str, model) -> dict[Any, Any]:
    """What a model answers under each plan, in each way, and what it says of itself."""
    found = {}
    for plan in MODELS[name][2]:
        with hfsparse.patch(model, plan(model)) as handle:
            for way, ask in WAYS.items():
                if (name, plan.__name__, way) in CASES:
                    found[plan.__name__, way] = ask(model)
            found[plan.__name__] = handle.stats(), handle.stats(gather=True), handle.explain()
    return found


def load(folder: Path, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def load_shared(folder: Path):
    """By the newer way of asking, where there is one."""
    try:
        from transformers.distributed import DistributedConfig

        return load(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    except (ImportError, TypeError):
        return load(folder, tp_plan="auto")


@contextmanager
def telling(found: dict[str, str], what: str):
    with pytest.raises(hfsparse.Error) as told:
        yield
    found[what] = f"{type(told.value).__name__}: {told.value}"


def ask_all(folder: Path) -> dict[str, Any]:
    """All models, what is refused, and a model whose weights are gathered by FSDP."""
    rank, said = distributed.get_rank(), {}
    models = {name: load_shared(folder / name) for name in MODELS}
    found = {name: answer(name, model) for name, model in models.items()}
    llama = models["llama"]
    with telling(said, "two plans"):
        hfsparse.patch(llama, (full, uneven)[rank](llama))
    with telling(said, "no plan on one"):
        hfsparse.patch(llama, (full(llama), folder / "nowhere.yaml")[rank])
    with telling(said, "no plan"):
        hfsparse.patch(llama, "nowhere.yaml")
    with telling(said, "profile"):
        hfsparse.profile(llama, None)
    one = load_shared(folder / "one kv head")
    with telling(said, "one kv head"):
        hfsparse.patch(one)
    gathered, mesh = load(folder / "llama"), init_device_mesh("cpu", (2,))
    for part in (*gathered.model.layers, gathered):
        fully_shard(part, mesh=mesh)
    with hfsparse.patch(gathered, uneven(load(folder / "llama"))):
        found["fsdp"] = answer_padded(gathered)
    return found | {"refused": said, "plan": uneven(llama).hash()}


def answer_replayed(model) -> dict[tuple[str, bool], Any]:
    """Steps run one by one and replayed: what was answered, and how the last one was run."""
    found = {}
    for plan in (full, uneven, late):
        for replay in (False, True):
            with hfsparse.patch(model, plan(model)) as handle:
                if not replay:
                    state_of(model).graphs.never = "this test wants it eager"
                ids, mask = (t.to(model.device) for t in left_padded(LENGTH))
                out = generate(model, ids, mask, new=20)
                graph = handle.explain().split("as a CUDA graph: ")[1].splitlines()[0]
                logits = torch.stack(out.logits, 1).cpu()
                found[plan.__name__, replay] = out.sequences.cpu(), logits, graph
    return found


def ask_ahead(folder: Path) -> Any:
    """Steps that run ahead: one rank is not ready for one of them."""
    model, rank = load_shared(folder / "llama"), distributed.get_rank()
    with pytest.MonkeyPatch.context() as patching:
        ran = stand_in(patching)
        ran.anew = LENGTH + 8 if rank else None
        with hfsparse.patch(model, uneven(model)) as handle:
            out = generate(model, tokens(1, LENGTH), new=20)
            told = handle.explain().split("before generate has the token: ")[1].split("\n")[0]
    return out.sequences, torch.stack(out.logits, 1), ran.taken, ran.back, told


def ask_on_gpus(folder: Path) -> Any:
    return answer_replayed(load_shared(folder / "llama"))


def ask_each_head(folder: Path) -> Any:
    """As many ranks as kv heads."""
    model = load_shared(folder / "llama")
    with hfsparse.patch(model, tables(model)):
        return answer_padded(model)
