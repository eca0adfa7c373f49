"""What changes in `generate` while a model is patched."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache

from hfsparse.errors import CacheError, PatchError
from hfsparse.models.fingerprint import LINEAR, attention_values
from hfsparse.models.names import find_cache
from hfsparse.patcher.state import State
from hfsparse.patcher.supported import ROPES
from hfsparse.runtime.cache.layer import Layer
from hfsparse.runtime.cache.ring import SLACK

# `generate` reads prompts of more than LONG tokens in chunks, unless it is told of which size, and
# where chunks give what one call gives.
LONG, CHUNK = 1 << 17, 1 << 15
# Before it had this, `generate` numbered the tokens of chunks by columns, padding or not.
NUMBERED = hasattr(GenerationMixin, "_prepare_position_ids_for_generation")
VIRTUAL = (
    "Prefix tuning (peft) brings virtual tokens in a cache of its own, which hfsparse can't "
    "follow: run it on the unpatched model (handle.undo())"
)
SERVING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@torch.compiler.disable
def _adopt_made(decoder, given: tuple) -> None:
    cache = next((x for x in given if isinstance(x, Cache)), None)
    if cache is None or any(isinstance(layer, Layer) for layer in cache.layers):
        return
    if len(cache.layers) > len(decoder._hfsparse.plan.layers):
        raise PatchError(
            f"{type(decoder).__name__} loops over layers, and its cache can't be followed while it "
            "is trained: pass use_cache=False, or call model.eval()"
        )
    _adopt(cache, decoder)


def _adopt(cache: Any, decoder: Any, reserve: int = 0, expected: int = 0) -> None:
    """Put our layers into an empty cache; refuse one that isn't ours and isn't empty."""
    state: State = decoder._hfsparse
    kind = type(cache).__name__
    if not isinstance(cache, Cache):
        raise CacheError(f"got a {kind} as cache: give a transformers Cache, or none")
    ours = [layer for layer in cache.layers if isinstance(layer, Layer)]
    if ours:
        if len({n for layer in (ours[0], ours[-1]) for n in (layer.seen, layer.stored)}) > 1:
            raise CacheError(
                "this cache is broken: a forward pass was interrupted half-way through its layers. "
                "Start again from the prompt with a new cache"
            )
        for layer in ours if expected else ():
            layer.expected = expected
        if reserve:  # a new call of `generate`
            state.graphs.forget(ours[0])
        return
    layer_kinds = {type(layer).__name__ for layer in cache.layers}
    special = [name for name in (kind, *layer_kinds) if "Quant" in name or "EncoderDecoder" in name]
    if special or getattr(cache, "offloading", False):
        what = f"a {special[0]}" if special else "an offloaded cache"
        raise CacheError(f"{what} is not supported under hfsparse: use the default cache")
    if cache.get_seq_length():
        raise CacheError(
            f"this cache holds {int(cache.get_seq_length())} tokens of the unpatched model, which "
            f"hfsparse can't go on from: start again from the prompt with a new cache. {VIRTUAL}"
        )
    layers: list[Any] = [None] * len(state.plan.layers)
    if len(state.layers) < len(layers):  # linear layers keep transformers' own
        layers = cache.layers or DynamicCache(config=decoder.config).layers
    for layer in state.layers:
        layers[layer.index] = layer.new_cache(reserve, expected)
    cache.layers = layers[: decoder.config.num_hidden_layers]  # a draft may run the first alone
    cache.layer_class_to_replicate = None


def _prepare_cache(self, generation_config, model_kwargs, *args, **kwargs):
    """`_prepare_cache_for_generation`, then our layers, with room for the whole generation."""
    self.__dict__.pop("_cache", None)  # up to 5.0 a static cache goes on with the last one's layers
    original = type(self)._prepare_cache_for_generation
    result = original(self, generation_config, model_kwargs, *args, **kwargs)
    cache = find_cache(model_kwargs)
    if cache is not None:
        mask = model_kwargs.get("attention_mask")
        # 5.24 drops a mask of ones, and notes how wide it was
        width = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[1]
        if generation_config.prefill_chunk_size is None and width > LONG:
            fresh = model_kwargs.get("inputs_embeds") is None and not cache.get_seq_length()
            whole = generation_config.output_hidden_states  # of chunks only the last one's come
            alike = _in_one_call(self.config) is None and _in_order(model_kwargs)
            if fresh and alike and not whole:
                generation_config.prefill_chunk_size = CHUNK
        chunked = generation_config.prefill_chunk_size
        if chunked and not width:
            raise PatchError(
                "prefill_chunk_size: generate does not tell how long the whole prompt is. Pass its "
                "attention_mask, or leave prefill_chunk_size away"
            )
        expected = width if chunked else 0
        reserve = kwargs.get("max_cache_length", args[-1] if args else 0)
        _adopt(cache, self.get_decoder(), reserve, expected)
        if generation_config.is_assistant:
            _keep(cache, SLACK + (generation_config.max_new_tokens or 0))
    return result


def _in_one_call(config) -> str | None:
    """Why prompts in chunks may be read otherwise than in one call; None: they are read alike."""
    if hasattr(config, "vision_config"):
        return "it may hold images"
    values = attention_values(config.get_text_config(decoder=True))
    if not set(LINEAR).isdisjoint(values["kinds"]):  # as Jamba's do in any version
        return "its linear layers may begin anew with each chunk"
    ropes = values["rope"].values()
    if other := sorted({rope["rope_type"] for rope in ropes} - {*ROPES}):
        return f"rope {', '.join(other)} may depend on a call's length"
    return None


def _in_order(model_kwargs: dict) -> bool:
    """Whether each row's tokens keep their positions in chunks."""
    mask = model_kwargs.get("attention_mask")
    plain = model_kwargs.get("position_ids") is None and (mask is None or bool(mask.all()))
    return NUMBERED or plain


def _candidate_generator(self, *args, **kwargs):
    """`_get_candidate_generator`, whose drafts can be taken back however long they are."""
    generator = type(self)._get_candidate_generator(self, *args, **kwargs)
    draft = generator.get_candidates

    def get_candidates(input_ids, *args, **more):
        found = draft(input_ids, *args, **more)
        _keep(find_cache(kwargs["model_kwargs"]), found[0].shape[1] - input_ids.shape[1])
        return found

    generator.get_candidates = get_candidates
    return generator


def _keep(cache: Any, tokens: int) -> None:
    """Have a cache keep so many tokens beyond its windows."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, Layer):
            layer.keep(tokens)


def _no_serving(self, *args, **kwargs):
    raise PatchError(
        "continuous batching keeps its own paged cache, which hfsparse can't shape: use "
        "model.generate, or handle.undo() first"
    )


# Methods of a patched model that are ours.
SHADOWS = {
    "_prepare_cache_for_generation": _prepare_cache,
    "_get_candidate_generator": _candidate_generator,
    **dict.fromkeys(SERVING, _no_serving),
}
