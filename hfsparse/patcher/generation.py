"""What changes in `generate` while a model is patched."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, GenerationMixin

from hfsparse.errors import PatchError
from hfsparse.models.fingerprint import attention_values
from hfsparse.models.layers import layer_shapes
from hfsparse.models.names import cache_name, find_cache, text_decoder
from hfsparse.patcher import batching
from hfsparse.patcher.adopt import adopt
from hfsparse.patcher.answering import generate, leave_alone, wants_cache, watch
from hfsparse.patcher.supported import ROPES
from hfsparse.plan import Plan
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.cache.ring import SLACK

# `generate` reads prompts of more than LONG tokens in chunks of CHUNK, unless it is given a size of
# its own, and where chunks give what one call gives.
LONG, CHUNK = 1 << 17, 1 << 15
# A `generate` without this method numbers the tokens of chunks by columns, padding or not.
NUMBERED = hasattr(GenerationMixin, "_prepare_position_ids_for_generation")


def _prepare_cache(self, generation_config, model_kwargs, *args, **kwargs):
    """`_prepare_cache_for_generation`, then our layers, with room for the whole generation."""
    if generation_config.prefill_chunk_size and text_decoder(self)._hfsparse.context is not None:
        raise PatchError(
            "prefill_chunk_size: ranks that share a prompt read it in one call (context parallel): "
            "leave it out"
        )
    self.__dict__.pop("_cache", None)  # up to 5.0 a new static cache takes the last one's layers
    original = type(self)._prepare_cache_for_generation
    result = original(self, generation_config, model_kwargs, *args, **kwargs)
    cache = find_cache(model_kwargs)
    if cache is None and wants_cache(self, generation_config):  # 5.0 leaves it to the model
        cache = model_kwargs[cache_name(self)] = DynamicCache()
    if cache is None:
        return result
    mask = model_kwargs.get("attention_mask")
    # 5.24 drops a mask of ones, and notes how wide it was
    width = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[1]
    chunk = generation_config.prefill_chunk_size
    if chunk is None and width > LONG and _can_chunk(self, generation_config, model_kwargs, cache):
        chunk = generation_config.prefill_chunk_size = CHUNK
    if chunk and not width:
        raise PatchError(
            "prefill_chunk_size: generate does not tell how long the whole prompt is. Pass its "
            "attention_mask, or leave prefill_chunk_size out"
        )
    reserve = kwargs.get("max_cache_length", args[-1] if args else 0)
    adopt(cache, text_decoder(self), reserve, expected=width if chunk else 0)
    if generation_config.is_assistant:
        _keep(cache, SLACK + (generation_config.max_new_tokens or 0))
    return result


def _can_chunk(model, generation_config, model_kwargs: dict, cache: Any) -> bool:
    """Whether a prompt in chunks gives what one call gives."""
    fresh = model_kwargs.get("inputs_embeds") is None and not cache.get_seq_length()
    plan = text_decoder(model)._hfsparse.plan
    whole = generation_config.output_hidden_states  # of chunks only the last one's come
    alike = why_in_one_call(model.config, plan) is None and _keeps_positions(model_kwargs)
    return fresh and alike and not whole


def why_in_one_call(config: Any, plan: Plan) -> str | None:
    """Why prompts in chunks may be read otherwise than in one call; None: they are read alike."""
    if any("kept" in layer.decode for layer in plan.layers):
        return "each chunk evicts keys that the next ones would read"
    if hasattr(config, "vision_config"):
        return "it may hold images"
    if any(shape.has_state for shape in layer_shapes(config)):  # as Jamba's do in any version
        return "its linear layers may begin anew with each chunk"
    ropes = attention_values(config.get_text_config(decoder=True))["rope"].values()
    if other := sorted({rope["rope_type"] for rope in ropes} - {*ROPES}):
        return f"rope {', '.join(other)} may depend on a call's length"
    return None


def _keeps_positions(model_kwargs: dict) -> bool:
    """Whether each row's tokens keep their positions in chunks."""
    mask = model_kwargs.get("attention_mask")
    plain = model_kwargs.get("position_ids") is None and (mask is None or bool(mask.all()))
    return NUMBERED or plain


def _candidate_generator(self, *args, **kwargs):
    """`_get_candidate_generator`, whose drafts can be taken back however long they are."""
    if text_decoder(self)._hfsparse.context is not None:
        raise PatchError(
            "drafts are taken back, and keys that lie on several ranks can't be (context "
            "parallel): generate without an assistant and without prompt lookup"
        )
    generator = type(self)._get_candidate_generator(self, *args, **kwargs)
    leave_alone(self, find_cache(kwargs["model_kwargs"]))
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
        if isinstance(layer, CacheLayer):
            layer.keep(tokens)


# Methods of a patched model that are ours.
SHADOWS = {
    "_prepare_cache_for_generation": _prepare_cache,
    "_get_candidate_generator": _candidate_generator,
    "_get_logits_processor": watch,
    "generate": generate,
    "generate_batch": batching.generate_batch,
    "init_continuous_batching": batching.start,
}
