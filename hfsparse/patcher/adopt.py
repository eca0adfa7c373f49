"""Our layers in a cache: put there before a model's first token, refused where they can't be."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hfsparse.errors import CacheError, PatchError
from hfsparse.models.layers import layer_shapes
from hfsparse.patcher.state import State
from hfsparse.runtime.cache.buffers import autocast
from hfsparse.runtime.cache.layer import DEFAULT, CacheLayer

VIRTUAL = (
    "Prefix tuning (peft) brings virtual tokens in a cache of its own, which hfsparse can't "
    "follow: run it on the unpatched model (handle.undo())"
)


def adopt(cache: Any, decoder: Any, reserve: int = 0, expected: int = 0) -> None:
    """Put our layers into an empty cache; refuse one that isn't ours and isn't empty.

    reserve: tokens that a new call of `generate` makes room for, 0 elsewhere. expected: tokens of
    a prompt that comes in chunks, 0 where it comes whole.
    """
    state: State = decoder._hfsparse
    if not isinstance(cache, Cache):
        raise CacheError(
            f"got a {type(cache).__name__} as cache: give a transformers Cache, or none"
        )
    if ours := [layer for layer in cache.layers if isinstance(layer, CacheLayer)]:
        check_whole(ours)
        for layer in ours if expected else ():
            layer.expected = expected
        if reserve:
            for graphs in state.all_graphs:
                graphs.forget(ours[0])
        return
    _check_empty(cache)
    layers: list[Any] = [None] * len(state.plan.layers)
    keeping = [layer for layer in state.layers if layer.producer is None]
    if len(keeping) < len(layers):  # linear layers keep transformers' own, others perhaps none
        layers = cache.layers or DynamicCache(config=decoder.config).layers
    for layer in keeping:
        layers[layer.index] = layer.new_cache(reserve, expected)
    cache.layers = layers[: decoder.config.num_hidden_layers]  # a draft may run the first alone
    cache.layer_class_to_replicate = None


def prepare(cache: Cache, decoder: Any, rows: int) -> None:
    """Make a new cache's stores for `rows` prompts that come in chunks, before the first is read.

    Made while it is read, layer by layer, buffers would lie in memory that its activations gave
    back, and leave pieces of that in which the next ones find no room.
    """
    if len(places := {p.device for p in decoder.parameters()}) > 1:
        return  # a layer's are made where its keys come
    (place,), shapes = places, layer_shapes(decoder.config)
    for layer in (layer for layer in cache.layers if isinstance(layer, CacheLayer)):
        sizes = rows, sum(len(group.heads) for group in layer.groups), 0
        dims = shapes[layer.index].head_dim, shapes[layer.index].value_dim
        like = (torch.empty(*sizes, dim, dtype=decoder.dtype, device=place) for dim in dims)
        layer.prepare(*autocast(*like))


def check_whole(ours: list[CacheLayer]) -> None:
    """CacheError for a cache whose layers have not all stored the same tokens."""
    if len({n for layer in (ours[0], ours[-1]) for n in (layer.seen, layer.stored)}) > 1:
        raise CacheError(
            "this cache is broken: a forward pass was interrupted half-way through its layers. "
            "Start again from the prompt with a new cache"
        )


def _check_empty(cache: Cache) -> None:
    """CacheError for a cache of transformers that holds tokens, or is of a kind of its own."""
    kinds = dict.fromkeys(type(each).__name__ for each in (cache, *cache.layers))
    special = [name for name in kinds if "Quant" in name or "EncoderDecoder" in name]
    if special or getattr(cache, "offloading", False):
        what = f"a {special[0]}" if special else "an offloaded cache"
        raise CacheError(f"{what} is not supported under hfsparse: {DEFAULT}")
    if cache.get_seq_length():
        raise CacheError(
            f"this cache holds {int(cache.get_seq_length())} tokens of the unpatched model, which "
            f"hfsparse can't go on from: start again from the prompt with a new cache. {VIRTUAL}"
        )


@torch.compiler.disable
def adopt_own(decoder: Any, given: tuple) -> None:
    """Make ours a cache that the decoder has made itself, found among what it gives attention."""
    cache = next((x for x in given if isinstance(x, Cache)), None)
    if cache is None or any(isinstance(layer, CacheLayer) for layer in cache.layers):
        return
    if len(cache.layers) > len(decoder._hfsparse.plan.layers):
        raise PatchError(
            f"{type(decoder).__name__} loops over layers, and its cache can't be followed while it "
            "is trained: pass use_cache=False, or call model.eval()"
        )
    adopt(cache, decoder)
