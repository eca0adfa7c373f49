"""Time to the first token, dense and under a plan, side by side on the user's own device.

hfsparse bench MODEL --plan plan.yaml [--write]      hfsparse bench --shape llama-3.1-8b
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hfsparse.errors import UsageError
from hfsparse.kernels import Kernel
from hfsparse.models.layers import layer_shapes, text_config
from hfsparse.patcher import patch
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.runtime import call
from hfsparse.selectors import SELECTORS

SHAPES = {  # true shapes; the weights are random
    "llama-3.1-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=1 << 21,
        rope_theta=500000.0,
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=100,
        max_position_embeddings=1 << 21,
    ),
}
PAYS = 0.97  # a length pays from this share of the dense time on


@dataclass(frozen=True)
class Row:
    """One prompt length. Seconds are medians; GiB are peaks above nothing, weights included."""

    tokens: int
    dense_s: float
    sparse_s: float
    choose_s: float  # of the sparse seconds: choosing blocks
    attend_s: float  # attention itself
    pair_density: float
    dense_gib: float
    sparse_gib: float


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of this shape with random weights, made on the device."""
    if shape not in SHAPES:
        raise UsageError(f"no shape {shape}: there is {', '.join(SHAPES)}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval()
    finally:
        torch.set_default_dtype(before)


def stand_in(model: PreTrainedModel) -> Plan:
    """A plan for random weights: half the kv heads are rings, the rest choose columns or blocks.

    Layers that may not be sparse stay full, and those that share keys.
    """
    this = ModelId.of(model)
    patterns = {
        "stream": PATTERNS["streaming"](sink=64, recent=1024),
        "vs": PATTERNS["vertical_slash"](columns=1000, diagonals=1024),
        "blocks": PATTERNS["block_topk"](share=0.1, min_blocks=16),
        "quest": SELECTORS["quest"](share=0.06, min_pages=16),
    }
    group = this.q_heads // this.kv_heads
    rings = [g % 2 == 0 for g in range(this.kv_heads)]
    prefill = [
        "stream" if rings[h // group] else ("vs", "blocks")[h % 2] for h in range(this.q_heads)
    ]
    words = Layer(
        tuple(prefill),
        tuple("stream" if ring else "full" for ring in rings),
        tuple("ring" if ring else "quest" for ring in rings),
    )
    pairs = zip(layer_shapes(model), Plan.full(this).layers, strict=True)
    layers = tuple(words if shape.alone else full for shape, full in pairs)
    return Plan(this, patterns, layers, Below())


def bench(model: PreTrainedModel, plan: Plan, lengths: list[int], repeat: int = 3) -> Iterator[Row]:
    """Rows, as they are measured. Dense is the model as it is; both fill a cache."""
    for tokens in sorted(lengths):
        ids = torch.randint(0, text_config(model).vocab_size, (1, tokens), device=model.device)
        times: dict[str, list[float]] = {"dense": [], "sparse": []}
        peaks, clock = {}, Clock(model.device)
        for turn in range(repeat + 2):  # the first one warms up, the last one is looked into
            looked = clock if turn > repeat else contextlib.nullcontext()
            seconds, peaks["dense"] = first_token(model, ids)
            times["dense"].append(seconds)
            with patch(model, plan) as handle, looked:
                seconds, peaks["sparse"] = first_token(model, ids)
                times["sparse"].append(seconds)
                density = handle.stats().pair_density
        yield Row(
            tokens,
            *(statistics.median(times[arm][1:-1]) for arm in ("dense", "sparse")),
            *(clock.seconds("choose"), clock.seconds("attend")),
            density,
            *(peaks[arm] / 2**30 for arm in ("dense", "sparse")),
        )


def pays_from(rows: list[Row]) -> int | None:
    """The shortest length from which on sparse was always faster; None: it never was."""
    found = None
    for row in reversed(rows):
        if row.sparse_s > PAYS * row.dense_s:
            break
        found = row.tokens
    return found


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = "tokens | dense s | sparse s | x | choosing s | attention s | pair density | GiB dense"
    lines = [f"| {head} | GiB sparse |", "| ---: " * 9 + "|"]
    for row in rows:
        lines.append(
            f"| {row.tokens:,} | {row.dense_s:.3f} | {row.sparse_s:.3f} "
            f"| {row.dense_s / row.sparse_s:.2f} | {row.choose_s:.3f} | {row.attend_s:.3f} "
            f"| {row.pair_density:.3f} | {row.dense_gib:.2f} | {row.sparse_gib:.2f} |"
        )
    return "\n".join(lines)


def with_measurements(plan: Plan, rows: list[Row], device: str) -> Plan:
    """The plan with these rows, and the prompt length that pays, under `measured`."""
    rounded = [{k: round(x, 4) for k, x in dataclasses.asdict(row).items()} for row in rows]
    entry: dict = {"prefill": rounded}
    if (tokens := pays_from(rows)) is not None:
        entry["below"] = {"prefill": tokens}
    return dataclasses.replace(plan, measured={**plan.measured, device: entry})


def first_token(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, int]:
    """Seconds to the first token's logits, and peak bytes (0 where the device doesn't tell)."""
    return timed(model.device, lambda: model(ids, use_cache=True, logits_to_keep=1))


@torch.inference_mode()
def timed(device: torch.device, run: Callable) -> tuple[float, int]:
    """Seconds that `run()` takes, and peak bytes."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else 0


class Clock:
    """Device time spent in choosing blocks and in prefill kernels, while entered."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.kernels: list[str] = []  # names of those that ran, in order
        self.marks: dict[str, list[tuple]] = {"choose": [], "attend": []}

    def __enter__(self) -> None:
        before = call.tables()
        timed = {"prefill": self._timed("attend", before.prefill)}
        timed["estimate"] = self._timed("choose", before.estimate)
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(call.use_tables(before._replace(**timed)))

    def __exit__(self, *error) -> None:
        self.stack.close()

    def _timed(self, what: str, table: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
        """The same rows, which note when they run."""

        def run(row: Kernel, *args, **more):
            if what == "attend" and row.name not in self.kernels:
                self.kernels.append(row.name)
            start = self._now()
            result = row.run(*args, **more)
            self.marks[what].append((start, self._now()))
            return result

        return tuple(dataclasses.replace(row, run=partial(run, row)) for row in table)

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, what: str) -> float:
        if not self.cuda:
            return sum(end - start for start, end in self.marks[what])
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.marks[what]) / 1000
