"""Greedy answers, whatever sampling, beams or penalties a model's own settings ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def greedy(model: PreTrainedModel, limit: int) -> Iterator[GenerationConfig]:
    """Within it `model.generate` says the likeliest token each time, at most `limit` tokens.

    Of the model's own settings only its special tokens are kept. They are put aside, not
    overruled: `generate` takes from them whatever it is not told.
    """
    own = model.generation_config
    stop, pad = own.eos_token_id, own.pad_token_id
    if pad is None and stop is not None:
        pad = stop[0] if isinstance(stop, list) else stop
    model.generation_config = GenerationConfig(
        max_new_tokens=limit,
        eos_token_id=stop,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
    )
    try:
        yield model.generation_config
    finally:
        model.generation_config = own
