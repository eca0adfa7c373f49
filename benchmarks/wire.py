"""Claim: what crosses the wire a layer and a token, of ranks that share a model or a prompt.

    python -m benchmarks.wire [--ranks 2,4,8] [--tokens 16384]

Counted, not timed: processes on the CPU (gloo) run layers in the shape of Llama-3.1-8B (32 q heads,
8 kv heads of 128, hidden 4,096, bf16), and each adds up what its collectives send. A prompt's bytes
are divided by its tokens. What grows with layers is told of one; the rest, a call's own, is not in
the table. Context parallel is counted with a narrow hidden state, which no layer sends, and with
prompts whose attention answers zeros, which sends as much. A ring of N ranks sends 2 (N - 1) / N of
what it sums up, and N - 1 times what a rank gives all others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hfsparse
from benchmarks.common.options import numbers
from benchmarks.common.shapes import plan_of
from hfsparse import ContextParallel
from hfsparse.kernels import Kernel, Tables
from hfsparse.runtime.call import use_tables

HIDDEN, NARROW, FEW, NEW = 4096, 64, 64, 3
PLANS = "full", "quarter full", "quest 6 %"  # as `plan_of` reads these names
WAYS = ("tensor parallel", "any"), *((way, plan) for way in ("exact", "star") for plan in PLANS)
LAYERS = 1, 2


class Wire(TorchDispatchMode):
    """Adds up the bytes that this rank sends."""

    def __init__(self):
        super().__init__()
        self.sent, self.ranks = 0.0, distributed.get_world_size()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it sends by operators of its own, which come by here, too
        if "c10d" in func.namespace:
            self.sent += self.bytes(func.__name__, args)
        return func(*args, **(kwargs or {}))

    def bytes(self, name: str, args: tuple[Any, ...]) -> float:
        others = self.ranks - 1
        if name.startswith(("allreduce", "all_reduce")):
            return 2 * others / self.ranks * size(args[0])
        if name.startswith("alltoall"):  # output, input: nothing of it is for itself
            return size(args[1])
        if name.startswith("allgather"):  # outputs, inputs
            return others * size(args[1])
        if name.startswith("all_gather"):
            return others * size(args[0])
        if name.startswith("broadcast"):
            return others / self.ranks * size(args[0])
        if name.startswith(("wait_tensor", "_wrap_tensor", "barrier")):
            return 0.0
        raise NotImplementedError(f"what does {name} send?")


def size(given: Any) -> int:
    if isinstance(given, torch.Tensor):
        return given.nbytes
    return sum(map(size, given)) if isinstance(given, (list, tuple)) else 0


def nothing(q, k, v, reads, kv_heads=None, **more):
    return q.new_zeros(*q.shape[:3], v.shape[3])


def make(layers: int, hidden: int) -> PreTrainedModel:
    config = LlamaConfig(
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        hidden_size=hidden,
        intermediate_size=64,
        vocab_size=128,
        num_hidden_layers=layers,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def name_of(folder: str, layers: int) -> str:
    return f"{folder}/layers-{layers}"


@torch.no_grad()
def sent(model: PreTrainedModel, tokens: int) -> tuple[float, float]:
    """Bytes of a prompt's token, and of one behind it."""
    ids = torch.arange(tokens)[None] % 128
    with Wire() as prompt:
        cache = model(ids, logits_to_keep=1, use_cache=True).past_key_values
    with Wire() as steps:
        for _ in range(NEW):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    return prompt.sent / tokens, steps.sent / NEW


def run(way: str, plan: str, folder: str, layers: int, tokens: int) -> tuple[float, float]:
    if way == "tensor parallel":
        from transformers.distributed import DistributedConfig

        shared = DistributedConfig(tp_plan="auto")
        whose = name_of(folder, layers)
        model = LlamaForCausalLM.from_pretrained(whose, distributed_config=shared, dtype="auto")
        with hfsparse.patch(model.eval()):
            return sent(model, FEW)
    model = make(layers, NARROW)
    context = ContextParallel(distributed.group.WORLD, way)
    tables = Tables(prefill=(Kernel("nothing", nothing, lambda need: None),))
    with hfsparse.patch(model, plan_of(model, plan), context_parallel=context), use_tables(tables):
        return sent(model, tokens)


def rank(at: int, ranks: int, folder: str, tokens: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{at}", "LOCAL_RANK": f"{at}", "WORLD_SIZE": f"{ranks}"}
    meet = f"file://{folder}/meet-{ranks}"
    distributed.init_process_group("gloo", init_method=meet, rank=at, world_size=ranks)
    for way, plan in WAYS:
        one, two = (run(way, plan, folder, layers, tokens) for layers in LAYERS)
        own = [b - a for a, b in zip(one, two, strict=True)]
        told: list[Any] = [None] * ranks
        distributed.all_gather_object(told, own)
        most = (max(each) / 1024 for each in zip(*told, strict=True))
        if at == 0:
            cells = " | ".join(f"{number:.2f}" for number in most)
            print(f"| {ranks} | {way} | {plan} | {cells} |", flush=True)
    distributed.destroy_process_group()


def counted(ranks: list[int], tokens: int) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        for layers in LAYERS:
            make(layers, HIDDEN).save_pretrained(Path(name_of(folder, layers)))
        for some in ranks:
            yield multiprocessing.spawn(rank, (some, folder, tokens), some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=numbers, default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=16_384)
    args = parser.parse_args()
    print(f"KiB a layer, sent by the rank that sends most; prompts of {args.tokens:,} tokens.\n")
    print("| ranks | way | plan | a prompt's token | a new token |")
    print("| ---: | --- | --- | ---: | ---: |", flush=True)
    for _ in counted(args.ranks, args.tokens):
        pass


if __name__ == "__main__":
    main()
