"""Claim: prefill attention over block lists costs what its density says, on one GPU.

    python benchmarks/prefill.py [--lengths 8192,32768,131072] [--kernels triton,fa4]
                                 [--only-check] [--tiles]

First the kernels are checked against float32 attention, the choice of blocks against the plain
patterns and flash-attn-4 against Triton, on small shapes; one that is wrong ends the run. Then
one layer of the shape of Llama-3.1-8B (32 q heads, 8 kv heads, head dim 128, bf16, batch 1, causal,
random inputs) is timed: medians, all arms in one run. Density is the share of the causal blocks
that is kept; random lists hold the row's first block and the diagonal. TFLOP/s count kept blocks,
the diagonal's as half. Where the host takes as long as the call, the GPU waits for it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from hfsparse.kernels import Need, fa4, reference, triton_estimate, triton_prefill
from hfsparse.lists import Band, BlockLists, Grid
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.vertical_slash import VerticalSlash

H, HKV, D = 32, 8, 128
SCALE = D**-0.5
KV = torch.arange(H) // (H // HKV)
DENSITIES = (1.0, 0.3, 0.1, 0.05)
PATTERNS = (
    VerticalSlash(columns=1000, diagonals=200),
    BlockTopK(share=0.1, min_blocks=16),
    Antidiagonal(tau=0.9, max_share=0.5),
)
CHECKED = (VerticalSlash(45, 130), BlockTopK(0.25, 2), Antidiagonal(0.6), Antidiagonal(0.9, 0.2))
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
TILES = ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3))


# -- correctness ---------------------------------------------------------------------------------


def truth(q, k, v, mask, kv, scale, softcap=None, s_aux=None) -> Tensor:
    """Float32 attention over the keys that `mask` [B, H, Q, S] keeps, 0 where there is none."""
    k, v = (t[:, kv].float().nan_to_num(0) for t in (k, v))
    logits = q.float().nan_to_num(0) @ k.mT * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        bare = s_aux.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat([logits, bare], 3), 3)[..., :-1] @ v
    return torch.softmax(logits, 3).nan_to_num(0) @ v


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def inputs(new, total, heads, kv_heads, dim, value_dim, dtype, uneven=False):
    """Random q, k, v of rows of these lengths, NaN behind each row's end; heads within tokens."""
    shapes = (max(new), heads, dim), (max(total), kv_heads, dim), (max(total), kv_heads, value_dim)
    q, k, v = (torch.randn(len(new), *s, device="cuda").transpose(1, 2) for s in shapes)
    if uneven:  # blocks of keys whose logits differ by far, so that tiles can be skipped
        k *= (
            4
            * torch.rand(max(total) // 128 + 1, device="cuda").repeat_interleave(128)[
                None, None, : max(total), None
            ]
        )
    for t, held in ((q, new), (k, total), (v, total)):
        dead = torch.arange(t.shape[2], device="cuda") >= torch.tensor(held, device="cuda")[:, None]
        t.masked_fill_(dead[:, None, :, None], torch.nan)
    return tuple(t.to(dtype) for t in (q, k, v))


def random_keep(grid: Grid, heads: int, density: float) -> Tensor:
    """bool [1, heads, nq, nk]: the first block, the diagonal and others up to a density."""
    i, j = (torch.arange(n, device="cuda") for n in (grid.nq, grid.nk))
    i = i[:, None] + (grid.nk - grid.nq)
    forced = (j == 0) | (j == i)
    free = ((j < i) & (j > 0)).sum()
    wanted = density * (j <= i).sum() - (forced & (j <= i)).sum()
    keep = torch.rand(1, heads, grid.nq, grid.nk, device="cuda") < wanted / free.clamp(min=1)
    return keep | forced


def grids() -> Iterator[tuple[str, list[int], list[int], dict]]:
    """Rows' new and total tokens, by what is special about them."""
    for length in (1, 31, 33, 127, 129, 517):
        yield f"length {length}", [length], [length], {}
    yield "padded batch", [517, 300, 1, 0], [517, 300, 1, 0], {}
    yield "chunk", [260, 17], [700, 401], {}
    yield "window", [517, 260], [517, 700], {"window": 200}


def one(
    name, dtype, heads, kv_heads, dim, value_dim, new, total, more, lists_of=None,
    kernel=triton_prefill, **logits,
):  # fmt: skip
    """Check one case: its name and error, or the end of the run."""
    torch.manual_seed(0)
    q, k, v = inputs(new, total, heads, kv_heads, dim, value_dim, dtype)
    lengths = [torch.tensor(t, device="cuda") for t in (new, total)]
    grid = Grid(*lengths, q.shape[2], k.shape[2], 128, **more)
    if lists_of is None:
        lists = BlockLists.of(grid, heads, random_keep(grid, heads, 0.5))
    else:
        lists = lists_of(grid, q, k)
    kv = torch.arange(heads, device="cuda") // (heads // kv_heads)
    expected = truth(q, k, v, lists.mask(), kv, dim**-0.5, **logits)
    torch.full_like(expected, torch.nan, dtype=dtype)  # what the kernel leaves unwritten is NaN
    found = kernel.prefill(q, k, v, lists, kv, scale=dim**-0.5, **logits)
    name = f"{kernel.__name__.rpartition('.')[2]}: {name}, {heads}/{kv_heads} heads of {dim}"
    report(name, dtype, error(found, expected))
    if kernel is not triton_prefill:
        other = triton_prefill.prefill(q, k, v, lists, kv, scale=dim**-0.5, **logits)
        report(f"{name}, against Triton", dtype, error(found, other))


def report(name: str, dtype: torch.dtype, off: float) -> None:
    good = off <= TOLERANCE[dtype]
    print(f"- {'ok' if good else 'WRONG'} {off:.1e} {str(dtype)[6:]}: {name}", flush=True)
    if not good:
        sys.exit(f"{name}: error {off:.2e}, at most {TOLERANCE[dtype]:.0e} is rounding")


def check() -> None:
    bf16, half, single = torch.bfloat16, torch.float16, torch.float32
    for dtype in (bf16, half, single):
        for dim in (64, 80, 96, 128, 256):
            one("random lists", dtype, 6, 2, dim, dim, [517, 300], [517, 300], {})
    for name, new, total, more in grids():
        one(name, bf16, 4, 2, 128, 128, new, total, more)
    for heads, kv_heads in ((3, 3), (6, 2), (8, 2), (7, 1), (8, 1)):
        one("group", bf16, heads, kv_heads, 128, 128, [517], [517], {})
    one("value dim 64", bf16, 4, 2, 128, 64, [517], [517], {})
    aux = torch.linspace(-2, 3, 6, device="cuda")
    for dtype in (bf16, half, single):
        case = (dtype, 6, 2, 64, 64, [517, 300], [700, 300], {})
        one("softcap, sink logits", *case, softcap=5.0, s_aux=aux)
        one("columns", *case, lambda grid, q, k: VerticalSlash(45, 130).lists(q, k, grid, 0.125))
        one("band", *case, lambda grid, q, k: BlockLists.of(grid, 6, band=Band(5, 150, 6554)))
        one("everything", *case, lambda grid, q, k: BlockLists.of(grid, 6))
    first = torch.tensor([[0, 1000, 1128, 1256]], device="cuda")
    live = torch.tensor([[70, 128, 128, 44]], device="cuda")
    ring = {"key_first": first, "key_live": live}
    case = (bf16, 4, 2, 128, 128, [100], [1300])
    check_ring(*case, ring)
    check_skip()
    check_estimates()


def check_fa4() -> None:
    bf16, half, more = torch.bfloat16, torch.float16, {"kernel": fa4}
    for dtype, dim in ((bf16, 64), (bf16, 80), (bf16, 96), (bf16, 128), (half, 128)):
        one("random lists", dtype, 6, 2, dim, dim, [517, 300], [517, 300], {}, **more)
    for name, new, total, place in grids():
        one(name, bf16, 6, 2, 128, 128, new, total, place, **more)
    for heads, kv_heads in ((3, 3), (8, 2), (7, 1)):
        one("group", bf16, heads, kv_heads, 128, 128, [517], [517], {}, **more)
    one("value dim 64", bf16, 6, 2, 128, 64, [517], [517], {}, **more)
    case = (bf16, 6, 2, 128, 128, [517, 300], [700, 300])
    one(
        "band",
        *case,
        {},
        lambda grid, q, k: BlockLists.of(grid, 6, band=Band(5, 150, 6554)),
        **more,
    )
    one("everything", *case, {}, lambda grid, q, k: BlockLists.of(grid, 6), **more)
    for place in ({}, {"window": 200}):
        slashes = VerticalSlash(45, 130), VerticalSlash(300, 40)
        for pattern in slashes:
            name = f"{pattern.columns} columns, window {place.get('window')}"
            one(name, *case, place, lambda g, q, k, p=pattern: p.lists(q, k, g, 0.09), **more)
        one("scattered columns", *case, place, lambda grid, q, k: scattered(grid, 6), **more)
    aux = torch.linspace(-2, 3, 6, device="cuda")
    one("sink logits", *case, {}, s_aux=aux, **more)
    one("softcap, columns", *case, {}, lambda g, q, k: scattered(g, 6), softcap=5.0, **more)
    first = torch.tensor([[0, 1000, 1128, 1256]], device="cuda")
    live = torch.tensor([[70, 128, 128, 44]], device="cuda")
    ring = {"key_first": first, "key_live": live}
    check_ring(bf16, 6, 2, 128, 128, [100], [1300], ring, fa4)
    for new, total in ((517, 517), (100, 517)):
        q, _, _ = inputs([new], [new], 6, 2, 128, 128, bf16)
        _, k, v = inputs([total], [total], 6, 2, 128, 128, bf16)
        mask = torch.ones(new, total, dtype=torch.bool, device="cuda").tril(total - new)
        kv = torch.arange(6, device="cuda") // 3
        expected = truth(q, k, v, mask, kv, 0.1)
        report(f"fa4: dense, {new} of {total}", bf16, error(fa4.dense(q, k, v, 0.1), expected))


def scattered(grid: Grid, heads: int) -> BlockLists:
    """Random blocks and 150 random columns, some of them within kept blocks."""
    columns = torch.rand(len(grid.q_len), heads, grid.Sk, device="cuda").topk(150).indices
    keep = random_keep(grid, heads, 0.3)
    return BlockLists.of(grid, heads, keep, columns=columns.sort(-1).values)


def check_ring(
    dtype, heads, kv_heads, dim, value_dim, new, total, ring, kernel=triton_prefill
) -> None:
    q, _, _ = inputs(new, new, heads, kv_heads, dim, value_dim, dtype)
    _, k, v = inputs([512], [512], heads, kv_heads, dim, value_dim, dtype)
    lengths = [torch.tensor(t, device="cuda") for t in (new, total)]
    grid = Grid(*lengths, new[0], 512, 128, **ring)
    k.masked_fill_((grid.key_pos < 0)[:, None, :, None], torch.nan)
    v.masked_fill_((grid.key_pos < 0)[:, None, :, None], torch.nan)
    lists = BlockLists.of(grid, heads, band=Band(70, 150))
    kv = torch.arange(heads, device="cuda") // (heads // kv_heads)
    expected = truth(q, k, v, lists.mask(), kv, dim**-0.5)
    found = kernel.prefill(q, k, v, lists, kv, scale=dim**-0.5)
    report("ring", dtype, error(found, expected))


def check_skip() -> None:
    for dtype, dim in ((torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 256)):
        torch.manual_seed(0)
        q, k, v = inputs([900, 517], [900, 700], 4, 2, dim, dim, dtype, uneven=True)
        lengths = [torch.tensor(t, device="cuda") for t in ([900, 517], [900, 700])]
        lists = BlockLists.of(Grid(*lengths, 900, 900, 128), 4)
        kv = torch.arange(4, device="cuda") // 2
        counts = torch.zeros(2, 4, 2, dtype=torch.int64, device="cuda")
        tile = triton_prefill.tile_of(dim, q.element_size(), 128, str(q.device))[:2]
        more = {"scale": dim**-0.5, "skip": 3.0}
        found = triton_prefill.prefill(q, k, v, lists, kv, **more, skipped=counts[0])
        expected = reference.prefill(q, k, v, lists, kv, **more, skipped=counts[1], tile=tile)
        report(f"skip, heads of {dim}", dtype, error(found, expected))
        share = (counts[..., 0].sum(1) / counts[..., 1].sum(1)).tolist()
        print(f"  skipped {share[0]:.3f} of the tiles; the reference {share[1]:.3f}", flush=True)
        if not 0.05 < share[0] < 0.95 or abs(share[0] - share[1]) > 0.01:
            sys.exit("skip: the kernel and the reference do not skip the same")


def check_estimates() -> None:
    bf16 = torch.bfloat16
    plain, window = ([2000, 1037], [2000, 1037], None), ([700, 517], [1717, 700], 600)
    cases = [(bf16, dim, plain) for dim in (64, 80, 128, 256)]
    cases += [(bf16, 128, window), (torch.float16, 128, plain), (torch.float32, 64, plain)]
    for dtype, dim, (new, total, window) in cases:
        torch.manual_seed(0)
        q, k, _ = inputs(new, total, 6, 2, dim, dim, dtype)
        lengths = [torch.tensor(t, device="cuda") for t in (new, total)]
        grid = Grid(*lengths, q.shape[2], k.shape[2], 128, window)
        for pattern in CHECKED:
            name = f"{pattern.kind}, {str(dtype)[6:]} heads of {dim}, window {window}"
            if why := triton_estimate.why_not(pattern, q, grid):
                print(f"- not served: {name}: {why}", flush=True)
                continue
            found = triton_estimate.lists(pattern, q, k, grid, dim**-0.5).mask()
            expected = pattern.lists(q, k, grid, dim**-0.5).mask()
            off = float((found != expected).sum() / expected.sum())
            print(f"- {off:.1e} of the pairs differ: {name}", flush=True)
            if off > 0.01 or not found.any():
                sys.exit(f"{name}: the fused lists are not the plain ones")


# -- speed ---------------------------------------------------------------------------------------


class Table:
    """One Markdown table, printed row by row."""

    HEAD = ("arm", "tokens", "density", "ms", "x sdpa", "TFLOP/s", "note")

    def __init__(self):
        print("\n| " + " | ".join(self.HEAD) + " |\n|" + " --- |" * len(self.HEAD), flush=True)

    def row(self, arm, tokens, density=None, ms=None, ratio=None, rate=None, note="") -> None:
        def show(x, form):
            return "" if x is None else format(x, form)

        cells = (arm, f"{tokens:,}", show(density, ".3f"), show(ms, ".3f"), show(ratio, ".2f"))
        print("| " + " | ".join([*cells, show(rate, ".0f"), note]) + " |", flush=True)


def median(run: Callable, rep: int = 100) -> float:
    return triton.testing.do_bench(run, warmup=25, rep=rep, return_mode="median")


def shaped(L: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    heads = (H, HKV, HKV)
    return tuple(
        torch.randn(1, L, n, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in heads
    )


def work(lists: BlockLists) -> tuple[float, float]:
    """Density in blocks, and TFLOPs, a partial block as half."""
    grid = lists.grid
    blocks = lists.blocks()
    flops = 4 * D * grid.block**2 * float(blocks.sum() - lists.part_count.sum() / 2)
    return float((blocks / grid.blocks()[:, None]).mean()), flops / 1e12


def extra(run: Callable) -> float:
    """MiB that a call takes above what is there before, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def host(run: Callable) -> float:
    """Milliseconds until a call returns, the GPU still at work: the least of a few."""
    took = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return min(took) * 1e3


def dense(q, k, v) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)


def timings(table: Table, L: int, tiles: bool, names: list[str]) -> None:
    q, k, v = shaped(L)
    grid, kv = replace(Grid.causal(1, L, 128, "cuda"), padded=False, past=False), KV.cuda()
    ours = "triton" in names
    whole = 4 * D * H * L * L / 2 / 1e12
    base = median(lambda: dense(q, k, v))
    note = f"{extra(lambda: dense(q, k, v)):.0f} MiB"
    table.row("sdpa, its own choice", L, 1.0, base, 1.0, whole / base * 1e3, note)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel([backend]):
            ms = median(lambda: dense(q, k, v))
        name = backend.name.lower().removesuffix("_attention")
        table.row(f"sdpa {name}", L, 1.0, ms, base / ms, whole / ms * 1e3)

    if "fa4" in names:
        ms = median(lambda: fa4.dense(q, k, v, SCALE))
        table.row("fa4, dense", L, 1.0, ms, base / ms, whole / ms * 1e3)

    def arm(name: str, lists: BlockLists, note: str = "", kernel=triton_prefill, **more) -> float:
        heads = KV if kernel is fa4 else kv

        def run():
            return kernel.prefill(q, k, v, lists, heads, scale=SCALE, **more)

        ms, (density, flops) = median(run), work(lists)
        note = note or f"{extra(run):.0f} MiB, host {host(run):.2f} ms"
        table.row(name, L, density, ms, base / ms, flops / ms * 1e3, note)
        return ms

    def each(name: str, lists: BlockLists) -> float:
        """Every kernel asked for over the same lists; the Triton kernel's time."""
        if "fa4" in names:
            arm(f"fa4, {name}", lists, kernel=fa4)
        return arm(f"ours, {name}", lists)

    spent = {}
    for density in DENSITIES:
        keep = None if density == 1 else random_keep(grid, H, density)
        lists = BlockLists.of(grid, H, keep)
        del keep
        spent[density] = each(f"density {density}", lists)
        if "fa4" in names and density == 0.1:
            padded = replace(lists, grid=replace(grid, padded=True))
            arm("fa4, density 0.1, as if padded", padded, kernel=fa4)
        if tiles and density in (1.0, 0.1):
            every_tile(arm, density, lists)
        if ours and density == 1:
            arm("ours, skip on, nothing skipped", lists, "the test's cost", skip=1e9)
            arm("ours, skip on, all but one skipped", lists, "what is left: q · k", skip=-1e9)
        lists = None
        torch.cuda.empty_cache()
    half = [BlockLists.of(grid, H // 2, band=Band(64, 1024))]
    half.append(BlockLists.of(grid, H // 2, random_keep(grid, H // 2, 0.25)))
    each("16 heads streaming, 16 at 0.25", BlockLists.cat(half))
    columns = torch.rand(1, H, L, device="cuda").topk(1000).indices.sort(-1).values
    near = torch.arange(grid.nq, device="cuda")
    near = (near[:, None] - near < 32).expand(1, H, -1, -1)
    lists = BlockLists.of(grid, H, near, columns=columns)
    each("32 blocks of diagonals, 1,000 columns", lists)
    if "fa4" in names:
        table.row(
            "fa4, of it: tables, columns gathered",
            *(L, None, median(lambda: fa4.prepare(k, v, lists, H // HKV))),
        )
    lists = half = columns = near = None
    if "fa4" in names:
        first_fa4(table, L)
    for pattern in PATTERNS if ours else ():

        def choose(pattern=pattern):
            return triton_estimate.lists(pattern, q, k, grid, SCALE)

        density, _ = work(choose())
        ms = median(choose)
        share = ms / (ms + spent[0.1])
        note = f"{extra(choose):.0f} MiB; {share:.3f} of a layer at density 0.1"
        table.row(f"choice by {pattern.kind}", L, density, ms, note=note)
    torch.cuda.empty_cache()
    if ours:
        first_calls(table, L)


def first_fa4(table: Table, L: int) -> None:
    """What flash-attn-4's first call at a new length costs above the second, and compiles."""
    odd = L * 3 // 4 - 77
    q, k, v = shaped(odd)
    grid = replace(Grid.causal(1, odd, 128, "cuda"), padded=False, past=False)
    keep = random_keep(grid, H, 0.1)
    columns = torch.rand(1, H, odd, device="cuda").topk(1000).indices.sort(-1).values
    for name, found in (("no columns", None), ("1,000 columns", columns)):
        lists = BlockLists.of(grid, H, keep, columns=found)
        took, before = [], fa4.compiled()
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            fa4.prefill(q, k, v, lists, KV, scale=SCALE)
            torch.cuda.synchronize()
            took.append((time.perf_counter() - start) * 1e3)
        note = f"then {took[1]:.1f}, {took[2]:.1f} ms; {fa4.compiled() - before} kernels compiled"
        table.row(f"fa4, first call at a new length, {name}", odd, ms=took[0], note=note)


def first_calls(table: Table, L: int) -> None:
    """What the first call at a length never seen costs above the second, and what it compiled."""
    odd = L * 3 // 4 - 77
    q, k, v = shaped(odd)
    grid, kv = Grid.causal(1, odd, 128, "cuda"), KV.cuda()
    jitted = [
        f
        for module in (triton_prefill, triton_estimate, triton_estimate.triton_select)
        for f in vars(module).values()
        if isinstance(f, triton.runtime.JITFunction)
    ]

    def compiled() -> int:
        return sum(len(caches[0]) for f in jitted for caches in f.device_caches.values())

    for pattern in PATTERNS:
        took, before = [], compiled()
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            lists = triton_estimate.lists(pattern, q, k, grid, SCALE)
            triton_prefill.prefill(q, k, v, lists, kv, scale=SCALE)
            torch.cuda.synchronize()
            took.append((time.perf_counter() - start) * 1e3)
        note = f"then {took[1]:.1f}, {took[2]:.1f} ms; {compiled() - before} kernels compiled"
        table.row(f"first call at a new length, {pattern.kind}", odd, ms=took[0], note=note)


def every_tile(arm: Callable, density: float, lists: BlockLists) -> None:
    """Time other tiles (queries, keys, warps, stages) than the kernel's own choice."""
    own = triton_prefill.TILES, triton_prefill.STAGES
    for *tile, stages in TILES:
        triton_prefill.TILES, triton_prefill.STAGES = (tuple(tile),), stages
        triton_prefill.tile_of.cache_clear()
        try:
            arm(f"… {tile[0]}x{tile[1]} w{tile[2]} s{stages}", lists)
        except triton.runtime.errors.OutOfResources as found:
            print(f"| … {tile} | {found} |", flush=True)
    triton_prefill.TILES, triton_prefill.STAGES = own
    triton_prefill.tile_of.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,32768,131072")
    parser.add_argument("--kernels", default="triton,fa4", help="without triton: only beside fa4")
    parser.add_argument("--only-check", action="store_true")
    parser.add_argument("--tiles", action="store_true", help="time other tiles too")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    print(
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, Triton {triton.__version__}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        flush=True,
    )
    names = args.kernels.split(",")
    if "fa4" in names:
        need = Need(torch.device("cuda"), torch.bfloat16, D, D, lists=True)
        if reason := fa4.why_not(need):
            print(f"fa4 is left out: {reason}", flush=True)
            names.remove("fa4")
    if "triton" in names:
        check()
    if "fa4" in names:
        check_fa4()
        print(f"fa4 compiled {fa4.compiled()} kernels", flush=True)
    print(f"\nchecked in {time.perf_counter() - start:.0f} s", flush=True)
    if not args.only_check:
        table = Table()
        for length in args.lengths.split(","):
            timings(table, int(length), args.tiles, names)
    print(f"\n{time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
