"""Dual Chunk Attention by its definition (arXiv 2402.17463): three parts, merged by LSE."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, config, rule) -> Tensor:
    """Attention `[H, n, Dv]` of a row's last queries q `[H, n, D]` over all its k, v `[H, S, D]`.

    q and k come rotated at their positions, as caches hold them. kept bool `[H, n, S]`.
    """
    S, n, s = k.shape[1], rule.chunk - rule.local, rule.chunk
    rope, D = config.rope_parameters, k.shape[2]
    base = rope.get("full_attention", rope)["rope_theta"]
    inv_freq = base ** (-torch.arange(0, D, 2).double() / D)
    i, j = torch.arange(S - q.shape[1], S), torch.arange(S)
    raw_q, raw_k = (_turn(t.double(), -at, inv_freq) for t, at in ((q, i), (k, j)))
    k, v = _turn(raw_k, j % n, inv_freq), v.double()
    behind = i[:, None] // n - j // n  # chunks from a key's to its query's
    parts = (
        (i % n, behind == 0),  # its own
        ((i % n + n).clamp(max=s), behind == 1),  # the one before
        (torch.full_like(i, min(2 * n - 1, s)), behind > 1),  # older ones
    )
    sharper = [(1 + rule.mscale * math.log(max((p + 1) / rule.trained, 1))) ** 2 for p in i]
    outs, sums = [], []
    for at, keys in parts:
        logits = _turn(raw_q, at, inv_freq) @ k.mT * scale * torch.tensor(sharper)[:, None]
        logits = logits.masked_fill(~(kept & keys), -torch.inf)
        outs.append(torch.softmax(logits, -1).nan_to_num(0) @ v)
        sums.append(logits.logsumexp(-1))
    weight = torch.softmax(torch.stack(sums), 0)[..., None]
    return (weight * torch.stack(outs)).sum(0).float()


def _turn(x: Tensor, at: Tensor, inv_freq: Tensor) -> Tensor:
    """x `[H, n, D]` turned by `at` [n] positions more."""
    turned = torch.polar(torch.ones(()).double(), at[:, None].double() * inv_freq)
    pairs = torch.complex(*x.chunk(2, -1)) * turned
    return torch.cat([pairs.real, pairs.imag], -1)
