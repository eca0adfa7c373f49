"""Exact attention of a few query rows, as a measure of what patterns lose."""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.profiler.measure.capture import Seen
from hfsparse.runtime.layer_plan import Logits

SPREAD = 48  # query rows over the depth of a prompt


def sample_rows(length: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Query rows to measure, ascending, and how many rows each represents."""
    spread = torch.linspace(0, length - 1, SPREAD, dtype=torch.float32, device=keys.device).long()
    rows = torch.cat([keys, spread]).unique()
    alone = torch.isin(rows, keys)
    others = (length - len(keys)) / (~alone).sum().clamp(min=1).float()
    return rows, torch.where(alone, 1.0, others)


def attention(seen: Seen, rows: Tensor, head: int) -> Tensor:
    """Exact attention [R, L] of one q head; a sink logit takes its share and is left out."""
    k = seen.k[0, head // (seen.q.shape[1] // seen.k.shape[1])]
    return attend(seen.q[0, head, rows], k, rows, seen.logits, head)


def attend(q: Tensor, k: Tensor, rows: Tensor, logits: Logits, heads: int | slice) -> Tensor:
    """Exact attention [..., R, L] of q `[..., R, D]` at `rows` [R], float32; k `[L, D]`.

    `heads` is which q heads these are: their sink logits take a share, which is left out.
    """
    return weigh(scores_of(q, k, logits), rows, logits, heads)


def scores_of(q: Tensor, k: Tensor, logits: Logits) -> Tensor:
    """Logits [..., R, L] of q `[..., R, D]` for k `[L, D]`, float32."""
    scores = q.float() @ k.float().T * logits.scale
    return logits.softcap * torch.tanh(scores / logits.softcap) if logits.softcap else scores


def weigh(scores: Tensor, rows: Tensor, logits: Logits, heads: int | slice) -> Tensor:
    """Attention of logits [..., R, L], as `attend` has it."""
    later = torch.arange(scores.shape[-1], device=scores.device) > rows[:, None]
    scores = scores.masked_fill(later, -torch.inf)
    if logits.s_aux is None:
        return torch.softmax(scores, -1)
    total = torch.logaddexp(scores.logsumexp(-1), logits.s_aux[heads, None].float())
    return torch.exp(scores - total[..., None])
