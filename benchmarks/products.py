"""Claim: a fused step of up to 32 rows reads its weights faster than the matrix library does.

    python -m benchmarks.products [--lengths 8192] [--tokens 64] [--shape llama-3.1-8b] [--matrices]
        [--weights int8,fp8,int4,nf4] [--layers 8] [--no-fuse]

Steps of `model.generate`, greedy, random weights in the shape of Llama-3.1-8B (bf16), behind random
keys, not fused and fused: the graph alone, a token in `generate`, and the seconds until the first
tokens are there, most of which compile. Inductor's caches lie where TORCHINDUCTOR_CACHE_DIR says: a
second run tells what a second process waits for. --matrices first times products of 1 to 32 rows
with each matrix of a layer, by the matrix library and by ours, in CUDA graphs over matrices in
turn. --weights: the decoder's matrices quantised by torchao, or by bitsandbytes (nf4), one format
behind another: stock, replayed, and fused; with --matrices the products of int8, fp8 and int4
alone, by torchao and by ours. --layers: so many alone. --no-fuse leaves out what compiles for long.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import bench_ms, continued
from benchmarks.common.shapes import describe, endless, filled_cache, tidy
from hfsparse.kernels import PRODUCTS, QUANTISED
from hfsparse.kernels.codes import read
from hfsparse.patcher.state import state_of

MATRICES = ((1024, 4096), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
ROWS = (1, 4, 8, 16, 32)  # of a step
BITS = {"": 16, "int4": 4}  # of a number, where it isn't 8
HELD = 600e6  # bytes of matrices that take turns: none stays in the card's cache


def quantise(module, weights: str) -> None:
    """All linear layers of a module, by torchao or bitsandbytes."""
    if weights == "nf4":
        return four_bits(module)
    from torchao import quantization

    configs = {
        "int8": quantization.Int8WeightOnlyConfig,
        "fp8": quantization.Float8WeightOnlyConfig,
        "int4": lambda: quantization.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d"),
    }
    quantization.quantize_(module, configs[weights]())


def four_bits(module) -> None:
    """All linear layers of a module in nf4, by bitsandbytes."""
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear:
            of = layer.weight
            made = Linear4bit(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                compute_dtype=of.dtype,
                quant_type="nf4",
                device="meta",
            )
            made.weight = type(made.weight)(of.data, requires_grad=False, quant_type="nf4")
            made.bias = layer.bias
            module.set_submodule(name, made.to(of.device))  # the move quantises


def stock(model, length: int, tokens: int) -> str:
    """A row of the table of steps: the model as it is."""
    tidy()
    ids = torch.randint(5, model.config.vocab_size, (1, length + 1), device=model.device)
    return f"| {length:,} |  | {continued(model, ids, tokens)[0].ms():.2f} |  | stock |"


def step(model, length: int, tokens: int, fuse: bool) -> str:
    """A row of the table of steps."""
    tidy()
    ids = torch.randint(5, model.config.vocab_size, (1, length + 1), device=model.device)
    with hfsparse.patch(model, fuse=fuse):
        begun = time.perf_counter()
        continued(model, ids, 11, past_key_values=filled_cache(model, 1, length, 16))
        first = time.perf_counter() - begun
        cache = filled_cache(model, 1, length, tokens + 2)
        clock, _ = continued(model, ids, tokens, past_key_values=cache)
        graphs = state_of(model).graphs
        graph = next(iter(graphs.kept.values()))[1].graph
        alone = f"{bench_ms(graph.launch):.2f}" if graph else ""
    return f"| {length:,} | {alone} | {clock.ms():.2f} | {first:.1f} | {graphs} |"


def in_turn(call: Callable[[int], object], count: int) -> float:
    """Microseconds of a call, of which a CUDA graph has some, over so many matrices."""
    for i in range(count):
        call(i)
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), max(20, count)
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % count)
    return 1e3 * bench_ms(graph.replay) / calls


def matrix(rows: int, columns: int, weights: str) -> str:
    """A row of the table of matrices."""
    bits, more = BITS.get(weights, 8), {"device": "cuda", "dtype": torch.bfloat16}
    size, held = rows * columns * bits // 8, []
    for _ in range(max(1, int(HELD / size))):
        layer = nn.Linear(columns, rows, bias=False, **more)
        if weights:
            quantise(layer, weights)
        held.append(layer.weight)
    parts, cells = [read(weight) for weight in held] if weights else held, []
    ours = (QUANTISED if weights else PRODUCTS)[0].run
    for n in ROWS:
        x = torch.randn(n, columns, **more)
        theirs = in_turn(lambda i, x=x: linear(x, held[i]), len(held))
        own = in_turn(lambda i, x=x: ours(x, parts[i : i + 1], [None]), len(held))
        cells.append(f"{theirs:.1f} | {own:.1f} | {size / own / 1e6:.2f}")
    return f"| {rows:,} x {columns:,} | {' | '.join(cells)} |"


def matrices(weights: list[str]) -> None:
    """The tables of matrices: of bf16, or of each format."""
    for kind in weights:
        theirs = "torchao" if kind else "cuBLAS"
        rows = "".join(f" {theirs}, {n} rows, us | ours, us | TB/s |" for n in ROWS)
        print(f"| {kind or 'bf16'} |{rows}\n| --- |" + " ---: |" * rows.count("|"))
        with torch.no_grad():
            for shape in MATRICES:
                print(matrix(*shape, kind), flush=True)
                tidy()


def main() -> None:
    made = options.parser(__doc__, "8192", 64, "llama-3.1-8b")
    made.add_argument("--matrices", action="store_true")
    made.add_argument("--weights", default=[""], type=lambda text: text.split(","))
    made.add_argument("--no-fuse", action="store_true")
    made.add_argument("--layers", type=int)
    args = options.parse(made)
    if args.matrices:
        options.need_cuda()
        matrices(args.weights)
    for weights in args.weights:
        steps(args, weights)


def steps(args, weights: str) -> None:
    """A table of steps."""
    model = endless(args.shape)
    model.model.layers = model.model.layers[: args.layers]
    model.config.num_hidden_layers = len(model.model.layers)
    if weights:
        quantise(model.model, weights)  # as transformers' TorchAoConfig does: not the head
    print(f"\n{describe(model, args.shape)} {args.layers or 'All'} layers. {weights}\n")
    print("| tokens | graph alone, ms | a token, ms | first tokens, s | graph |")
    print("| ---: | ---: | ---: | ---: | --- |", flush=True)
    for length in args.lengths:
        if weights:
            print(stock(model, length, args.tokens), flush=True)
        for fuse in (False,) if args.no_fuse else (False, True):
            print(step(model, length, args.tokens, fuse), flush=True)


if __name__ == "__main__":
    main()
