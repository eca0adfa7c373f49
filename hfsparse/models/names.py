"""A model's text decoder, and what each version of transformers calls its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

CACHES = ("cache", "past_key_values")  # forward takes it by the first name from 5.24 on


def text_decoder(model: Any) -> Any:
    """A model's text decoder, which answers hidden states; `get_decoder` of Llama 4 names the model
    that has a head on top of it."""
    decoder = model.get_decoder()
    return decoder.model if hasattr(decoder, "lm_head") and hasattr(decoder, "model") else decoder


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


def find_cache(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, or in its output; None without one."""
    return next((named[name] for name in CACHES if named.get(name) is not None), None)
