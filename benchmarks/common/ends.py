"""Texts that are read densely once, and whose ends are read under any arm: what steps would lose.

    with ended(model):
        text = Text(model, begun, given, value)
        nats = text.read(arm) - text.dense

An arm attends for the rows of the end, layer by layer, over all keys before them: so it can mask
what a cache would not hold, and no more is run than the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

from hfsparse.models.names import cache_name, text_decoder


class Arm(Protocol):
    """What is done at the end of a text."""

    def weights(self, layer: int, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Attention `[Hq, R, S]` of q `[1, Hq, R, D]` over k `[1, Hkv, S, D]`, of these logits:
        -inf where a key comes later than its row. Row R - 1 is at position S - 1."""
        ...


class Dense:
    def weights(self, layer: int, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return logits.softmax(-1)


DENSE = Dense()


class Text:
    """Tokens `begun` and `given` are read densely, and the nats of `value` are told."""

    now: Text | None = None  # that the model reads

    def __init__(self, model, begun: list[int], given: list[int], value: list[int]):
        self.model, self.cache = model, DynamicCache()
        self.begun, self.given, self.value = begun, given, value
        self.arm: Arm | None = None
        self.q: dict[int, Tensor] = {}  # [1, Hq, S, D] of each layer
        self.k: dict[int, Tensor] = {}
        self.first = self._run(begun + given)[-1:]  # what foretells the value's first token

    def forget_given(self) -> None:
        """From now on what was given is read with the end, and is no part of what came before."""
        self.cache.crop(-len(self.given))
        self.q, self.k = (
            {i: t[:, :, : len(self.begun)] for i, t in each.items()} for each in (self.q, self.k)
        )
        self.first = None
        self.__dict__.pop("dense", None)

    @cached_property
    def dense(self) -> float:
        return self.read(DENSE)

    def read(self, arm: Arm) -> float:
        """Nats a token of the value."""
        behind = [] if self.first is not None else self.given
        self.arm = arm
        end = behind + self.value[:-1]
        logits = self._run(end)
        self.cache.crop(-len(end))
        if self.first is not None:
            logits = torch.cat([self.first, logits])
        return float(cross_entropy(logits[-len(self.value) :], torch.tensor(self.value)))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.arm is None:
            self.q[layer], self.k[layer] = q, k
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        group, (R, S) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
        logits = q[0] @ k[0].repeat_interleave(group, 0).mT * scale
        later = torch.arange(S) > torch.arange(S - R, S)[:, None]
        weights = self.arm.weights(layer, logits.masked_fill(later, -torch.inf), q, k)
        return (weights @ v[0].repeat_interleave(group, 0))[None]

    def _run(self, tokens: list[int]) -> Tensor:
        Text.now = self
        given = {cache_name(text_decoder(self.model)): self.cache}
        return self.model(torch.tensor([tokens]), **given).logits[0]


def _attend(module, q, k, v, mask, scaling, **more):
    return Text.now.attend(module.layer_idx, q, k, v, scaling).transpose(1, 2), None


@contextmanager
def ended(model) -> Iterator[None]:
    """Texts may be made of the model, a causal one on the CPU, and read."""
    before = model.config._attn_implementation
    AttentionInterface.register("ended", _attend)
    model.set_attn_implementation("ended")
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(before)
