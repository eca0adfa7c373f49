"""Claim: prefill over block lists costs what its density says; beside its peers, on one GPU.

    python benchmarks/prefill.py [--lengths 8192,32768,131072,262144]
                                 [--arms triton,fa4,flex,modelopt] [--modelopt WHEEL]
                                 [--seconds 480] [--only-check] [--tiles]

First the kernels are checked against float32 attention, the choice of blocks against the plain
patterns and flash-attn-4 against Triton, on small shapes (`--only-check`: in every form). Then
one layer of the shape of Llama-3.1-8B (32 q heads, 8 kv heads, head dim 128, bf16, batch 1, causal,
random inputs) is timed: medians, all arms in one run, each only after its result at that length
agrees with float32 in some rows, and over lists with another arm's in all. An arm that is wrong or
fails is left out: a line says why, the run goes on, and the exit status is 1.

Density is the share of the causal blocks that is kept; random lists hold the row's first block and
the diagonal. TFLOP/s count kept blocks, the diagonal's as half; `of dense` is their ratio to dense
flash-attn-4's at the same length. MiB is what a call takes above its inputs. Where the host takes
as long as the call, the GPU waits for it.

`ours` is our Triton kernel, `fa4` flash-attn-4 over our lists (`dense`: without), `flex`
FlexAttention over the same lists, `modelopt` the skip-softmax kernel of nvidia-modelopt. That one
finds out by itself what to skip: it gets inputs whose weight lies in a share of the key blocks, and
our kernels get the same inputs with lists of these blocks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

import peers

from hfsparse.kernels import Need, fa4, reference
from hfsparse.kernels.triton import estimate as triton_estimate
from hfsparse.kernels.triton import prefill as triton_prefill
from hfsparse.lists import Band, BlockLists, Grid
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.vertical_slash import VerticalSlash

H, HKV, D = 32, 8, 128
SCALE = D**-0.5
KV = torch.arange(H) // (H // HKV)
DEVICE, DTYPE = "cuda", torch.bfloat16
DENSITIES = (1.0, 0.25, 0.1, 0.05)
LONG = 131072  # above, only what is sparse enough to be used there
ONCE = 32768  # the length at which what hardly depends on it is timed
PATTERNS = (
    VerticalSlash(columns=1000, diagonals=200),
    BlockTopK(share=0.1, min_blocks=16),
    Antidiagonal(tau=0.9, max_share=0.5),
)
CHECKED = (VerticalSlash(45, 130), BlockTopK(0.25, 2), Antidiagonal(0.6), Antidiagonal(0.9, 0.2))
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
TILES = ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3))


class Wrong(Exception):
    """A result that is not attention."""


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
    """Relative; head by head, so that long results need little memory."""
    off = whole = 0.0
    for x, y in zip(a.unbind(1), b.unbind(1), strict=True):
        off += float((x.double() - y.double()).square().sum())
        whole += float(y.double().square().sum())
    return (off / whole) ** 0.5


def inputs(new, total, heads, kv_heads, dim, value_dim, dtype, uneven=False):
    """Random q, k, v of rows of these lengths, NaN behind each row's end; heads within tokens."""
    shapes = (max(new), heads, dim), (max(total), kv_heads, dim), (max(total), kv_heads, value_dim)
    q, k, v = (torch.randn(len(new), *s, device=DEVICE).transpose(1, 2) for s in shapes)
    if uneven:  # blocks of keys whose logits differ by far, so that tiles can be skipped
        k *= (
            4
            * torch.rand(max(total) // 128 + 1, device=DEVICE).repeat_interleave(128)[
                None, None, : max(total), None
            ]
        )
    for t, held in ((q, new), (k, total), (v, total)):
        dead = torch.arange(t.shape[2], device=DEVICE) >= torch.tensor(held, device=DEVICE)[:, None]
        t.masked_fill_(dead[:, None, :, None], torch.nan)
    return tuple(t.to(dtype) for t in (q, k, v))


def random_keep(grid: Grid, heads: int, density: float) -> Tensor:
    """bool [1, heads, nq, nk]: the first block, the diagonal and others up to a density."""
    i, j = (torch.arange(n, device=DEVICE) for n in (grid.nq, grid.nk))
    i = i[:, None] + (grid.nk - grid.nq)
    forced = (j == 0) | (j == i)
    free = ((j < i) & (j > 0)).sum()
    wanted = density * (j <= i).sum() - (forced & (j <= i)).sum()
    keep = torch.rand(1, heads, grid.nq, grid.nk, device=DEVICE) < wanted / free.clamp(min=1)
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
    lengths = [torch.tensor(t, device=DEVICE) for t in (new, total)]
    grid = Grid(*lengths, q.shape[2], k.shape[2], 128, **more)
    if lists_of is None:
        lists = BlockLists.of(grid, heads, random_keep(grid, heads, 0.5))
    else:
        lists = lists_of(grid, q, k)
    kv = torch.arange(heads, device=DEVICE) // (heads // kv_heads)
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
        raise Wrong(f"{name}: error {off:.2e}, at most {TOLERANCE[dtype]:.0e} is rounding")


def check(full: bool) -> None:
    """Triton, in the forms that are timed or in every form."""
    bf16, half, single = torch.bfloat16, torch.float16, torch.float32
    for dtype in (bf16, half, single) if full else (bf16,):
        for dim in (64, 80, 96, 128, 256) if full else (128,):
            one("random lists", dtype, 6, 2, dim, dim, [517, 300], [517, 300], {})
    for name, new, total, more in grids():
        one(name, bf16, 4, 2, 128, 128, new, total, more)
    for heads, kv_heads in ((3, 3), (6, 2), (8, 2), (7, 1), (8, 1)) if full else ((8, 2),):
        one("group", bf16, heads, kv_heads, 128, 128, [517], [517], {})
    aux = torch.linspace(-2, 3, 6, device=DEVICE)
    for dtype in (bf16, half, single) if full else (bf16,):
        dim = 64 if full else 128
        case = (dtype, 6, 2, dim, dim, [517, 300], [700, 300], {})
        scale = dim**-0.5
        one("columns", *case, lambda g, q, k, s=scale: VerticalSlash(45, 130).lists(q, k, g, s))
        one("band", *case, lambda grid, q, k: BlockLists.of(grid, 6, band=Band(5, 150, 6554)))
        one("everything", *case, lambda grid, q, k: BlockLists.of(grid, 6))
        if full:
            one("softcap, sink logits", *case, softcap=5.0, s_aux=aux)
    if full:
        one("value dim 64", bf16, 4, 2, 128, 64, [517], [517], {})
        first = torch.tensor([[0, 1000, 1128, 1256]], device=DEVICE)
        live = torch.tensor([[70, 128, 128, 44]], device=DEVICE)
        ring = {"key_first": first, "key_live": live}
        check_ring(bf16, 4, 2, 128, 128, [100], [1300], ring)
    check_skip(full)
    check_estimates(full)


def check_fa4(full: bool) -> None:
    """flash-attn-4, in the forms that are timed or in every form."""
    bf16, half, more = torch.bfloat16, torch.float16, {"kernel": fa4}
    dims = ((bf16, 64), (bf16, 80), (bf16, 96), (bf16, 128), (half, 128))
    for dtype, dim in dims if full else ((bf16, 128),):
        one("random lists", dtype, 6, 2, dim, dim, [517, 300], [517, 300], {}, **more)
    for name, new, total, place in grids():
        one(name, bf16, 6, 2, 128, 128, new, total, place, **more)
    for heads, kv_heads in ((3, 3), (8, 2), (7, 1)) if full else ((8, 2),):
        one("group", bf16, heads, kv_heads, 128, 128, [517], [517], {}, **more)
    case = (bf16, 6, 2, 128, 128, [517, 300], [700, 300])
    band = Band(5, 150, 6554)
    one("band", *case, {}, lambda grid, q, k: BlockLists.of(grid, 6, band=band), **more)
    one("everything", *case, {}, lambda grid, q, k: BlockLists.of(grid, 6), **more)
    for place in ({}, {"window": 200}):
        slashes = VerticalSlash(45, 130), VerticalSlash(300, 40)
        for pattern in slashes:
            name = f"{pattern.columns} columns, window {place.get('window')}"
            one(name, *case, place, lambda g, q, k, p=pattern: p.lists(q, k, g, 0.09), **more)
        one("scattered columns", *case, place, lambda grid, q, k: scattered(grid, 6), **more)
    if full:
        one("value dim 64", bf16, 6, 2, 128, 64, [517], [517], {}, **more)
        aux = torch.linspace(-2, 3, 6, device=DEVICE)
        one("sink logits", *case, {}, s_aux=aux, **more)
        one("softcap, columns", *case, {}, lambda g, q, k: scattered(g, 6), softcap=5.0, **more)
        first = torch.tensor([[0, 1000, 1128, 1256]], device=DEVICE)
        live = torch.tensor([[70, 128, 128, 44]], device=DEVICE)
        ring = {"key_first": first, "key_live": live}
        check_ring(bf16, 6, 2, 128, 128, [100], [1300], ring, fa4)
    for new, total in ((517, 517), (100, 517)):
        q, _, _ = inputs([new], [new], 6, 2, 128, 128, bf16)
        _, k, v = inputs([total], [total], 6, 2, 128, 128, bf16)
        mask = torch.ones(new, total, dtype=torch.bool, device=DEVICE).tril(total - new)
        kv = torch.arange(6, device=DEVICE) // 3
        expected = truth(q, k, v, mask, kv, 0.1)
        report(f"fa4: dense, {new} of {total}", bf16, error(fa4.dense(q, k, v, 0.1), expected))


def scattered(grid: Grid, heads: int) -> BlockLists:
    """Random blocks and 150 random columns, some of them within kept blocks."""
    columns = torch.rand(len(grid.q_len), heads, grid.Sk, device=DEVICE).topk(150).indices
    keep = random_keep(grid, heads, 0.3)
    return BlockLists.of(grid, heads, keep, columns=columns.sort(-1).values)


def check_ring(
    dtype, heads, kv_heads, dim, value_dim, new, total, ring, kernel=triton_prefill
) -> None:
    q, _, _ = inputs(new, new, heads, kv_heads, dim, value_dim, dtype)
    _, k, v = inputs([512], [512], heads, kv_heads, dim, value_dim, dtype)
    lengths = [torch.tensor(t, device=DEVICE) for t in (new, total)]
    grid = Grid(*lengths, new[0], 512, 128, **ring)
    k.masked_fill_((grid.key_pos < 0)[:, None, :, None], torch.nan)
    v.masked_fill_((grid.key_pos < 0)[:, None, :, None], torch.nan)
    lists = BlockLists.of(grid, heads, band=Band(70, 150))
    kv = torch.arange(heads, device=DEVICE) // (heads // kv_heads)
    expected = truth(q, k, v, lists.mask(), kv, dim**-0.5)
    found = kernel.prefill(q, k, v, lists, kv, scale=dim**-0.5)
    report("ring", dtype, error(found, expected))


def check_skip(full: bool) -> None:
    cases = ((torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 256))
    for dtype, dim in cases if full else cases[:1]:
        torch.manual_seed(0)
        q, k, v = inputs([900, 517], [900, 700], 4, 2, dim, dim, dtype, uneven=True)
        lengths = [torch.tensor(t, device=DEVICE) for t in ([900, 517], [900, 700])]
        lists = BlockLists.of(Grid(*lengths, 900, 900, 128), 4)
        kv = torch.arange(4, device=DEVICE) // 2
        counts = torch.zeros(2, 4, 2, dtype=torch.int64, device=DEVICE)
        tile = triton_prefill.tile_of(dim, q.element_size(), 128, str(q.device))[:2]
        more = {"scale": dim**-0.5, "skip": 3.0}
        found = triton_prefill.prefill(q, k, v, lists, kv, **more, skipped=counts[0])
        expected = reference.prefill(q, k, v, lists, kv, **more, skipped=counts[1], tile=tile)
        report(f"skip, heads of {dim}", dtype, error(found, expected))
        share = (counts[..., 0].sum(1) / counts[..., 1].sum(1)).tolist()
        print(f"  skipped {share[0]:.3f} of the tiles; the reference {share[1]:.3f}", flush=True)
        if not 0.05 < share[0] < 0.95 or abs(share[0] - share[1]) > 0.01:
            raise Wrong("skip: the kernel and the reference do not skip the same")


def check_estimates(full: bool) -> None:
    bf16 = torch.bfloat16
    plain, window = ([2000, 1037], [2000, 1037], None), ([700, 517], [1717, 700], 600)
    cases = [(bf16, 128, plain)]
    if full:
        cases += [(bf16, dim, plain) for dim in (64, 80, 256)]
        cases += [(bf16, 128, window), (torch.float16, 128, plain), (torch.float32, 64, plain)]
    for dtype, dim, (new, total, window) in cases:
        torch.manual_seed(0)
        q, k, _ = inputs(new, total, 6, 2, dim, dim, dtype)
        lengths = [torch.tensor(t, device=DEVICE) for t in (new, total)]
        grid = Grid(*lengths, q.shape[2], k.shape[2], 128, window)
        for pattern in CHECKED:
            name = f"{pattern.kind}, {str(dtype)[6:]} heads of {dim}, window {window}"
            asked = Need.of(q, k, k, block=grid.block, chooser=type(pattern))
            if why := triton_estimate.why_not(asked):
                print(f"- not served: {name}: {why}", flush=True)
                continue
            found = triton_estimate.lists(pattern, q, k, grid, dim**-0.5).mask()
            expected = pattern.lists(q, k, grid, dim**-0.5).mask()
            off = float((found != expected).sum() / expected.sum())
            print(f"- {off:.1e} of the pairs differ: {name}", flush=True)
            if off > 0.01 or not found.any():
                raise Wrong(f"{name}: the fused lists are not the plain ones")


# -- speed ---------------------------------------------------------------------------------------


class Table:
    """One Markdown table, printed row by row; nothing new begins after the time `until`."""

    HEAD = ("arm", "tokens", "density", "ms", "x sdpa", "TFLOP/s", "of dense", "MiB", "note")

    def __init__(self, until: float):
        self.until, self.failed = until, 0
        print("\n| " + " | ".join(self.HEAD) + " |\n|" + " --- |" * len(self.HEAD), flush=True)

    def row(
        self, arm, tokens, density=None, ms=None, x=None, rate=None, of=None, mib=None, note=""
    ) -> None:
        cells = zip((density, ms, x, rate, of, mib), ".3f .3f .2f .0f .2f .0f".split(), strict=True)
        shown = ("" if cell is None else format(cell, form) for cell, form in cells)
        print("| " + " | ".join([arm, f"{tokens:,}", *shown, note]) + " |", flush=True)

    def attempt(self, arm: str, tokens: int, part: Callable):
        """`part()`; None and a row that says why where it fails or there is no time."""
        if time.perf_counter() > self.until:
            self.row(arm, tokens, note="not run: out of time")
            return None
        try:
            return part()
        except Exception as error:
            self.failed += 1
            self.row(arm, tokens, note=why(error))
        with suppress(RuntimeError):  # what the failed part held
            torch.cuda.empty_cache()
        return None


def why(error: Exception) -> str:
    """An error in one line that fits into a table."""
    said = " ".join(str(error).replace("|", "/").split())
    return f"{type(error).__name__}: {said[:200]}"


def median(run: Callable, least: int) -> float:
    """Milliseconds of a call with an empty L2 cache: of 100 calls, or of as many as take 200 ms."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    run()

    def timed(calls: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(end) for start, end in events)

    calls = int(min(100, max(least, 200 / timed(1)[0])))
    if calls > least:  # short calls: let the clocks rise
        timed(calls // 4)
    return timed(calls)[calls // 2]


def shaped(L: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    heads = (H, HKV, HKV)
    return tuple(torch.randn(1, L, n, D, device=DEVICE, dtype=DTYPE).transpose(1, 2) for n in heads)


def plain_grid(L: int) -> Grid:
    return replace(Grid.causal(1, L, 128, DEVICE), padded=False, past=False)


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
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return min(took) * 1e3


def seconds(run: Callable) -> tuple[Tensor, float]:
    """A call's result, and how long it took with all it waits for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = run()
    torch.cuda.synchronize()
    return out, time.perf_counter() - start


def dense(q, k, v) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)


@dataclass
class Layer:
    """One layer at one length: its inputs, its arms, and what its rows are compared with."""

    table: Table
    L: int
    arms: dict[str, peers.Flex | peers.ModelOpt | None]  # peers by name, None for our own kernels
    grid: Grid
    q: Tensor
    k: Tensor
    v: Tensor
    sdpa: float | None = None  # ms
    rate: float | None = None  # TFLOP/s of dense flash-attn-4

    @property
    def rows(self) -> Tensor:
        """Queries whose results are compared with float32."""
        return torch.linspace(0, self.L - 1, min(64, self.L), device=DEVICE).long()

    def expected(self, lists: BlockLists) -> Tensor:
        """[1, H, rows, D]: float32 attention, one kv head after the other to save memory."""
        mask, group, found = lists.mask(self.rows), H // HKV, []
        for h in range(0, H, group):
            heads = slice(h, h + group)
            q, kv = self.q[:, heads, self.rows], KV[heads].to(DEVICE)
            found.append(truth(q, self.k, self.v, mask[:, heads], kv, SCALE))
        return torch.cat(found, 1)

    def measure(self, run, wanted=None, other=None) -> tuple[float, float]:
        """ms of a call whose result is right, and the seconds that the first took.

        wanted: the float32 results of `rows`; other: all results of another arm.
        """
        found, took = seconds(run)
        off = [] if wanted is None else [error(found[:, :, self.rows], wanted)]
        off += [] if other is None else [error(found, other)]
        found = None
        if not all(one <= TOLERANCE[DTYPE] for one in off):
            raise Wrong(f"error {', '.join(f'{one:.1e}' for one in off)}: not timed")
        return median(run, 5 if self.L <= LONG else 3), took

    def show(self, name, run, ms, density=None, flops=None, notes=()) -> None:
        """The row of a call that takes `ms`; notes: texts, or functions of the ms."""
        said = [note if isinstance(note, str) else note(ms) for note in notes]
        said += [f"host {host(run):.2f} ms"] if flops and ms < 20 else []
        rate = flops / ms * 1e3 if flops else None
        x = self.sdpa / ms if self.sdpa and flops else None
        of = rate / self.rate if self.rate and flops else None
        self.table.row(name, self.L, density, ms, x, rate, of, extra(run), ", ".join(said))

    def time(
        self, name, run, density=None, flops=None, wanted=None, other=None, notes=(), first=False
    ) -> float | None:
        """`measure` and `show`: the ms, None where it fails; first: show the first call too."""

        def part() -> float:
            ms, took = self.measure(run, wanted, other)
            say = [*notes, f"first call {took:.1f} s"] if first else notes
            self.show(name, run, ms, density, flops, say)
            return ms

        return self.table.attempt(name, self.L, part)

    def float32(self, name: str, lists: BlockLists) -> Tensor | None:
        """`expected`; where that fails, rows are only compared with each other."""
        return self.table.attempt(f"float32, {name}", self.L, lambda: self.expected(lists))

    def baselines(self) -> None:
        """Dense attention: torch's and flash-attn-4's; sets what other rows are compared with."""
        q, k, v = self.q, self.k, self.v
        wanted = self.float32("dense", BlockLists.of(self.grid, H))
        flops = 4 * D * H * self.L**2 / 2 / 1e12
        runs = {"sdpa, its own choice": lambda: dense(q, k, v)}
        if "fa4" in self.arms:
            runs["fa4, dense"] = lambda: fa4.dense(q, k, v, SCALE)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

            def only(backend=backend):
                with sdpa_kernel([backend]):
                    return dense(q, k, v)

            if self.L <= LONG:
                runs[f"sdpa {backend.name.lower().removesuffix('_attention')}"] = only
        found = {}
        for name, run in runs.items():
            got = self.table.attempt(name, self.L, lambda run=run: self.measure(run, wanted))
            found |= {name: got[0]} if got else {}
        self.sdpa = found.get("sdpa, its own choice")
        if ms := found.get("fa4, dense"):
            self.rate = flops / ms * 1e3
        for name, ms in found.items():
            row = (name, runs[name], ms, 1.0, flops)
            self.table.attempt(name, self.L, lambda row=row: self.show(*row))

    def over(self, what: str, lists: BlockLists, arms=("fa4", "triton"), tail="") -> dict:
        """Every arm of these over the same lists: the ms of each that is right."""
        wanted, other = self.float32(what, lists), None
        (density, flops), found = work(lists), {}
        for arm in (arm for arm in arms if arm in self.arms):
            run = self.call(arm, lists)
            name = f"{'ours' if arm == 'triton' else arm}, {what}{tail}"
            more = (density, flops, wanted, other)
            found[arm] = self.time(name, run, *more, first=arm == "flex")
            if other is None and found[arm]:
                other = run()
        return found

    def call(self, arm: str, lists: BlockLists, **more) -> Callable:
        """A call of one arm over lists."""
        q, k, v = self.q, self.k, self.v
        if arm == "flex":
            return self.arms[arm].bind(q, k, v, lists, SCALE)
        kernel, heads = (fa4, KV) if arm == "fa4" else (triton_prefill, KV.to(DEVICE))
        return lambda: kernel.prefill(q, k, v, lists, heads, scale=SCALE, **more)


def timings(table: Table, L: int, arms: dict, once: bool, tiles: bool) -> None:
    """All rows of one length; `once`: also those that one length is enough for."""
    layer = Layer(table, L, arms, plain_grid(L), *shaped(L))
    layer.baselines()
    densities = DENSITIES if L <= LONG else DENSITIES[-2:]
    spent = None
    for density in densities:

        def part(density=density):
            keep = None if density == 1 else random_keep(layer.grid, H, density)
            lists = BlockLists.of(layer.grid, H, keep)
            found = layer.over(f"density {density}", lists, ("fa4", "triton", "flex"))
            if once:
                variants(layer, density, lists, tiles)
            own = [(ms, arm) for arm, ms in found.items() if ms and arm != "flex"]
            return min(own, default=None)

        fastest = table.attempt(f"density {density}", L, part)
        spent = fastest if density == 0.1 else spent
        torch.cuda.empty_cache()
    if L <= LONG:
        table.attempt("heads of two kinds", L, lambda: mixed(layer))
        table.attempt("columns", L, lambda: columns(layer))
    if "triton" in arms:
        choices(layer, spent)
    if "modelopt" in arms and L <= LONG:  # its autotuner takes minutes above
        for density in densities[1:]:
            table.attempt(f"modelopt, {density}", L, lambda d=density: beside_modelopt(layer, d))
        run = arms["modelopt"].bind(layer.q, layer.k, layer.v, SCALE, skip=False)
        lists = BlockLists.of(layer.grid, H)
        layer.time("modelopt, no skipping", run, *work(lists), layer.float32("dense", lists))
    if once and "fa4" in arms:
        table.attempt("fa4, first calls", L, lambda: first_fa4(table, L))
    if once and "triton" in arms:
        table.attempt("first calls", L, lambda: first_calls(table, L))


def variants(layer: Layer, density: float, lists: BlockLists, tiles: bool) -> None:
    """What else the kernels can be asked for over the same lists."""
    kept = work(lists)
    if density == 0.1 and "fa4" in layer.arms:
        padded = replace(lists, grid=replace(layer.grid, padded=True))
        layer.time("fa4, density 0.1, as if padded", layer.call("fa4", padded), *kept)
    if "triton" in layer.arms and density == 1:
        for name, skip in (("nothing skipped", 1e9), ("all but one skipped", -1e9)):
            note = "the test's cost" if skip > 0 else "what is left: q · k"
            run = layer.call("triton", lists, skip=skip)
            layer.time(f"ours, skip on, {name}", run, *kept, notes=[note])
    if "triton" in layer.arms and tiles and density in (1.0, 0.1):
        every_tile(layer, lists)


def mixed(layer: Layer) -> None:
    """Half the heads streaming, half sparse, in one call."""
    half = [BlockLists.of(layer.grid, H // 2, band=Band(64, 1024))]
    half.append(BlockLists.of(layer.grid, H // 2, random_keep(layer.grid, H // 2, 0.25)))
    layer.over(f"{H // 2} heads streaming, {H // 2} at 0.25", BlockLists.cat(half))


def columns(layer: Layer) -> None:
    """A band of blocks and single columns, as vertical_slash chooses them."""
    grid, count = layer.grid, min(1000, layer.L // 8)
    found = torch.rand(1, H, layer.L, device=DEVICE).topk(count).indices.sort(-1).values
    near = torch.arange(grid.nq, device=DEVICE)
    near = (near[:, None] - near < 32).expand(1, H, -1, -1)
    lists = BlockLists.of(grid, H, near, columns=found)
    layer.over(f"32 blocks of diagonals, {count:,} columns", lists)
    if "fa4" in layer.arms:
        gather = "fa4, of it: tables, columns gathered"
        layer.time(gather, lambda: fa4.prepare(layer.k, layer.v, lists, H // HKV))


def choices(layer: Layer, spent: tuple[float, str] | None) -> None:
    """Choosing the blocks; its share of a layer whose attention is the faster of our kernels."""

    def share(ms: float) -> str:
        if spent is None:
            return ""
        return f"{ms / (ms + spent[0]):.3f} of a layer at density 0.1 by {spent[1]}"

    for pattern in PATTERNS:

        def choose(pattern=pattern):
            return triton_estimate.lists(pattern, layer.q, layer.k, layer.grid, SCALE)

        name = f"choice by {pattern.kind}"
        found = layer.table.attempt(name, layer.L, lambda choose=choose: work(choose()))
        if found:
            layer.time(name, choose, found[0], notes=[share])


def beside_modelopt(layer: Layer, share: float) -> None:
    """Skip-softmax on inputs that let it skip, and our kernels over the blocks it keeps."""
    peer = layer.arms["modelopt"]
    q, k, chosen = peers.peaked(layer.q, layer.k, share, layer.grid.block)
    same = replace(layer, q=q, k=k)
    keep = chosen.repeat_interleave(H // HKV, 0)[None, :, None].expand(-1, -1, layer.grid.nq, -1)
    lists = BlockLists.of(layer.grid, H, keep)
    run = peer.bind(q, k, layer.v, SCALE)

    def tiles(_ms: float) -> str:
        return "reads {:.3f} of its {}x{} tiles".format(peer.read(run), *peer.tile())

    wanted, what = same.float32("the same blocks", lists), f"density {share}"
    same.time(f"modelopt, {what}", run, *work(lists), wanted, notes=[tiles], first=True)
    same.over(what, lists, tail=", the same blocks")


def first_fa4(table: Table, L: int) -> None:
    """What flash-attn-4's first call at a new length costs above the second, and compiles."""
    odd = L * 3 // 4 - 77
    q, k, v = shaped(odd)
    grid = plain_grid(odd)
    keep = random_keep(grid, H, 0.1)
    count = min(1000, L // 8)
    columns = torch.rand(1, H, odd, device=DEVICE).topk(count).indices.sort(-1).values
    for name, found in (("no columns", None), (f"{count:,} columns", columns)):
        lists = BlockLists.of(grid, H, keep, columns=found)
        before = fa4.compiled()

        def run(lists=lists):
            return fa4.prefill(q, k, v, lists, KV, scale=SCALE)

        took = [seconds(run)[1] * 1e3 for _ in range(3)]
        note = f"then {took[1]:.1f}, {took[2]:.1f} ms; {fa4.compiled() - before} kernels compiled"
        table.row(f"fa4, first call at a new length, {name}", odd, ms=took[0], note=note)


def first_calls(table: Table, L: int) -> None:
    """What the first call at a length never seen costs above the second, and what it compiled."""
    odd = L * 3 // 4 - 77
    q, k, v = shaped(odd)
    grid, kv = Grid.causal(1, odd, 128, DEVICE), KV.to(DEVICE)
    jitted = [
        f
        for module in (triton_prefill, triton_estimate, triton_estimate.triton_select)
        for f in vars(module).values()
        if isinstance(f, triton.runtime.JITFunction)
    ]

    def compiled() -> int:
        return sum(len(caches[0]) for f in jitted for caches in f.device_caches.values())

    for pattern in PATTERNS:
        before = compiled()

        def run(pattern=pattern):
            lists = triton_estimate.lists(pattern, q, k, grid, SCALE)
            return triton_prefill.prefill(q, k, v, lists, kv, scale=SCALE)

        took = [seconds(run)[1] * 1e3 for _ in range(3)]
        note = f"then {took[1]:.1f}, {took[2]:.1f} ms; {compiled() - before} kernels compiled"
        table.row(f"first call at a new length, {pattern.kind}", odd, ms=took[0], note=note)


def every_tile(layer: Layer, lists: BlockLists) -> None:
    """Time other tiles (queries, keys, warps, stages) than the kernel's own choice."""
    own = triton_prefill.TILES, triton_prefill.STAGES
    for *tile, stages in TILES:
        triton_prefill.TILES, triton_prefill.STAGES = (tuple(tile),), stages
        triton_prefill.tile_of.cache_clear()
        name = f"… {tile[0]}x{tile[1]} w{tile[2]} s{stages}"
        layer.time(name, layer.call("triton", lists), *work(lists))
    triton_prefill.TILES, triton_prefill.STAGES = own
    triton_prefill.tile_of.cache_clear()


# -- the run -------------------------------------------------------------------------------------


def ready(name: str, modelopt: str | None) -> peers.Flex | peers.ModelOpt | None:
    """An arm's peer, if it is one; an error says why the arm can't run."""
    if name == "fa4":
        need = Need(torch.device(DEVICE), DTYPE, D, D, lists=True)
        if reason := fa4.why_not(need):
            raise ImportError(reason)
    if name == "flex":
        return peers.Flex()
    return peers.ModelOpt(modelopt) if name == "modelopt" else None


def checked(name: str, full: bool) -> None:
    """Check one of our own kernels on small shapes; peers are checked at the lengths timed."""
    if name == "triton":
        check(full)
    if name == "fa4":
        check_fa4(full)
        print(f"fa4 compiled {fa4.compiled()} kernels", flush=True)


def versions(arms: dict) -> str:
    """What ran: the device, and every library that had an arm."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    line = f"{device}; torch {torch.__version__}, Triton {triton.__version__}, {cuda}"
    with suppress(PackageNotFoundError):
        line += f", flash-attn-4 {version('flash-attn-4')}" if "fa4" in arms else ""
    if "modelopt" in arms:
        line += f", nvidia-modelopt {arms['modelopt'].version}"
    return line


def main() -> None:
    known = ("triton", "fa4", "flex", "modelopt")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,32768,131072,262144")
    parser.add_argument("--arms", default=",".join(known))
    parser.add_argument("--modelopt", help="a wheel or folder of nvidia-modelopt, not installed")
    parser.add_argument("--seconds", type=float, default=480, help="begin no row later than this")
    parser.add_argument("--only-check", action="store_true", help="every form, and no timings")
    parser.add_argument("--tiles", action="store_true", help="time other tiles too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a CUDA device, and torch sees none: `hfsparse doctor` says why")
    names = args.arms.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"no arms {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    torch.set_grad_enabled(False)
    start, failed, arms = time.perf_counter(), 0, {}
    for name in names:
        try:
            arms[name] = ready(name, args.modelopt)
        except Exception as error:
            print(f"{name} is left out: {why(error)}", flush=True)
    print(versions(arms), flush=True)
    for name in list(arms):
        try:
            checked(name, args.only_check)
        except Exception as error:
            failed += 1
            print(f"{name} is left out: {why(error)}", flush=True)
            del arms[name]
    print(f"\nchecked in {time.perf_counter() - start:.0f} s", flush=True)
    if not args.only_check:
        table = Table(start + args.seconds)
        lengths = [int(length) for length in args.lengths.split(",")]
        for L in lengths:
            once = (ONCE if ONCE in lengths else lengths[0]) == L
            table.attempt(
                "all", L, lambda L=L, once=once: timings(table, L, arms, once, args.tiles)
            )
            torch.cuda.empty_cache()
        failed += table.failed
    print(f"\n{time.perf_counter() - start:.0f} s in all, {failed} failed", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
