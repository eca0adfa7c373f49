"""Claim: under a plan the first token comes sooner, by what the plan's block density says.

    python -m benchmarks.ttft [--lengths 1024,…,131072] [--only full|sparse] [--shape llama-3.1-8b]
                              [--repeat N] [--chunk TOKENS] [--seconds 480]

Random weights, bf16 (float32 on a CPU), one prompt. `dense` is the unpatched model (sdpa). Up to
8,192 tokens the plan drops nothing; beyond, two plans of one block density stand side by side:
every q head block_topk, and `mixed` (in each group half block_topk, a quarter vertical_slash, a
quarter streaming). Each runs with the kernel table as it is, and without FA4. All arms of a length
take turns: a first call, one that is looked into (which kernels, their seconds), then the timed
ones, of which medians are shown. A row is printed when its length is done. `first call`: its time
above the median; kernels were warmed up at other lengths.
"""

from __future__ import annotations

import os

# Dense at 262,144 tokens nearly fills 80 GB. Asked for before torch starts.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import argparse
import contextlib
import inspect
import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

import hfsparse
from benchmarks.common.shapes import describe, tidy, why_not_fa4
from hfsparse import bench, kernels
from hfsparse.lists import Band, Grid, default_block
from hfsparse.models.names import CACHES
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.runtime.call import use_tables

LENGTHS = (1024, 2048, 4096, 8192, 32768, 131072)
SHORT = 8192  # up to here the plan drops nothing
FULL_TARGET = 0.99
TARGETS = {  # by tokens and block density: with FA4, without
    (32768, 0.25): (1.28, 1.22),
    (32768, 0.10): (1.40, None),
    (131072, 0.10): (2.65, 2.20),
    (131072, 0.05): (2.85, None),
    (262144, 0.05): (4.70, None),
}
OTHER = (0.25, 0.10)  # densities at other lengths
MOST_MEMORY, MEMORY_AT = 1.03, 131072
FIRST_CALL = 50  # ms
WARM = (("full", 640), ("full", 10240), ("sparse", 10240))
PIECE = 8192  # of a dense prompt that does not fit as a whole


# -- plans ---------------------------------------------------------------------------------------


def topk_share(density: float, blocks: int) -> float:
    """The share of block_topk that comes to a block density, over a prompt of so many blocks."""
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        kept = (max(math.ceil(n * share - 1e-6), min(n, 2)) for n in range(1, blocks + 1))
        low, high = (
            (low, share) if 2 * sum(kept) > density * blocks * (blocks + 1) else (share, high)
        )
    return max(low, 1e-4)


def band_density(band: Band, tokens: int, block: int) -> float:
    grid = Grid.causal(1, tokens, block)
    return float(grid.reach(band)[0].sum() / grid.reach()[0].sum())


def scattered(density: float, columns: int, tokens: int, block: int) -> int:
    """Diagonals that come to a block density beside `columns`, if attention prefers none.

    The nearest 100 are always kept: two blocks a row. Each other one lies in two block diagonals
    of any distance.
    """
    n = tokens / block
    left = (1 - density) / (1 - 4 / n) / (1 - columns / tokens)
    return 100 + max(0, round(math.log(min(left, 1)) / math.log(1 - 2 / n)))


def topk_plan(model: PreTrainedModel, tokens: int, density: float) -> Plan:
    block = default_block(tokens, model.device)
    share = topk_share(density, -(-tokens // block))
    return planned(model, ["blocks"], blocks=PATTERNS["block_topk"](share=share, min_blocks=1))


def mixed_plan(model: PreTrainedModel, tokens: int, density: float) -> Plan:
    """Short windows, vertical_slash at the density, and block_topk at what is left of it."""
    block = default_block(tokens, model.device)
    stream = PATTERNS["streaming"](sink=min(64, tokens // 64), recent=min(1024, tokens // 32))
    columns = min(1000, int(tokens * density / 4))
    slash = PATTERNS["vertical_slash"](columns, scattered(density, columns, tokens, block))
    rest = (4 * density - density - band_density(stream.band, tokens, block)) / 2
    blocks = PATTERNS["block_topk"](share=topk_share(rest, -(-tokens // block)), min_blocks=1)
    words = ["blocks", "slash", "blocks", "stream"]
    return planned(model, words, blocks=blocks, slash=slash, stream=stream)


PLANS = {"block_topk": topk_plan, "mixed": mixed_plan}


def planned(model: PreTrainedModel, words: list[str], **patterns) -> Plan:
    """Every layer: q heads by `words`, over and over; nothing is dropped from the cache."""
    this = ModelId.of(model)
    full = ("full",) * this.kv_heads
    prefill = tuple(words[h % len(words)] for h in range(this.q_heads))
    return Plan(this, patterns, (Layer(prefill, full, full),) * this.layers, Below())


# -- measuring -----------------------------------------------------------------------------------


@dataclass
class Arm:
    """One way to run the prompt, and what was measured of it."""

    name: str
    plan: Plan | None  # None: the model as it is
    table: tuple[kernels.Kernel, ...]
    target: float | None = None
    piece: int | None = None
    spare: int | None = None  # a piece to try where the whole prompt does not fit
    first: float | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    clock: bench.Clock | None = None
    density: float = math.nan
    failed: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds and not self.failed else None

    def turn(self, model: PreTrainedModel, ids: torch.Tensor, turn: int) -> None:
        """Turn 0 is a first call, turn 1 is looked into, later ones are timed."""
        if self.failed:
            return
        done = attempt(lambda: self.run(model, ids, turn))
        if done == OUT_OF_MEMORY and self.piece is None and self.spare is not None:
            self.piece = self.spare
            done = attempt(lambda: self.run(model, ids, turn))
        if isinstance(done, str):
            self.failed = done
            return
        seconds, self.peak = done
        if turn == 0:
            self.first = seconds
        elif turn > 1:
            self.seconds.append(seconds)

    def run(self, model: PreTrainedModel, ids: torch.Tensor, turn: int) -> tuple[float, int]:
        if self.plan is None:
            return read(model, ids, self.piece)
        with contextlib.ExitStack() as stack:
            stack.enter_context(use_tables(kernels.Tables(prefill=self.table)))
            handle = stack.enter_context(hfsparse.patch(model, self.plan))
            if turn == 1:
                self.clock = bench.Clock(model.device)
                stack.enter_context(self.clock)
            done = read(model, ids, self.piece)
            self.density = handle.stats().block_density
            return done


def read(model: PreTrainedModel, ids: torch.Tensor, piece: int | None) -> tuple[float, int]:
    """Seconds to the first token and peak bytes, the prompt read whole or in pieces."""
    if piece is None or piece >= ids.shape[1]:
        return bench.first_token(model, ids)

    def in_pieces() -> None:
        cache = DynamicCache()
        for part in ids.split(piece, 1):
            model(part, use_cache=True, logits_to_keep=1, **{cache_name(model): cache})

    return bench.timed(model.device, in_pieces)


def cache_name(model: PreTrainedModel) -> str:
    return next(name for name in CACHES if name in inspect.signature(model.forward).parameters)


OUT_OF_MEMORY = "out of memory"


def attempt(run: Callable):
    """What `run` gives, or in a few words why it gave nothing."""
    try:
        return run()
    except Exception as error:
        why = (
            str(error).strip().splitlines()[0][:60] if str(error).strip() else type(error).__name__
        )
        if OUT_OF_MEMORY in str(error).lower():
            why = OUT_OF_MEMORY
        else:
            traceback.print_exc()
    tidy()
    return why


def kind_of(tokens: int) -> str:
    return "full" if tokens <= SHORT else "sparse"


def arms_of(model: PreTrainedModel, tokens: int, args: argparse.Namespace) -> list[Arm]:
    """Dense, then ours."""
    whole, without = kernels.PREFILL, tuple(row for row in kernels.PREFILL if row.name != "FA4")
    served = why_not_fa4(model) is None
    tables = [(whole, 0), (without, 1)] if served else [(without, 1)]
    tables = tables[:1] if args.fastest else tables
    arms = [Arm("dense", None, whole, spare=PIECE)]
    if (args.only or kind_of(tokens)) == "full":
        return [*arms, Arm("full", Plan.full(ModelId.of(model)), whole, FULL_TARGET)]
    for density in [d for n, d in TARGETS if n == tokens] or OTHER:
        for name in args.plans.split(","):
            plan = PLANS[name](model, tokens, density)
            for table, column in tables:
                target = TARGETS.get((tokens, density), (None, None))[column]
                pieces = {"piece": args.chunk if tokens > 131072 else None, "spare": PIECE}
                arms.append(Arm(f"{name} {density:.2f}", plan, table, target, **pieces))
    return arms


def measure(model: PreTrainedModel, ids: torch.Tensor, arms: list[Arm], repeat: int, end: float):
    """Give every arm its turns; a run that lasts beyond `end` gets fewer of them."""
    for turn in range(repeat + 2):
        for arm in arms:
            dense = arm.plan is None
            if dense and (turn == 1 or (turn == 0 and repeat == 1)):
                continue  # nothing to look into; one call of the longest prompt is enough
            if dense and repeat == 1:
                tidy()
            arm.turn(model, ids, turn)
        if turn > 1 and time.perf_counter() > end:
            return


def warm_up(model: PreTrainedModel, kinds: set[str], args: argparse.Namespace) -> None:
    """Compile what there is to compile, at other lengths."""
    for kind, tokens in WARM:
        if kind not in kinds:
            continue
        for arm in arms_of(model, tokens, argparse.Namespace(**{**vars(args), "only": kind})):
            arm.turn(model, prompt(model, tokens), 0)
            if arm.failed:
                print(f"- warming up, {tokens:,} tokens, {arm.name}: {arm.failed}", flush=True)


def prompt(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    torch.manual_seed(tokens)
    return torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)


def host_ms(model: PreTrainedModel, ids: torch.Tensor, repeat: int) -> tuple[float, float]:
    """Milliseconds until `model(...)` returns, the GPU still at work: dense, and patched."""

    def once() -> float:
        wait()
        start = time.perf_counter()
        with torch.inference_mode():
            model(ids, use_cache=True, logits_to_keep=1)
        taken = time.perf_counter() - start
        wait()
        return taken * 1e3

    def wait() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    times: tuple[list, list] = [], []
    for _ in range(repeat):
        times[0].append(once())
        with hfsparse.patch(model):
            times[1].append(once())
    return statistics.median(times[0]), statistics.median(times[1])


# -- the table -----------------------------------------------------------------------------------

HEAD = (
    "tokens | plan | kernel | block density | TTFT s dense | TTFT s | x dense | target | choose s "
    "| attention s | GiB dense | GiB | first call ms"
)


def row(tokens: int, dense: Arm, arm: Arm) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None or math.isnan(value) else format(value, form)

    ratio = dense.median / arm.median if dense.median and arm.median else None
    met = "" if ratio is None else ", met" if ratio >= (arm.target or 0) else ", missed"
    first = None if arm.first is None or arm.median is None else (arm.first - arm.median) * 1e3
    clock = arm.clock
    names = " + ".join(clock.kernels) if clock and clock.kernels else named(arm)
    cells = (
        *(f"{tokens:,}", arm.name, names, number(arm.density, ".3f")),
        *(dense.failed or seconds(dense), arm.failed or seconds(arm), number(ratio, ".3f")),
        "" if arm.target is None else f"≥ {arm.target:.2f}{met}",
        *(number(clock.seconds(of), ".3f") if clock else "" for of in ("choose", "attend")),
        *("" if a.failed else number(a.peak / 2**30, ".2f") for a in (dense, arm)),
        number(first, ".0f"),
    )
    return "| " + " | ".join(cells) + " |"


def named(arm: Arm) -> str:
    """The arm's kernels, of one that never was looked into."""
    return "with FA4" if any(row.name == "FA4" for row in arm.table) else "without FA4"


def seconds(arm: Arm) -> str:
    if arm.median is None:
        return ""
    return f"{arm.median:.3f}" + (f" (pieces of {arm.piece:,})" if arm.piece else "")


def notes(tokens: int, arms: list[Arm], host: tuple[float, float] | None) -> list[str]:
    dense, *ours = arms
    found = []
    if host is not None:
        found.append(f"{tokens:,} tokens: host {host[0]:.1f} ms dense, {host[1]:.1f} ms patched")
    if dense.first is not None and dense.median:
        more = (dense.first - dense.median) * 1e3
        found.append(f"{tokens:,} tokens: dense, first call {more:.0f} ms above its median")
    if dense.piece:
        found.append(f"{tokens:,} tokens: dense in pieces, for which transformers builds masks")
    shares = [arm.peak / dense.peak for arm in ours if not arm.failed and dense.peak]
    if tokens == MEMORY_AT and shares and not dense.failed:
        met = "met" if max(shares) <= MOST_MEMORY else "missed"
        found.append(
            f"{tokens:,} tokens: peak {max(shares):.3f} of dense at most; target "
            f"{MOST_MEMORY:.2f}, {met}"
        )
    calls = [arm.first - arm.median for arm in ours if arm.median and arm.first is not None]
    if calls:
        met = "met" if max(calls) * 1e3 <= FIRST_CALL else "missed"
        found.append(
            f"{tokens:,} tokens: first call at most {max(calls) * 1e3:.0f} ms above the median; "
            f"target {FIRST_CALL}, {met}"
        )
    return found


def repeats(tokens: int) -> int:
    if tokens <= SHORT:
        return 9
    return 5 if tokens <= 32768 else 3 if tokens <= 131072 else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--only", choices=("full", "sparse"), help="one kind, at every length")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=tuple(bench.SHAPES))
    parser.add_argument("--repeat", type=int, help="timed calls (9 at short lengths, 1 at long)")
    parser.add_argument(
        "--chunk", type=int, help="read sparse prompts beyond 131,072 tokens in pieces of so many"
    )
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--fastest", action="store_true", help="FA4 alone where it serves")
    parser.add_argument("--seconds", type=float, default=480, help="then: fewer calls, no length")
    args = parser.parse_args()
    start = time.perf_counter()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model = bench.random_model(args.shape, device, torch.bfloat16 if cuda else torch.float32)
    lengths = sorted({int(n) for n in args.lengths.split(",")})
    warm_up(model, {args.only or kind_of(n) for n in lengths}, args)
    print(f"{describe(model, args.shape)}\n", flush=True)
    print(f"| {HEAD} |\n|" + " --- |" * (HEAD.count("|") + 1), flush=True)
    said = []
    for tokens in lengths:
        if time.perf_counter() - start > args.seconds:
            said.append(f"{tokens:,} tokens: left out, the time was up")
            continue
        ids, repeat = prompt(model, tokens), args.repeat or repeats(tokens)
        arms = arms_of(model, tokens, args)
        measure(model, ids, arms, repeat, start + args.seconds)
        for arm in arms[1:]:
            print(row(tokens, arms[0], arm), flush=True)
        host = None
        if arms[1].name == "full":
            host = attempt(lambda ids=ids, repeat=repeat: host_ms(model, ids, repeat))
        said += notes(tokens, arms, host if isinstance(host, tuple) else None)
        tidy()
    print("\n" + "\n".join(f"- {line}" for line in said))
    print(f"- {time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
