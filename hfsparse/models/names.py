"""A model's text decoder, and what each version of transformers calls its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

CACHES = ("cache", "past_key_values")  # forward takes it by the first name from 5.24 on


def text_decoder(model: Any) -> Any:
    """A model's text decoder, which answers hidden states.

    `get_decoder` names the model that has a head on top of it for Llama 4, and in 4.57 for GPT-2.
    """
    decoder = model.get_decoder()
    head = getattr(decoder, "get_output_embeddings", None)  # of a decoder that is a model
    if head is None or head() is None:
        return decoder
    inner = decoder.base_model
    return getattr(decoder, "model", decoder) if inner is decoder else inner


def new_tokens(kwargs: dict) -> Tensor | None:
    """What a text decoder is given to read, `[B, Q]` or `[B, Q, hidden]`."""
    embeds = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if embeds is None else embeds


@lru_cache
def parameters(decoder: type) -> tuple[str, ...]:
    """What forward of a class of models takes, in order."""
    return tuple(inspect.signature(decoder.forward).parameters)[1:]


def cache_name(model: Any) -> str:
    """What forward of a model, or of its decoder, calls its cache."""
    return next(name for name in CACHES if name in parameters(type(model)))


def rename_cache(model: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with the cache by the name that a model's forward has for it: it
    warns of the older one. A paged cache, of which it knows nothing, keeps the name that it has."""
    taken = [name for name in CACHES if name in parameters(type(model))]
    if not taken or taken[0] in named:
        return {**named}
    caches = [name for name in CACHES if isinstance(named.get(name), Cache | None)]
    return {taken[0] if name in caches else name: x for name, x in named.items()}


def find_cache(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, or in its output; None without one."""
    return next((named[name] for name in CACHES if named.get(name) is not None), None)
