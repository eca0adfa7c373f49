"""The attention that keys get, summed over queries in tiles of bounded size."""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.lists import Grid
from hfsparse.precision import exact

TILE = 1 << 24  # logits in the largest temporary


def attention_got(
    q: Tensor,
    k: Tensor,
    grid: Grid,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    decay: float = 1.0,
) -> Tensor:
    """Softmax weights that each key gets: summed over queries, averaged over a group's q heads.

    `[B, H, Sk]` float32, of q `[B, Hq, Sq, D]` over k `[B, H, Sk, D]`; 0 where the grid has no key.
    decay: what a query counts for beside the next one; 0: the row's last alone counts.
    """
    (B, Hq, Sq, D), (H, Sk) = q.shape, k.shape[1:3]
    group, k, key = Hq // H, exact(k), grid.key_pos[:, None, None, None, :Sk]
    q = exact(q).view(B, H, group, Sq, D)
    bare = None if s_aux is None else s_aux.to(q).view(1, H, group, 1, 1)
    got = torch.zeros(B, H, Sk, device=q.device)
    step = max(1, TILE // max(1, B * Hq * Sk))
    for rows in torch.arange(Sq, device=q.device).split(step):
        at = grid.query_pos(rows)[:, None, None, :, None]
        kept = (key >= 0) & (key <= at)
        logits = torch.einsum("bhgqd,bhsd->bhgqs", q[:, :, :, rows], k) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~kept, -torch.inf)
        if bare is not None:  # one more logit, of a key without a value
            logits = torch.cat([logits, bare.expand(B, -1, -1, len(rows), -1)], -1)
        weights = torch.softmax(logits, -1)[..., :Sk].masked_fill(~kept, 0)
        if decay != 1:
            weights *= decay ** (grid.k_len[:, None, None, None, None] - 1 - at).clamp(min=0)
        got += weights.sum((2, 3)).float()
    return got / group
