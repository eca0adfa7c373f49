"""Read a conversation piece by piece behind one cache.

Linear layers of a hybrid may begin anew where several tokens follow a past (Jamba's do, and no two
versions of transformers agree): such a model is found out on a few tokens, and given one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hfsparse.models.layers import layer_shapes
from hfsparse.models.loading import input_ids
from hfsparse.models.names import cache_name, text_decoder

PAST, PIECE = 12, 4  # tokens that a model is tried on
# Hidden states are others where they differ by more than this part of their length, and by so many
# times more than rounding alone does.
APART, TIMES = 0.02, 3


class Reader:
    """Called with the next tokens of a conversation: their hidden states `[1, n, hidden]`.

    alone: tokens behind the first piece are read one by one.
    """

    def __init__(self, model: PreTrainedModel, alone: bool = False):
        self.model, self.decoder = model, text_decoder(model)
        self.hybrid, self.alone = has_states(model), alone
        self.cache, self.seen = DynamicCache(), 0

    def __call__(self, tokens: list[int]) -> Tensor:
        ids = input_ids(self.model, [tokens])
        parts = ids.split(1, 1) if self.alone and self.seen else [ids]
        return torch.cat([self._read(part) for part in parts], 1)

    def _read(self, ids: Tensor) -> Tensor:
        first, self.seen = self.seen, self.seen + ids.shape[1]
        more = {cache_name(self.decoder): self.cache}
        if self.hybrid:  # Bamba's decoder numbers each call's tokens from 0
            more["position_ids"] = torch.arange(first, self.seen, device=ids.device)[None]
        return self.decoder(input_ids=ids, use_cache=True, **more).last_hidden_state


def open_reader(model: PreTrainedModel) -> Reader:
    """A reader of a new conversation; the model is patched or not."""
    return Reader(model, alone=has_states(model) and begins_anew(model))


def has_states(model: PreTrainedModel) -> bool:
    """Whether layers of a model keep a state, beside attention or in its place."""
    return any(shape.has_state for shape in layer_shapes(model))


@torch.no_grad()
def begins_anew(model: PreTrainedModel) -> bool:
    """Whether a model reads a few tokens behind a past otherwise than one by one."""
    tokens, found = list(range(PAST + PIECE)), []
    for past, alone in ((0, False), (PAST, False), (PAST, True)):
        read = Reader(model, alone)
        if past:
            read(tokens[:past])
        found.append(read(tokens[past:])[0, PAST - past].float())
    whole, together, single = found
    rounding, apart = ((each - single).norm() for each in (whole, together))
    return bool(apart > APART * single.norm() and apart > TIMES * rounding)
