"""The layers of a text decoder as its config tells them, spelled alike for every transformers.

may_drop_keys = [shape.free for shape in layer_shapes(config)]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hfsparse.errors import ShapeError

LINEAR = ("linear_attention", "conv")  # kinds of layers that keep a state, and no key per token
STATELESS = ("moe", "mlp")  # kinds of layers that keep nothing
CHUNKED = "chunked_attention"  # the kind whose tokens see no further back than their chunk's first
BOTH = "hybrid"  # the kind of layers that have attention and keep a state, too
CHUNK_SIZE = "attention_chunk_size"  # what configs call it
KINDS = {  # that are known, in words
    "full_attention": "full attention",
    "sliding_attention": "sliding windows",
    CHUNKED: "chunks",
    **dict.fromkeys((*LINEAR, *STATELESS, BOTH), "linear layers or MLPs beside them (hybrids)"),
}
OLD_NAMES = {"mamba": "linear_attention", "attention": "full_attention"}  # before 5.24
UNITS = {
    "layers": "layers",
    "q_heads": "q heads",
    "kv_heads": "kv heads",
    "head_dim": "dims a head",
}
# Of latents (MLA) their rank and the dims of what is rotated beside them; a cache keeps both as one
# key that serves all q heads. What is made of them for each head: dims of a key, and of a value.
LATENT = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
# What configs call a layer's q and kv heads, dims of a key and of a value, and of all heads.
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim", "hidden_size")
TWICE = ("mimo_v2_flash",)  # in code alone: windowed layers have twice the config's kv heads


@dataclass(frozen=True)
class LayerShape:
    """One layer; where it has no attention, with the heads that the config names."""

    kind: str
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None  # its own sliding window, or its chunks, in tokens
    producer: int | None = None  # the layer whose keys it reads; None: it makes its own
    shared: bool = False  # whether other layers read its keys
    # Of latents (MLA): dims of the key and of the value that are made of them for each q head.
    expanded: tuple[int, int] | None = None

    @property
    def heads(self) -> tuple[int, int]:
        """Of q, and of k and v."""
        return self.q_heads, self.kv_heads

    @property
    def attends(self) -> bool:
        return self.kind not in (*LINEAR, *STATELESS)

    @property
    def chunked(self) -> bool:
        """Whether its tokens see those of their own chunk of `window` tokens alone."""
        return self.kind == CHUNKED

    @property
    def has_state(self) -> bool:
        """Whether it keeps a state, which no plan changes."""
        return self.kind in (*LINEAR, BOTH)

    @property
    def rank(self) -> int:
        """Of latents: the dims of a key that are its value, too; 0: it has keys and values."""
        return self.value_dim if self.expanded else 0

    @property
    def read(self) -> tuple[int, int]:
        """Dims of keys and values as prompts read them."""
        return self.expanded or (self.head_dim, self.value_dim)

    @property
    def free(self) -> bool:
        """Whether a plan may change what it keeps and reads: a window drops keys by itself."""
        return self.attends and self.window is None

    @property
    def alone(self) -> bool:
        """Whether what a plan changes of it binds no other layer, nor is bound."""
        return self.free and self.producer is None and not self.shared

    def may_be_sparse(self, together: bool) -> bool:
        """Whether a method may change it that chooses for layers which share keys together, or
        one that chooses for each by itself."""
        return self.free if together else self.alone


def text_config(model_or_config: Any) -> Any:
    """The config of a model's text decoder; ShapeError for what has none."""
    config = getattr(model_or_config, "config", model_or_config)
    with reading_config():  # of two decoders transformers knows no one
        return config.get_text_config(decoder=True)


@contextmanager
def reading_config() -> Iterator[None]:
    """What a config raises is a ShapeError: it is any code, and one by hand holds anything."""
    try:
        yield
    except ShapeError:
        raise
    except Exception as error:
        raise ShapeError(str(error)) from error


def by_layer(config: Any, name: str) -> list[Any]:
    """A config's value for each layer, None where unset; one item where no layer has its own."""
    own = getattr(config, "is_heterogeneous", False)  # from 5.24 on
    return [getattr(each, name, None) for each in (config.per_layer_config if own else [config])]


def one_value(config: Any, name: str, default: Any = None) -> Any:
    """A config's value for all layers, `default` where unset; ShapeError where layers differ."""
    first, *others = by_layer(config, name)
    for index, other in enumerate(others, 1):
        if other != first:
            raise ShapeError(f"{name} is {first} in layer 0 and {other} in layer {index}")
    return default if first is None else first


def layer_shapes(model_or_config: Any) -> list[LayerShape]:
    """Every layer of the text decoder of a model, or of its config; else a ShapeError."""
    config = text_config(model_or_config)
    with reading_config():
        return _layer_shapes(config)


def shape(shapes: Sequence[LayerShape]) -> dict[str, int]:
    """Layers, heads and head dim of the layers that a plan may change; ShapeError if they differ.

    Where it may change none, of those that have attention.
    """
    held = [(i, each) for i, each in enumerate(shapes) if each.free] or [
        (i, each) for i, each in enumerate(shapes) if each.attends
    ]
    (at, first), *others = held or [*enumerate(shapes)]
    names = ("q_heads", "kv_heads", "head_dim")
    for index, other in others:
        for name in names:
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                raise ShapeError(f"{name} is {ours} in layer {at} and {theirs} in layer {index}")
    return {"layers": len(shapes), **{name: getattr(first, name) for name in names}}


def _layer_shapes(config: Any) -> list[LayerShape]:
    layers = _whole("layers", one_value(config, "num_hidden_layers"), config)
    heads = [_each(config, name, layers) for name in HEADS]
    if (own := one_value(config, "num_attention_heads_per_layer")) is not None:  # laguna
        heads[0] = own
    windows = _each(config, "sliding_window", layers)
    if not one_value(config, "use_sliding_window", True):  # qwen: a window may be set but off
        windows = [None] * layers
    every = ["sliding_attention" if window else "full_attention" for window in windows]
    kinds = [OLD_NAMES.get(kind, kind) for kind in one_value(config, "layer_types") or every]
    chunks, producers, found = _each(config, CHUNK_SIZE, layers), _producers(config, kinds), []
    each = zip(kinds, windows, chunks, producers, *heads, strict=True)
    for kind, window, chunk, producer, *sizes in each:
        window = {"sliding_attention": window, CHUNKED: chunk}.get(kind)
        if kind == CHUNKED and type(chunk) is not int:
            raise ShapeError(f"{CHUNK_SIZE} is {chunk!r}, not one whole number")
        more = window, producer, len(found) in producers
        found.append(LayerShape(kind, *_heads(config, window, *sizes), *more))
    rank, rope, nope, value = (one_value(config, name) for name in LATENT)
    if not rank:
        return found
    one = {"kv_heads": 1, "head_dim": rank + rope, "value_dim": rank}
    return [replace(each, **one, expanded=(nope + rope, value)) for each in found]


def _producers(config: Any, kinds: list[str]) -> list[int | None]:
    """The layer whose keys each layer reads: the last of its kind before it that makes its own."""
    if (modes := getattr(config, "kv_sharing_modes", None)) is None:  # before 5.24
        first = len(kinds) - (one_value(config, "num_kv_shared_layers") or 0)
        modes = [None if index < first else "reuse" for index in range(len(kinds))]
    last, found = {}, []
    for index, (kind, mode) in enumerate(zip(kinds, modes, strict=True)):
        reads = mode not in (None, "store")
        if reads and kind not in last:
            raise ShapeError(f"layer {index} reads keys that no layer before it makes")
        found.append(last[kind] if reads else None)
        if not reads:
            last[kind] = index
    return found


def _heads(config, window, q_heads, kv_heads, head_dim, value_dim, hidden) -> list[int]:
    """A layer's q heads, kv heads, and dims of a key and a value, where its config names them."""
    if window and kv_heads is not None and config.model_type in TWICE:
        kv_heads = 2 * kv_heads
    if head_dim is None and type(q_heads) is type(hidden) is int:
        head_dim = hidden // q_heads
    given = {
        "q_heads": q_heads,
        "kv_heads": q_heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
    }
    sizes = [_whole(name, value, config) for name, value in given.items()]
    return [*sizes, value_dim if type(value_dim) is int else sizes[2]]


def _each(config: Any, name: str, layers: int) -> list[Any]:
    """A config's value for each of its layers."""
    values = by_layer(config, name)
    return values if len(values) == layers else values[:1] * layers


def _whole(name: str, value: Any, config: Any) -> int:
    if value is None:
        raise ShapeError(f"{type(config).__name__} has no number of {UNITS[name]}")
    if type(value) is not int:
        raise ShapeError(f"{name} is {value!r}, not one whole number")
    return value
