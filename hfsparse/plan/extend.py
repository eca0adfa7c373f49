"""Rules by which a model reads rows longer than those that it was trained on: a plan's `extend`.

extend: {kind: dca, trained: 32768}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hfsparse.registry import require

STEP = 128  # tokens: chunks are multiples, so that no page and no block of keys lies in two


@dataclass(frozen=True)
class DualChunk:
    """Dual Chunk Attention (DCA; ChunkLlama, arXiv 2402.17463; Qwen2.5-1M, arXiv 2501.15383).

    Keys come in chunks of `size` = chunk - local tokens, and are rotated as they always are. To
    those of the chunk that begins at `low`, a query at position p stands at min(p, low + reach): in
    its own chunk and, `local` tokens deep, in the one before, where it is, and no further than
    `reach` from the first key of any other. This is the paper's attention in three parts, each of
    which rotates keys by their place in the chunk: only distances count.

    trained: tokens that the model was trained on. chunk, local: 0 stands for the paper's 3/4 and,
    about, 1/8 of that. mscale: logits of a query at position p are times
    (1 + mscale * ln((p + 1) / trained))^2 where that is more than 1, which sharpens attention over
    more keys than ever; the authors' code has 0.05, with the whole row's length in place of p + 1.
    """

    kind: ClassVar[str] = "dca"

    trained: int = field(metadata={"range": (2 * STEP, 2**31 - 1)})
    chunk: int = 0
    local: int = 0
    mscale: float = 0.0

    def __post_init__(self):
        trained, chunk, local = self.trained, self.chunk, self.local
        chunk = chunk or trained * 3 // 4
        local = local or chunk - (chunk - trained // 8) // STEP * STEP
        require(
            chunk < trained,
            f"chunk is {chunk}, trained {trained}: give less, or queries stand further from a key "
            "than the model knows",
        )
        require(
            chunk - local >= STEP and (chunk - local) % STEP == 0,
            f"chunk is {chunk}, local {local}: give two that are a multiple of {STEP} apart",
        )
        require(
            0 <= self.mscale <= 1, f"mscale is {self.mscale}: give 0 to 1 (0.05 is the paper's)"
        )
        object.__setattr__(self, "chunk", chunk)
        object.__setattr__(self, "local", local)

    @property
    def size(self) -> int:
        """Keys of a chunk."""
        return self.chunk - self.local

    @property
    def reach(self) -> int:
        """How far from a chunk's first key queries stand at most."""
        return min(self.chunk, 2 * self.size - 1)

    def changes(self, tokens: int) -> bool:
        """Whether a row of so many tokens is read otherwise than without the rule."""
        return tokens > self.reach + 1

    def moves(self, position: Tensor, low: int) -> Tensor:
        """By how many positions queries at `position` are moved for the keys from `low` on."""
        return (low + self.reach - position).clamp(max=0)

    def sharpens(self, position: Tensor) -> Tensor:
        """What logits of queries at `position` are multiplied by, in float64."""
        more = torch.log((position + 1).clamp(min=self.trained).double() / self.trained)
        return (1 + self.mscale * more) ** 2


RULES = {rule.kind: rule for rule in (DualChunk,)}
