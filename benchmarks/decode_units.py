"""Claim: small units are read nearly as fast as pages, and choosing them costs little, on one GPU.

    python -m benchmarks.decode_units [--tokens 131072] [--shares 0.02,0.06] [--kernels]
        [--selectors REGEX]

One layer of Llama-3.1-8B's shape (32 q and 8 kv heads of 128, bf16, one row). First each kernel is
held against its reference; then medians of CUDA graphs: decode over random lists of units, the
choice of each selector alone, and a step's append, choice and decode together. Several caches take
turns, so that none lies in the GPU's own cache. --kernels adds each kernel's own time.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from hfsparse import kernels
from hfsparse.kernels import reference
from hfsparse.kernels.positions import NewTokens
from hfsparse.lists import PAGE, UNITS, PageLists
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.places import Table
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.selectors import SELECTORS

HQ, HKV, D, SCALE = 32, 8, 128, 128**-0.5
CACHES, CALLS, REPLAYS = 3, 24, 15
LABELS = [(unit, rank, 4) for rank in (32, 16) for unit in (64, 16, 8, 1)]  # the last: bits
LABELS += [(16, 16, 8)]
OTHERS = ("channels", "landmarks", "lsh", "centroids")
RANDOM = {"device": "cuda", "dtype": torch.bfloat16}


def selectors(share: float, names: str) -> dict[str, object]:
    """Selectors by name, those that a regular expression finds."""
    quest, lowrank = SELECTORS["quest"], SELECTORS["lowrank"]
    sizes = ((64, 64), (64, 16), (32, 32), (16, 16), (8, 8))
    made = {f"quest {u} / {b}": quest(share=share, unit=u, bound=b) for u, b in sizes}
    for unit, rank, bits in LABELS:
        chosen = lowrank(share=share, unit=unit, rank=rank, bits=bits)
        made[f"lowrank {rank}, {bits} bits / {unit}"] = chosen
    for kind in OTHERS:
        chosen = SELECTORS[kind](share=share)
        made[f"{kind} / {chosen.unit}"] = chosen
    seen = torch.randn(1, HKV, 4 * D, D)
    table = dict.fromkeys(("keys", "queries"), seen.mT @ seen)
    table |= {"weight": seen.abs().mean(2), "mean": seen.mean(2)}
    return {
        name: selector.bind(0, range(HKV), table)
        for name, selector in made.items()
        if re.search(names, name)
    }


class Layer:
    """A full store of random keys and values, and a step of one token at its end."""

    def __init__(self, tokens: int, selector):
        self.store = Full(Group(tuple(range(HKV)), selector=selector), tokens)
        k, v = (torch.randn(1, HKV, tokens - 1, D, **RANDOM) for _ in "kv")
        self.store.create(k, v)
        self.store.append(k, v, Lengths([0], [tokens - 1], tokens - 1))
        self.store.room([tokens - 1], [tokens])
        self.q, self.k, self.v = (torch.randn(1, n, 1, D, **RANDOM) for n in (HQ, HKV, HKV))
        length = torch.tensor([tokens], device="cuda")
        self.new = NewTokens(Lengths([tokens - 1], [1], 1), length, length[:, None] - 1)
        self.places = Table().places([self.store.place()])
        self.selector = selector

    def append(self) -> None:
        need = kernels.Need.of(self.k, self.places.k, self.places.v, self.v)
        kernels.pick(kernels.APPEND, need).run(self.k, self.v, self.places, self.new)

    @cached_property
    def chooser(self) -> kernels.Kernel:
        index = self.store.index
        held = next(iter(index.values()))
        asked = {"tokens": held.shape[2] * PAGE, "index_dtype": held.dtype}
        need = kernels.Need(self.q.device, self.q.dtype, D, D, chooser=self.selector, **asked)
        return kernels.pick(kernels.SELECT, need)

    def choose(self) -> PageLists:
        return self.chooser.run(self.selector, self.q, self.store.index, self.new.length, SCALE)

    def read(self, lists: PageLists) -> Tensor:
        need = kernels.Need.of(self.q, self.places.k, self.places.v, block=PAGE, lists=True)
        run = kernels.pick(kernels.DECODE, need).run
        return run(self.q, self.places, self.new, [lists], scale=SCALE)

    def step(self) -> Tensor:
        self.append()
        return self.read(self.choose())


def random_lists(tokens: int, share: float, unit: int) -> PageLists:
    """Ascending units, others of each head, of so much of the tokens."""
    total = tokens // unit
    width = int(share * total)
    draw = torch.rand(1, HKV, total, device="cuda").topk(width).indices.sort().values
    return PageLists(draw, torch.full((1, HKV), width, device="cuda"), unit)


def near(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(tokens: int, names: str) -> None:
    """Raise SystemExit where a kernel isn't what its reference is."""
    layer = Layer(tokens, SELECTORS["quest"]())
    k, v = layer.store.view(tokens)
    for unit in UNITS:
        lists = random_lists(tokens, 0.05, unit)
        wanted = reference.decode(
            layer.q, k, v, layer.new.query_pos, None, lists, length=layer.new.length, scale=SCALE
        )
        if (off := near(layer.read(lists), wanted)) > 6e-3:
            sys.exit(f"decode over units of {unit}: off by {off:.1e}")
    for name, selector in selectors(0.05, names).items():
        layer = Layer(tokens, selector)
        layer.append()
        index = {name: t.clone() for name, t in layer.store.index.items()}
        layer.store.follow(layer.new.query_pos)
        for key, t in layer.store.index.items():
            same = (t == index[key]) | (t.isnan() if t.is_floating_point() else False)
            if (apart := 1 - float(same.double().mean())) > 1e-4:
                sys.exit(f"{name}: {apart:.1e} of what append makes of {key} is something else")
        found = layer.choose()
        wanted = selector.pages(layer.q, layer.store.index, layer.new.length, SCALE)
        if not torch.equal(found.count, wanted.count):
            sys.exit(f"{name}: {found.count.tolist()} units, not {wanted.count.tolist()}")
        apart = 0
        for h, n in enumerate(found.count[0].tolist()):
            ours, theirs = (set(x.pages[0, h, :n].tolist()) for x in (found, wanted))
            apart += len(ours - theirs)
        if apart > int(found.count.sum()) / 100:
            sys.exit(f"{name}: {apart} of {int(found.count.sum())} units are others")
    print("all kernels agree with their references\n", flush=True)


def median_us(calls: list[Callable]) -> float:
    """Microseconds of one call, inside a CUDA graph in which they take turns."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / CALLS * 1e3)
    return statistics.median(times[3:])


def by_kernel(call: Callable) -> str:
    """Microseconds of each kernel that a call launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:28]].append(event.device_time)
    parts = (f"{name} {len(t) / 10:.0f} x {statistics.median(t):.1f}" for name, t in times.items())
    return "; ".join(parts)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--shares", default="0.02,0.06")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--selectors", default="", help="a regular expression")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a CUDA device, and torch sees none: `hfsparse doctor` says why")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}")
    check(8192, args.selectors)
    shares = [float(share) for share in args.shares.split(",")]
    caches = [Layer(args.tokens, SELECTORS["quest"]()) for _ in range(CACHES)]
    print("| share | decode over units of | us | GB/s | of pages |\n| ---: |" + " ---: |" * 4)
    for share in shares:
        rates = {}
        for unit in reversed(UNITS):
            lists = [random_lists(args.tokens, share, unit) for _ in caches]
            us = median_us([partial(x.read, y) for x, y in zip(caches, lists, strict=True)])
            read = int(lists[0].count.sum()) * unit * 2 * D * 2
            rates[unit] = read / us / 1e3
            part = rates[unit] / rates[PAGE]
            print(f"| {share} | {unit} | {us:.1f} | {rates[unit]:.0f} | {part:.2f} |", flush=True)
    del caches
    print("\n| share | selector | scored and chosen by | choice us | a step us |")
    print("| ---: | --- | --- | ---: | ---: |")
    for name, selector in selectors(shares[0], args.selectors).items():
        layers = [Layer(args.tokens, selector) for _ in range(CACHES)]
        by = layers[0].chooser.name
        for share in shares:
            for layer in layers:
                layer.selector = replace(selector, share=share)
            choice = median_us([layer.choose for layer in layers])
            whole = median_us([layer.step for layer in layers])
            print(f"| {share} | {name} | {by} | {choice:.1f} | {whole:.1f} |", flush=True)
        if args.kernels:
            print(f"  {by_kernel(layers[0].step)}", flush=True)


if __name__ == "__main__":
    main()
