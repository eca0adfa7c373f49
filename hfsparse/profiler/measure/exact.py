"""Exact attention of a few query rows, as a measure of what patterns lose."""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.profiler.measure.capture import Seen

SPREAD = 48  # query rows over the depth of a prompt


def sampled_rows(length: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Query rows looked at, ascending, and how many rows each stands for."""
    spread = torch.linspace(0, length - 1, SPREAD, dtype=torch.float32, device=keys.device).long()
    rows = torch.cat([keys, spread]).unique()
    alone = torch.isin(rows, keys)
    others = (length - len(keys)) / (~alone).sum().clamp(min=1).float()
    return rows, torch.where(alone, 1.0, others)


def attention(seen: Seen, rows: Tensor, head: int) -> Tensor:
    """Exact attention [R, L] of one q head; a sink logit takes its share and is left out."""
    logits, k = seen.logits, seen.k[0, head // (seen.q.shape[1] // seen.k.shape[1])]
    scores = seen.q[0, head, rows].float() @ k.float().T * logits.scale
    if logits.softcap:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    at = torch.arange(len(k), device=k.device)
    scores = scores.masked_fill(at > rows[:, None], -torch.inf)
    if logits.s_aux is None:
        return torch.softmax(scores, -1)
    total = torch.logaddexp(torch.logsumexp(scores, -1), logits.s_aux[head].float())
    return torch.exp(scores - total[:, None])
