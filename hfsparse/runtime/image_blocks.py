"""Tokens that see later ones: those of an image see all of it (Gemma 3, Gemma 4).

What tokens see is then a mask `[B, 1, Q, 2]` of whole numbers: the last column that each sees, its
own where it stands in no block, -1 in padding; and the row's first real column. A prompt follows
its plan; then its few rows that see later keys are read anew, densely.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hfsparse.runtime.layer_plan import Logits

ROWS = 1024  # queries that are read in one go: a mask of all their keys is built


def last_seen(mask_function: Callable, batch: int, columns: Tensor) -> Tensor | None:
    """[B, Q] the last column that the tokens of `columns` [Q] see; None: no blocks make this mask.

    mask_function: transformers', of indexes of row, head, query and key.
    """
    row = torch.arange(batch, device=columns.device)[:, None]
    before, behind = columns[:-1], columns[1:]
    if not bool(mask_function(row, 0, behind, before).all()):  # packed sequences
        return None
    ahead = mask_function(row, 0, before, behind).expand(batch, -1)
    last = torch.where(ahead, columns[-1], before)
    last = torch.cat([last, columns[-1:].expand(batch, 1)], 1)
    last = last.flip(1).cummin(1).values.flip(1)
    return last if bool(mask_function(row, 0, columns, last).all()) else None


def block_mask(last: Tensor, starts: list[int] | None) -> Tensor:
    """The mask of a prompt's tokens from the last column that each sees `[B, Q]`."""
    first = last.new_tensor([0] * len(last) if starts is None else starts)[:, None]
    pads = torch.arange(last.shape[1], device=last.device) < first
    return torch.stack([last.masked_fill(pads, -1), first.expand_as(last)], 2)[:, None]


def split_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What tokens see `[B, Q, 2]`, where a mask says it, and rows' first columns `[B, 1, 1, 1]`."""
    if mask is None or mask.ndim != 4 or mask.shape[3] != 2 or mask.dtype != torch.int64:
        return None, mask
    return mask[:, 0], mask[:, :, :1, 1:]


def read_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    window: int | None,
    logits: Logits,
    out: Tensor,
) -> None:
    """Write the rows of `out` `[B, Hq, Q, Dv]` that see later keys, of a prompt without a past.

    The queries are its last ones; blocks `[B, Q, 2]`: what they see.
    """
    column = torch.arange(k.shape[2], device=q.device)
    own = column[k.shape[2] - q.shape[2] :]
    for b, (last, first) in enumerate(zip(*blocks.to(q.device).unbind(2), strict=True)):
        for rows in (last > own).nonzero()[:, 0].split(ROWS):
            at = own[rows][:, None]
            kept = (column <= last[rows][:, None]) & (column >= first[rows][:, None])
            if window is not None:
                kept &= column > at - window
            one = (t[b : b + 1] for t in (q[:, :, rows], k, v))
            out[b, :, rows] = _attend(*one, kept, logits)[0].to(out.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, logits: Logits) -> Tensor:
    """Attention `[1, Hq, n, Dv]` under a mask `[n, S]`."""
    if not logits.special:
        more = {"scale": logits.scale, "enable_gqa": q.shape[1] != k.shape[1]}
        return scaled_dot_product_attention(q, k, v, attn_mask=kept, **more)
    k, v = (t.float().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.float() @ k.transpose(2, 3) * logits.scale
    if logits.softcap is not None:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    scores = scores.masked_fill(~kept, -torch.inf)
    if logits.s_aux is not None:  # one more logit, of a key without a value
        bare = logits.s_aux.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, bare], -1)
    return torch.softmax(scores, -1)[..., : k.shape[2]] @ v
