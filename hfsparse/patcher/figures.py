"""What a model holds and reads under a plan at one length, as `stats` says it, without a run.

    stats = predict(config, plan, tokens=32_768)
    print(stats.cache_share, stats.decode_share)

Nothing is a formula: the plan's own cache layers are filled on torch's meta device, which keeps
shapes and no data, and say what they hold; its decode step says what it reads. What prompts compute
depends on what is in them: it is known only where a profiler has looked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hfsparse.evictions import EVICTIONS
from hfsparse.lists.lengths import Lengths
from hfsparse.models.layers import LayerShape, layer_shapes
from hfsparse.patcher.resolve import resolve_layers
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.plan.files import DataFile
from hfsparse.plan.kept import Full
from hfsparse.runtime.cache.held import NOTHING
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.layer_plan import LayerPlan
from hfsparse.runtime.layout import lay_out, lay_out_chunks
from hfsparse.stats import LayerStats, Stats, Work

NARROW = LayerShape("full_attention", 1, 1, 1, 1)


@dataclass(frozen=True)
class Prompts:
    """What heads do in prompts of one length: shares of dense attention `[layers, q heads]`."""

    pairs: Sequence[np.ndarray]  # of each layer
    blocks: Sequence[np.ndarray]
    recall: np.ndarray | None = None  # attention that is kept, where it was measured


def predict(
    config: Any,
    plan: Plan,
    tokens: int,
    prompts: Prompts | None = None,
    device: torch.device | None = None,
    itemsize: int = 4,
) -> Stats:
    """Of a prompt of `tokens`, and of a decode step whose token makes a row as long.

    Without `prompts` the densities of pairs and blocks are unknown. Blocks are those of `device`.
    The model works in a type of `itemsize` bytes, of which what is kept beside keys, or in fewer
    bits, is another share.
    """
    layers = [LayerStats()] * plan.model.layers
    for own, layer in fill_caches(config, plan, tokens, itemsize=itemsize):
        works = {}
        if prompts is not None:
            pairs, blocks = _dense_work(own, tokens, device or torch.device("cpu"))
            works["pairs"] = _work(_row(prompts.pairs, own), pairs)
            works["blocks"] = _work(_row(prompts.blocks, own), blocks)
        layers[own.index] = _measure(own, layer, tokens, **works)
    return Stats(layers)


def one_head(
    tokens: int,
    pattern: Any = None,
    shape: LayerShape = NARROW,
    data: dict[str, DataFile] | None = None,
    itemsize: int = 2,
    full: Full | None = None,
) -> tuple[float, float]:
    """Shares of a row of `tokens` that one kv head keeps, in bytes, and that a step reads.

    pattern: a streaming one, for a ring; an eviction, for what it keeps; a selector, for chosen
    pages; None, for a full head. Of a selector that reads a table it is the first head of the first
    layer. `shape`: the layer's, of which one head is priced. Keys and values take `itemsize` bytes
    a number; `full` says of those of a full cache if they are in fewer bits.
    """
    decode = "full" if pattern is None else "it"
    words = Layer(("full",), ("full" if full is None else "packed",), (decode,))
    if isinstance(pattern, Streaming):
        words = Layer(("it",), ("it",), ("ring",))
    if type(pattern) in EVICTIONS.values():
        words = Layer(("full",), ("it",), ("kept",))
    this = ModelId("one", 1, 1, 1, shape.head_dim, "head")
    plan = Plan(this, {"it": pattern, "packed": full}, (words,), data=data or {})
    shapes = [replace(shape, q_heads=1, kv_heads=1)]
    stats = Stats([_measure(*each, tokens) for each in _fill(plan, shapes, tokens, 1, itemsize)])
    return stats.cache_share, stats.decode_share


def fill_caches(
    config: Any, plan: Plan, tokens: int, batch: int = 1, itemsize: int = 4
) -> Iterator[tuple[LayerPlan, CacheLayer | None]]:
    """Each layer that has attention, and its cache after prompts of `tokens`, without data.

    None where it reads another's. Keys and values take `itemsize` bytes a number, and two where
    weights are smaller.
    """
    return _fill(plan, layer_shapes(config), tokens, batch, itemsize)


def type_of(itemsize: int) -> torch.dtype:
    """In which a model works whose weights take so many bytes a number."""
    return {4: torch.float32, 8: torch.float64}.get(itemsize, torch.bfloat16)


def _fill(
    plan: Plan,
    shapes: Sequence[LayerShape],
    tokens: int,
    batch: int = 1,
    itemsize: int = 4,
) -> Iterator[tuple[LayerPlan, CacheLayer | None]]:
    dtype = type_of(itemsize)
    for own in resolve_layers(plan, shapes, plan.below):
        if own.producer is not None:
            yield own, None
            continue
        shape, rows = shapes[own.index], (batch, own.kv_heads, tokens)
        k, v = (
            torch.empty(*rows, dim, dtype=dtype, device="meta")
            for dim in (shape.head_dim, shape.value_dim)
        )
        layer = own.new_cache(tokens)
        layer.lazy_initialization(k, v)
        layer.seen = tokens
        for store in layer.stores:
            heads, lengths = len(store.group.heads), Lengths.of(None, 0, tokens, batch)
            if store.group.eviction is None:  # what is written takes no more than the room for it
                store.room(lengths.past, lengths.rows)
            else:  # how much is kept doesn't depend on queries
                given = k[:, :heads], v[:, :heads], lengths
                store.take(*given, given[0][:, :, -1:], scale=1.0)
        yield own, layer


def _measure(own: LayerPlan, layer: CacheLayer | None, tokens: int, **works: Work) -> LayerStats:
    own.steps[tokens, 1, tokens] = 1
    for store in () if layer is None else layer.stores:
        if store.group.eviction is not None:
            read = tokens - max(store.lacks - 1, 0)  # what evicts last has seen no step yet
            own.counts.read_by(store.group.heads, torch.device("cpu"))[:] = read
    held = NOTHING if layer is None else layer.held()
    works |= {"reads": own.reads(), "cache": held.work(own.kv_heads, tokens)}
    works |= {"kv_bytes": held.bytes(own.kv_heads), "host_bytes": held.outside(own.kv_heads)}
    return LayerStats(**works, window=own.window, evicting=own.evicting)


def _row(shares: np.ndarray, own: LayerPlan) -> np.ndarray:
    """A layer's shares `[q heads]`; one that has other heads than the plan's is always full."""
    row, heads = shares[own.index], len(own.prefill)
    return row if len(row) == heads else np.ones(heads)


def _dense_work(own: LayerPlan, tokens: int, device: torch.device) -> tuple[int, int]:
    """Pairs and blocks of a prompt in a layer whose heads are all full."""
    what = Lengths.of(None, 0, tokens, 1), 0, (0, 0), None, own.window, device
    groups = (lay_out_chunks if own.chunked else lay_out)(*what).groups
    return sum(group.work[0] for group in groups), sum(group.work[1] for group in groups)


def _work(shares: np.ndarray, dense: int) -> Work:
    """Shares `[heads]` of what dense attention does in each head, as amounts."""
    return Work((shares * dense).tolist(), [dense] * len(shares))
