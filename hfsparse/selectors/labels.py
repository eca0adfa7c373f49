"""Labels: a few numbers that stand for a key, kept in few bits, and the scores that they tell.

A label is the product of a key with a projection `[D, rank]`. The product of a label with that of a
query estimates q · k. An index of labels holds, of each token,

- `label` `[B, H, n, PAGE, rank]` int8 (8 bits); of 4 bits `[B, H, n, PAGE, rank / 2]` int8, whose
  byte c has number c in its low half and number c + rank / 2 in its high half, both signed; of 16
  bits float16, as they are;
- `scale` `[B, H, n, PAGE]` float16, what a label of 4 or 8 bits is multiplied by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.precision import exact
from hfsparse.registry import require

BITS = (4, 8, 16)


def check(kind: str, rank: int, bits: int) -> None:
    """UsageError for labels that can't be kept; `kind` is what the selector calls their size."""
    require(bits in BITS, f"bits is {bits}: give 4, 8 or 16")
    require(rank >= 1, f"{kind} is {rank}: give 1 or more")
    require(bits > 4 or rank % 2 == 0, f"{kind} is {rank}: give an even number for bits: 4")


def labels(keys: Tensor, real: Tensor, projection: Tensor, bits: int) -> dict[str, Tensor]:
    """The index of keys `[B, H, n, PAGE, D]`, by a projection `[H, D, rank]`; 0 where not real."""
    found = torch.einsum("bhptd,hdr->bhptr", exact(keys.masked_fill(~real, 0)), exact(projection))
    if bits == 16:
        return {"label": found.to(torch.float16)}
    most, limits = (1 << bits - 1) - 1, torch.finfo(torch.float16)
    scale = (found.abs().amax(-1) / most).clamp(max=limits.max).to(torch.float16)
    steps = found / scale.to(found.dtype).clamp(min=limits.smallest_normal / 2048)[..., None]
    label = steps.round().clamp(-most, most).to(torch.int8)
    if bits == 4:
        low, high = label.chunk(2, -1)
        label = high << 4 | low & 15
    return {"label": label, "scale": scale}


def token_scores(q: Tensor, index: dict[str, Tensor], projection: Tensor, bits: int) -> Tensor:
    """Estimates of q · k `[B, Hq, Q, tokens]` for q `[B, Hq, Q, D]` and all tokens of an index.

    projection: of queries, `[H, D, rank]`.
    """
    label = index["label"].flatten(2, 3)
    if bits == 4:
        label = torch.cat([label << 4 >> 4, label >> 4], -1)
    B, Hq, Q, D = q.shape
    asked = exact(q).view(B, label.shape[1], -1, Q, D)
    asked = torch.einsum("bhgqd,hdr->bhgqr", asked, exact(projection))
    score = torch.einsum("bhgqr,bhtr->bhgqt", asked, exact(label))
    if bits < 16:
        score = score * index["scale"].flatten(2)[:, :, None, None]
    return score.reshape(B, Hq, Q, -1).float()
