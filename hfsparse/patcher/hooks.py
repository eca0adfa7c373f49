"""Hooks on the text decoder: what happens before and after each forward."""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hfsparse.errors import PatchError
from hfsparse.models.names import cache_name, find_cache, new_tokens, parameters
from hfsparse.patcher import context, memory
from hfsparse.patcher.adopt import VIRTUAL, adopt, adopt_own, prepare
from hfsparse.patcher.state import State
from hfsparse.plan import Plan
from hfsparse.runtime.batch import Batch
from hfsparse.runtime.cache.held import Held, Later
from hfsparse.runtime.cache.layer import CacheLayer, copy_prompts
from hfsparse.runtime.cache.stateful import state_bytes
from hfsparse.runtime.call import enter, leave, running
from hfsparse.runtime.masks import NAME


def forward(decoder, *args, **kwargs):
    """The forward of a patched text decoder: its class's own, or the replay of a recorded step."""
    state = decoder.__dict__.get("_hfsparse")
    own = functools.partial(type(decoder).forward, decoder)
    if args or state is None or torch.compiler.is_dynamo_compiling():
        return own(*args, **kwargs)
    cache = find_cache(kwargs)
    try:
        call = running()
        if state.context is not None:
            return context.run(state.context, own, decoder, kwargs, cache)
        drafts = state.exact if call is not None and call.drafts else None
        return (drafts or state).graphs.run(own, decoder, kwargs, cache)
    except torch.cuda.OutOfMemoryError as error:
        raise memory.OutOfMemoryError(_describe_shortage(decoder, kwargs, cache)) from error
    except Exception:
        raise
    except BaseException:  # `after_forward` is called for an Exception alone
        leave(state.owner)
        raise


def _prepare(decoder, kwargs: dict, cache: Any) -> None:
    """`prepare`, and what would fit where memory is short."""
    try:
        prepare(cache, decoder, len(new_tokens(kwargs)))
    except torch.cuda.OutOfMemoryError as error:
        raise memory.OutOfMemoryError(_describe_shortage(decoder, kwargs, cache)) from error


def _describe_shortage(decoder, kwargs: dict, cache: Any) -> str:
    """What a call that is out of memory needs under the plan, what dense does, and what fits."""
    state, weight = decoder._hfsparse, next(decoder.parameters())
    plan = state.plan if state.exact is None else Plan.full(state.plan.model)
    new = new_tokens(kwargs)
    past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    ours = (layer for layer in getattr(cache, "layers", ()) if isinstance(layer, CacheLayer))
    whole = max(past + new.shape[1], *(layer.expected for layer in ours), 0)
    room = torch.cuda.get_device_properties(weight.device).total_memory if weight.is_cuda else 0
    return memory.describe_shortage(
        *(decoder, plan, whole, len(new), new.shape[1] if whole > new.shape[1] else 0, room),
        ranks=state.shard.ranks,
    )


def refuse_replica(module, args) -> None:
    """Pre-hook on the text decoder and the model: PatchError for a copy of either."""
    if getattr(module, "_is_replica", False):
        raise PatchError(
            "DataParallel runs copies of the model that share one patch: use one process a GPU "
            "(DistributedDataParallel), device_map='auto', or handle.undo() first"
        )


@torch.compiler.disable
def before_forward(decoder, args, kwargs):
    """Pre-hook on the text decoder: make its cache ours, and tell that cache who is running."""
    state: State = decoder._hfsparse
    enter(state.owner)
    refuse_replica(decoder, args)
    if decoder.config._attn_implementation != NAME:
        raise PatchError(
            f"the attention implementation was set to {decoder.config._attn_implementation} under "
            "an hfsparse patch: call handle.undo() first, then set it"
        )
    names = parameters(type(decoder))
    args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("output_attentions", decoder.config.output_attentions):
        warnings.warn(
            "output_attentions: hfsparse computes no attention weights, they will be None. Call "
            "handle.undo() to see the dense model's",
            stacklevel=2,
        )
    cache = find_cache(kwargs)
    packed = cache is not None and kwargs.get("cu_seq_lens_q") is not None
    if packed and (pool := state.pools.get(cache)) is not None:
        running().batch = Batch(pool, kwargs)
        none = [index[:0] for index in kwargs["read_index"]]  # attention reads keys where they lie
        return args, {**kwargs, "read_index": none}
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(decoder.config, "use_cache", None) if use_cache is None else use_cache
    if cache is None and use_cache and not decoder.training:  # in training the model decides
        cache = DynamicCache()
        kwargs[cache_name(decoder)] = cache
    if kwargs.get("return_shared_kv_states") or kwargs.get("shared_kv_states") is not None:
        raise PatchError(
            "this call hands keys from one model to another (shared_kv_states), and under a plan "
            "a model keeps no more than its new ones: generate without that assistant, or run it "
            "on the unpatched model (handle.undo())"
        )
    _check_width(kwargs, cache)
    if cache is not None:
        adopt(cache, decoder)
        new = new_tokens(kwargs)
        ours = next((layer for layer in cache.layers if isinstance(layer, CacheLayer)), None)
        if new is not None and ours is not None:  # ahead of linear layers, which take any
            ours.check_rows(len(new))
            if ours.expected and not ours.is_initialized:
                _prepare(decoder, kwargs, cache)
    return args, kwargs


def before_attention(decoder, module, args, kwargs) -> None:
    """Pre-hook on the first attention module: make ours a cache that the decoder has made itself.

    While it is trained, whether it makes one is left to it: without one, as where activations are
    checkpointed, it looks for packed sequences. Fused steps go without this hook.
    """
    adopt_own(decoder, (*args, *kwargs.values()))


@torch.compiler.disable
def after_forward(decoder, args, kwargs, output) -> None:
    """Hook behind the text decoder, also when it raised: note what the cache holds."""
    state: State = decoder._hfsparse
    call = leave(state.owner)
    if output is None:
        return  # an error
    call.finish()
    copy_prompts(call.updated)
    if call.drafts:
        return  # what it stored is overwritten
    returned = output.values() if isinstance(output, dict) else output
    cache = next((x for x in (find_cache(kwargs), *returned) if isinstance(x, Cache)), None)
    if cache is None:
        return
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayer)]
    if len(layers) < state.graphs.keeping or not all(layer.is_initialized for layer in layers):
        return  # the first layers drafted, or gradient checkpointing dropped the cache
    state.seen = layers[0].seen
    if state.graphs.why is None and state.graphs.held() is layers[0]:
        return  # a replay, which writes into the same tensors
    state.graphs.held = weakref.ref(layers[0])
    held: dict[int, list[Held | Later]] = {layer.index: [] for layer in state.layers}
    for layer in layers:
        held[layer.index].append(layer.outline())
    state.held = [*held.values()]
    linear = state.graphs.linear
    state.states = [state_bytes(layer) for layer in cache.layers] if linear else []


def _check_width(given: dict, cache: Any) -> None:
    """PatchError unless a mask `[B, columns]` covers exactly the past and the new tokens."""
    mask = given.get("attention_mask")
    new = new_tokens(given)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or new is None:
        return
    past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    if mask.shape[1] != past + new.shape[1]:
        virtual = f". {VIRTUAL}" if mask.shape[1] > past + new.shape[1] else ""
        raise PatchError(
            f"attention_mask covers {mask.shape[1]} columns, past and input together have "
            f"{past + new.shape[1]}: pass the mask of the whole conversation, no more and no less"
            f"{virtual}"
        )
