"""What a model's last hidden states say of the next token.

    logits = read_logits(model, hidden)

Some models scale hidden states or logits around their output embedding (Granite, Cohere, MiniCPM),
or cap logits (Gemma), each in code of its own. So the model itself is called, with hidden states in
the place of what its decoder would answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hfsparse.models.loading import input_device
from hfsparse.models.names import text_decoder


class _Answer(BaseModelOutput):
    """The output of any decoder: what is not in it is None."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattribute__(name) if name.startswith("__") else None


def read_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's logits `[1, n, vocabulary]` of hidden states `[1, n, hidden]` of its decoder."""
    decoder = text_decoder(model)
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **kwargs: _Answer(last_hidden_state=hidden)
    try:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=input_device(model))
        return model(input_ids=ids, use_cache=False).logits
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before
