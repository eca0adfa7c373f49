"""What each version of transformers calls the arguments of a decoder."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import Tensor


def new_tokens(kwargs: dict) -> Tensor | None:
    """What a text decoder is given to read, `[B, Q]` or `[B, Q, hidden]`."""
    embeds = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if embeds is None else embeds


@lru_cache
def parameters(decoder: type) -> tuple[str, ...]:
    """What a text decoder's forward takes, in order."""
    return tuple(inspect.signature(decoder.forward).parameters)[1:]


CACHES = ("cache", "past_key_values")  # what forward calls it: from 5.24 on, before


def _cache_in(kwargs: dict) -> Any:
    """The cache that a call is given, if any."""
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
