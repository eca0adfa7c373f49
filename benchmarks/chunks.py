"""Claim: a chunk behind packed pages takes little longer than behind keys as they came, on one GPU.

    python -m benchmarks.chunks [--past 131072,524288] [--bits 8,4,fp8] [--chunk 8192]

One layer of the shape of Llama-3.1-8B (32 q heads, 8 kv heads, head dim 128, bf16, batch 1, random
inputs) reads a chunk behind a past: all of it, or by lists of a tenth of the blocks. The Triton
kernel reads the past as it came; or what is unpacked of packed pages, a few heads at a time; or
these pages where they lie. A call is timed once it agrees with float32 attention over what the
pages stand for, in some rows: else it is left out, and the exit status is 1. MiB is what a call
takes above the cache and its inputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.common.options import need_cuda, numbers
from hfsparse.kernels.triton.prefill import prefill
from hfsparse.lists import BlockLists, Grid, HeadIndex
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.packed import Bits
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.packed import PackedFull

H, HKV, D = 32, 8, 128
GROUP, SCALE = H // HKV, D**-0.5
DEVICE, DTYPE = "cuda", torch.bfloat16
DENSITIES = (1.0, 0.1)
ROWS, CALLS = 16, 3
TOLERANCE = 6e-3  # relative, of bfloat16
HEAD = ("past", "density", "bits", "the past is read", "ms", "x as it came", "MiB", "error")


class Chunk:
    """A chunk behind a past, and the lists by which it is read."""

    def __init__(self, past: int, new: int, density: float):
        torch.manual_seed(0)
        self.past, self.lengths = past, Lengths([past], [new], new)
        self.q, *self.old = _drawn(H, new), _drawn(HKV, past), _drawn(HKV, past)
        self.new = _drawn(HKV, new), _drawn(HKV, new)
        q_len, k_len = (torch.tensor([n], device=DEVICE) for n in (new, past + new))
        self.grid = Grid(q_len, k_len, new, past + new, 128, padded=False)
        keep = None if density == 1 else _some(self.grid, density)
        self.lists = BlockLists.of(self.grid, H, keep)
        self.kv = torch.arange(H, device=DEVICE) // GROUP
        self.rows = torch.linspace(0, new - 1, ROWS, device=DEVICE).long()

    def stored(self, bits: Bits) -> PackedFull:
        store = PackedFull(Group(tuple(range(HKV)), bits=bits), self.past)
        store.create(*self.old)
        store.append(*self.old, Lengths([0], [self.past], self.past))
        return store

    def by_heads(self, store: PackedFull, read: Callable) -> Tensor:
        """`read(q, k, v, lists, kv)` of a few kv heads at a time, which are unpacked."""
        found, index = [], HeadIndex()
        for some, part in store.parts(self.lengths):
            heads = range(HKV)[some]
            own = slice(heads[0] * GROUP, (heads[-1] + 1) * GROUP)
            k, v, _ = part.with_chunk(*(t[:, some] for t in self.new), self.lengths, self.grid)
            lists = self.lists.in_order(range(H)[own], index)
            found.append(read(self.q[:, own], k, v, lists, self.kv[: own.stop - own.start]))
        return torch.cat(found, 1)

    def truth(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, kv: Tensor) -> Tensor:
        """Float32 attention of some rows."""
        mask, found = lists.mask(self.rows), []
        for h, head in enumerate(kv.tolist()):
            logits = q[:, h, self.rows].float() @ k[:, head].float().mT * SCALE
            weights = logits.masked_fill(~mask[:, h], -torch.inf).softmax(-1)
            found.append(weights @ v[:, head].float())
        return torch.stack(found, 1)

    def arms(self, store: PackedFull) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        def by_pages() -> Tensor:
            k, v, past = store.with_pages(*self.new, self.lengths)
            return prefill(self.q, k, v, self.lists, self.kv, scale=SCALE, past=past)

        def read(*given: Tensor) -> Tensor:
            return prefill(*given, scale=SCALE)

        yield "a few heads are unpacked", lambda: self.by_heads(store, read)
        yield "where its pages lie", by_pages


def _drawn(heads: int, tokens: int) -> Tensor:
    """Heads inside tokens in memory, as models have them."""
    return torch.randn(1, tokens, heads, D, device=DEVICE, dtype=DTYPE).transpose(1, 2)


def _some(grid: Grid, density: float) -> Tensor:
    """bool [1, H, nq, nk]: the first block, the diagonal and others, about so many of all."""
    i = torch.arange(grid.nq, device=DEVICE)[:, None] + grid.nk - grid.nq
    j = torch.arange(grid.nk, device=DEVICE)
    keep = torch.rand(1, H, grid.nq, grid.nk, device=DEVICE) < density
    return keep | (j == 0) | (j == i)


def ms(run: Callable) -> float:
    """The median of a few calls, behind one."""
    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[CALLS // 2]


def mib(run: Callable) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def show(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def rows_of(chunk: Chunk, density: float, bits: list[Bits]) -> int:
    """Print a chunk's rows; how many calls were wrong."""
    whole, wrong = [torch.cat(t, 2) for t in zip(chunk.old, chunk.new, strict=True)], 0

    def as_it_came() -> Tensor:
        return prefill(chunk.q, *whole, chunk.lists, chunk.kv, scale=SCALE)

    def told(kind, arm: str, run: Callable, wanted: Tensor, least: float | None) -> float:
        found = run()[:, :, chunk.rows].double()
        off = float((found - wanted).norm() / wanted.norm())
        took, name = None, (f"{chunk.past:,}", f"{density:g}", str(kind), arm)
        if off <= TOLERANCE:
            took = ms(run)
        cells = ("", "") if took is None else (f"{took:.2f}", f"{took / (least or took):.2f}")
        show(*name, *cells, f"{mib(run):.0f}", f"{off:.1e}")
        return took

    wanted = chunk.truth(chunk.q, *whole, chunk.lists, chunk.kv).double()
    least = told(16, "as it came", as_it_came, wanted, None)
    wrong += least is None
    for kind in bits:
        store = chunk.stored(kind)
        wanted = chunk.by_heads(store, chunk.truth).double()
        for arm, run in chunk.arms(store):
            wrong += told(kind, arm, run, wanted, least) is None
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--past", type=numbers, default=[131_072, 524_288])
    parser.add_argument("--bits", default="8,4,fp8")
    parser.add_argument("--chunk", type=int, default=8192)
    args = parser.parse_args()
    need_cuda()
    bits = [int(kind) if kind.isdigit() else kind for kind in args.bits.split(",")]
    show(*HEAD)
    show(*["---"] * len(HEAD))
    return int(
        sum(rows_of(Chunk(n, args.chunk, d), d, bits) for n in args.past for d in DENSITIES) > 0
    )


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
