"""How much memory a prompt takes under a plan, from the model's configuration alone.

    need = predict(config, plan, tokens=131_072, chunk=8_192)
    print(need.peak / 2**30)     # GiB: weights + KV cache + states + work

The cache is no formula: the plan's own stores are filled (`figures.fill_caches`). Nor are states,
which linear layers of hybrids keep beside it: a model without data makes them. Work is what
lives while a layer's MLP runs on the tokens of one call: `WIDE` tensors of its intermediate size
and `NARROW` of the hidden size; `hfsparse bench` on one H100 saw 0.5 % more than that at most.
Mixtures of experts and kernels of a model's own may need more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from hfsparse.errors import Error, ShapeError
from hfsparse.models.layers import by_layer, layer_shapes, one_value, text_config
from hfsparse.models.loading import skeleton
from hfsparse.models.names import cache_name, text_decoder
from hfsparse.patcher.figures import fill_caches, type_of
from hfsparse.patcher.generation import CHUNK
from hfsparse.patcher.probe import DummyValues
from hfsparse.plan import ModelId, Plan
from hfsparse.plan.bits import find_units, in_bits, in_host
from hfsparse.runtime.cache.stateful import state_bytes

WIDE, NARROW = 3, 4
# What configs call the intermediate size; where none is set it is four hidden sizes (GPT-2, GPT-J).
MLP = ("intermediate_size", "n_inner", "ffn_dim", "dff", "moe_intermediate_size")
LONGEST = 1 << 27  # tokens: longer prompts are not tried


class OutOfMemoryError(Error, torch.cuda.OutOfMemoryError):
    """A call under a plan needs more memory than its device has."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: int
    cache: int
    work: int
    states: int = 0  # of linear layers
    host: int = 0  # of keys and values in the host's memory, which are no part of the peak

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.work + self.states


def predict(
    config: Any, plan: Plan | None, tokens: int, batch: int = 1, chunk: int = 0, itemsize: int = 2
) -> Memory:
    """Of a batch of prompts of `tokens`, in calls of `chunk` (0: one); None is the stock model."""
    beside = _cache_and_work(config, plan, tokens, batch, chunk, itemsize)
    states = batch * count_states(config, itemsize)
    outside = 0 if plan is None else host_bytes(config, plan, tokens, batch, itemsize)
    return Memory(itemsize * count_weights(config), *beside, states, outside)


def _cache_and_work(config, plan, tokens, batch=1, chunk=0, itemsize=2) -> tuple[int, int]:
    """Bytes of cache and work."""
    mlp, hidden = _widths(config)
    followed = plan or Plan.full(ModelId.of(config))
    cache, dense = cache_bytes(config, followed, tokens, batch, itemsize)
    work = batch * min(tokens, chunk or tokens) * (WIDE * mlp + NARROW * hidden)
    return dense if plan is None else cache, itemsize * work


def cache_bytes(
    config: Any, plan: Plan, tokens: int, batch: int = 1, itemsize: int = 2
) -> tuple[int, int]:
    """Bytes that the plan's cache and the stock cache hold after prompts of `tokens`."""
    ours = stock = 0
    for _, layer in fill_caches(config, plan, tokens, batch, itemsize):
        if layer is not None:
            ours += layer.bytes()
            stock += layer.dense_bytes()
    return ours, stock


def host_bytes(config: Any, plan: Plan, tokens: int, batch: int = 1, itemsize: int = 2) -> int:
    """Bytes that the plan's cache keeps in the host's memory."""
    if not any(getattr(pattern, "host", False) for pattern in plan.patterns.values()):
        return 0
    filled = fill_caches(config, plan, tokens, batch, itemsize)
    return sum(layer.host_bytes() for _, layer in filled if layer is not None)


def count_weights(config: Any) -> int:
    """How many weights the model has."""
    return sum(p.numel() for p in skeleton(config).parameters())


def count_states(config: Any, itemsize: int = 2) -> int:
    """Bytes that linear layers keep of one row, however long it is, as `stats` counts them.

    0 where the model's code can't run without data.
    """
    if not any(shape.has_state for shape in layer_shapes(config)):
        return 0
    decoder = text_decoder(skeleton(config).to(type_of(itemsize)))
    cache = DynamicCache(config=decoder.config)
    try:
        with DummyValues(), torch.no_grad(), torch.device("meta"):
            decoder(torch.zeros(1, 2, dtype=torch.long), **{cache_name(decoder): cache})
    except Exception:  # it wants data
        return 0
    return sum(map(state_bytes, cache.layers))


def _widths(config: Any) -> tuple[int, int]:
    """Of the widest layer's MLP, and of hidden states."""
    text = text_config(config)
    hidden = one_value(text, "hidden_size")
    if type(hidden) is not int:
        raise ShapeError(f"{type(text).__name__} has no hidden_size: its work can't be predicted")
    layers = next((found for name in MLP if any(found := by_layer(text, name))), [4 * hidden])
    return max(max(n) if isinstance(n, list) else n for n in layers if n), hidden


def longest(
    config: Any, plan: Plan | None, room: int, batch: int = 1, chunk: int = 0, itemsize: int = 2
) -> int:
    """The longest prompt whose peak fits in `room` bytes; 0: none does."""
    beside = room - itemsize * count_weights(config) - batch * count_states(config, itemsize)
    return _longest_beside(config, plan, beside, batch, chunk, itemsize)


def _longest_beside(config, plan, room, batch, chunk, itemsize) -> int:
    """As `longest`, where `room` bytes are left beside the weights."""

    def fits(tokens: int) -> bool:
        return sum(_cache_and_work(config, plan, tokens, batch, chunk, itemsize)) <= room

    low, high = 0, 1
    while high < LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def in_few_bits(config: Any, plan: Plan) -> Plan | None:
    """The plan with its caches in 4 bits, as far as they can be; None: that changes nothing."""
    shapes = layer_shapes(config)
    odd = any(d % 2 for each in shapes if each.free for d in (each.head_dim, each.value_dim))
    if odd or plan.extend is not None:
        return None
    units = [*find_units(plan.layers, plan.patterns, shapes)]
    layers, patterns = in_bits(plan.layers, plan.patterns, 4, units)
    return None if layers == plan.layers else replace(plan, layers=layers, patterns=patterns)


def in_host_memory(config: Any, plan: Plan) -> Plan | None:
    """The plan with those keys in host memory of which steps choose; None: there are none."""
    if plan.extend is not None:
        return None
    layers, patterns = in_host(plan.layers, plan.patterns, layer_shapes(config))
    return None if layers == plan.layers else replace(plan, layers=layers, patterns=patterns)


def lighter(config: Any, plan: Plan) -> dict[str, Plan]:
    """By name, the same plan where its caches take less of a GPU."""
    few = in_few_bits(config, plan)
    made = {
        "4 bits": few,
        "4 bits and host" if few else "host": in_host_memory(config, few or plan),
    }
    return {name: each for name, each in made.items() if each is not None}


def describe_shortage(
    decoder: Any, plan: Plan, tokens: int, batch: int, chunk: int, room: int, ranks: int = 1
) -> str:
    """For a call that ran out of memory: what it needs under the plan, what dense does, what fits.

    Of a batch of rows of `tokens`, the last `chunk` of them new (0: all), on a device of `room`
    bytes whose weights are those of `decoder` and its embedding once more, the head. Where `ranks`
    share the heads (tensor parallel) it is said of all their devices together.
    """
    gib, config = 2**30, decoder.config
    size = next(decoder.parameters()).element_size()
    weights = sum(p.nbytes for p in decoder.parameters())
    weights += decoder.get_input_embeddings().weight.nbytes
    more = {"tokens": tokens, "batch": batch, "chunk": chunk, "itemsize": size}
    cache, work = _cache_and_work(config, plan, **more)
    dense = sum(_cache_and_work(config, None, **more))
    peak = (weights + cache + work) / gib
    said = (
        f"out of memory: {batch} x {tokens:,} tokens need about {peak:.1f} GiB under this "
        f"plan (weights {weights / gib:.1f}, KV cache {cache / gib:.1f}, work "
        f"{work / gib:.1f}) and {(weights + dense) / gib:.1f} without one"
    )
    if not room:
        return said
    room *= ranks
    more = room - weights, batch, chunk or CHUNK, size
    fits, ways = _longest_beside(config, plan, *more), ""
    how = {"4 bits": "in 4 bits (hfsparse bits)", "host": "with host: true where heads choose"}
    how["4 bits and host"] = f"{how['4 bits']} {how['host']}"
    for name, arm in lighter(config, plan).items():
        ways += f"{_longest_beside(config, arm, *more):,} {how[name]}, "
    device = "the device has" if ranks == 1 else f"the devices of {ranks} ranks together have"
    return (
        f"{said}; {device} {room / gib:.1f}. In chunks of {chunk or CHUNK:,} (generate's "
        f"prefill_chunk_size) {batch} x {fits:,} tokens fit, {ways}as far as nothing else is "
        "there; else shorten the prompt, lower the batch, or use a plan with a smaller cache_share"
    )
