"""What a call leaves out, by means: attention to mean keys, each with the weight of its tokens.

A block or unit of m tokens that is not read enters the softmax as one key: its logit is that of the
mean key plus ln m, its value the mean value (RetroInfer's estimation zone, arXiv 2505.02922;
FlashPrefill V2, arXiv 2603.06199; without what is trained, Scatterbrain, arXiv 2110.15343). A
kernel attends to what is read and gives its LSE; `decode` and `prefill` here do so of the means;
`merge.join` makes one attention of both. Plain PyTorch, float32 inside, no host waits. Bound by
bytes in steps: two means a unit.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from hfsparse.lists import BlockLists, PageLists
from hfsparse.patterns.blocks import means
from hfsparse.precision import without_autocast

PAIRS = 1 << 22  # pairs of a query and a mean in the largest temporary


@without_autocast
def decode(
    q: Tensor,
    index: dict[str, Tensor],
    lists: PageLists,
    query_pos: Tensor,
    corrected: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """New queries q `[B, Hq, Q, D]` over the means of the whole units that are not listed.

    index: `mean_key` and `mean_value` `[B, H, P, each, D]` of P pages (`selectors.means`).
    query_pos [B, Q], -1 where a row has no query; corrected [B] bool: rows that read lists at all.
    Returns attention `[B, Hq, Q, Dv]` and its `lse` `[B, Hq, Q]`, both float32.
    """
    k, v = (index[name].flatten(2, 3).float() for name in ("mean_key", "mean_value"))
    U, unit = k.shape[2], lists.unit
    used = torch.arange(lists.pages.shape[2], device=q.device) < lists.count[..., None]
    read = torch.zeros(*k.shape[:2], U + 1, dtype=torch.bool, device=q.device)
    read.scatter_(2, torch.where(used, lists.pages, U), True)
    seen = (torch.arange(U, device=q.device) + 1) * unit <= query_pos[..., None] + 1  # [B, Q, U]
    kept = ~read[..., None, :U] & (seen & corrected[:, None, None])[:, None]  # [B, H, Q, U]
    dead = ~seen.any(1)[:, None, :, None]  # of no whole unit: it may hold anything
    k, v = (t.masked_fill(dead, 0) for t in (k, v))
    return _attend(q, k, v, kept, log(unit), scale, softcap)


@without_autocast
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    kv_heads: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries q `[B, H, Sq, D]` over the means of blocks of k, v `[B, Hkv, Sk, D]` that they see
    whole and do not read.

    kv_heads [H]: the kv head that each q head reads. Returns attention `[B, H, Sq, Dv]` and its
    `lse` `[B, H, Sq]`, both float32.
    """
    grid, B, H = lists.grid, *q.shape[:2]
    k, v = (means(t, grid.live, grid.block)[:, kv_heads] for t in (k, v))
    unread = ~lists.kept_blocks().expand(B, H, -1, -1) & (grid.live > 0)[:, None, None]
    first, last = grid.first[:, None], (grid.first + grid.live - 1)[:, None]
    weight, found = grid.live.clamp(min=1).log()[:, None, None], []
    step = max(1, PAIRS // (B * H * max(grid.nk, 1)))
    for rows in torch.arange(grid.Sq, device=q.device).split(step):
        at = grid.query_pos(rows)[..., None]  # [B, R, 1]
        whole = last <= at
        if grid.window is not None:
            whole &= at - first < grid.window
        kept = unread[:, :, rows // grid.block] & whole[:, None]
        found.append(_attend(q[:, :, rows], k, v, kept, weight, scale, softcap))
    return tuple(torch.cat(parts, 2) for parts in zip(*found, strict=True))


def _attend(q, k, v, kept, weight, scale, softcap) -> tuple[Tensor, Tensor]:
    """Attention of q `[B, Hq, Q, D]` to float32 k, v `[B, H, n, D]` that are `kept`, with `weight`
    beside each logit."""
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("bhgqd,bhnd->bhgqn", grouped, k).flatten(1, 2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    kept = kept.repeat_interleave(logits.shape[1] // kept.shape[1], 1)
    logits = (logits + weight).masked_fill(~kept, -torch.inf)
    lse = logits.logsumexp(-1)
    share = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    share = share.unflatten(1, (k.shape[1], -1))
    return torch.einsum("bhgqn,bhnd->bhgqd", share, v).flatten(1, 2), lse
