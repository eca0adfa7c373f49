"""Claim: prefill over block lists costs what its density says; beside its peers, on one GPU.

    python -m benchmarks.prefill [--lengths 8192,32768,131072,262144]
                                 [--arms triton,fa4,flex,modelopt] [--modelopt WHEEL]
                                 [--seconds 480] [--no-tests]

First tests/gpu checks the kernels and the choice of blocks against their references, on small
shapes; nothing is timed where a test fails (`--no-tests` leaves them out). Then one layer of the
shape of Llama-3.1-8B (32 q heads, 8 kv heads, head dim 128, bf16, batch 1, causal, random inputs)
is timed: medians, all arms in one run, each only after its result at that length agrees with
float32 in some rows, and over lists with another arm's in all. An arm that is wrong or fails is
left out: a line says why, the run goes on, and the exit status is 1.

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
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import peers
from hfsparse.kernels import Need, fa4
from hfsparse.kernels.triton import estimate as triton_estimate
from hfsparse.kernels.triton import prefill as triton_prefill
from hfsparse.lists import Band, BlockLists, Grid
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.energy import Energy
from hfsparse.patterns.flexprefill import FlexPrefill
from hfsparse.patterns.hip import HiP
from hfsparse.patterns.sample import Sample
from hfsparse.patterns.sparge import Sparge
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
    Energy(),
    Sparge(),
    FlexPrefill(),
    Sample(),
    HiP(),
)
TESTS = ("tests/gpu/test_prefill.py", "tests/gpu/test_estimate.py")
TOLERANCE = 6e-3  # relative, of bfloat16


class Wrong(Exception):
    """A result that is not attention."""


# -- what is right -------------------------------------------------------------------------------


def truth(q, k, v, mask, kv, scale) -> Tensor:
    """Float32 attention over the keys that `mask` [B, H, Q, S] keeps."""
    k, v = (t[:, kv].float() for t in (k, v))
    logits = (q.float() @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, 3) @ v


def error(a: Tensor, b: Tensor) -> float:
    """Relative; head by head, so that long results need little memory."""
    off = whole = 0.0
    for x, y in zip(a.unbind(1), b.unbind(1), strict=True):
        off += float((x.double() - y.double()).square().sum())
        whole += float(y.double().square().sum())
    return (off / whole) ** 0.5


def random_keep(grid: Grid, heads: int, density: float) -> Tensor:
    """bool [1, heads, nq, nk]: the first block, the diagonal and others up to a density."""
    i, j = (torch.arange(n, device=DEVICE) for n in (grid.nq, grid.nk))
    i = i[:, None] + (grid.nk - grid.nq)
    forced = (j == 0) | (j == i)
    free = ((j < i) & (j > 0)).sum()
    wanted = density * (j <= i).sum() - (forced & (j <= i)).sum()
    keep = torch.rand(1, heads, grid.nq, grid.nk, device=DEVICE) < wanted / free.clamp(min=1)
    return keep | forced


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
        if not all(one <= TOLERANCE for one in off):
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


def timings(table: Table, L: int, arms: dict, once: bool) -> None:
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
                variants(layer, density, lists)
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


def variants(layer: Layer, density: float, lists: BlockLists) -> None:
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
        for module in (triton_prefill, *triton_estimate.PARTS)
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


def test() -> None:
    """Run the kernels' own tests; the script ends where one fails."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    if subprocess.run(command, cwd=root).returncode:
        sys.exit("the kernels' tests fail: nothing is timed")


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
    parser.add_argument("--no-tests", action="store_true", help="time without testing first")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a CUDA device, and torch sees none: `hfsparse doctor` says why")
    names = args.arms.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"no arms {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    torch.set_grad_enabled(False)
    start, arms = time.perf_counter(), {}
    for name in names:
        try:
            arms[name] = ready(name, args.modelopt)
        except Exception as error:
            print(f"{name} is left out: {why(error)}", flush=True)
    print(versions(arms), flush=True)
    if not args.no_tests:
        test()
        print(f"\ntested in {time.perf_counter() - start:.0f} s", flush=True)
    table = Table(start + args.seconds)
    lengths = [int(length) for length in args.lengths.split(",")]
    for L in lengths:
        once = (ONCE if ONCE in lengths else lengths[0]) == L
        table.attempt("all", L, lambda L=L, once=once: timings(table, L, arms, once))
        torch.cuda.empty_cache()
    print(f"\n{time.perf_counter() - start:.0f} s in all, {table.failed} failed", flush=True)
    sys.exit(table.failed > 0)


if __name__ == "__main__":
    main()
