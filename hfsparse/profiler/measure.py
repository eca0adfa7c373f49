"""What each candidate would keep and lose in one layer, on sampled query rows.

The rows' exact attention over all keys is the yardstick: recall is the share of its mass kept,
error the change of the layer's attention output after `o_proj`, relative to that output.

A ring is for good, so it is judged by what it does to the answer: the change it makes to the outputs of
its group, over all rows, times the gradient there of the answer's margin (to first order, what the margin
loses). A relative error can't tell a head that carries the answer from one that carries nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfsparse import kernels
from hfsparse.attention import Logits
from hfsparse.lists import PAGE, Grid, default_block

LAST, SPREAD = 32, 16  # query rows measured: the newest (they answer), and others over the depth
OUTPUTS = ("o_proj", "out_proj", "dense", "wo")


@dataclass(frozen=True)
class Candidates:
    """What a method lets the allocation choose from, by name."""

    patterns: dict[str, Any]  # prefill, one q head at a time
    rings: dict[str, Any]  # streaming patterns for a whole kv head: prefill, cache and decode
    selectors: dict[str, Any]  # decode of a kv head whose cache is full


def rows_of(length: int, device=None) -> Tensor:
    """The query rows measured in a prompt of `length` tokens, ascending."""
    last = min(LAST, length)
    spread = torch.linspace(length // 8, length - last - 1, SPREAD).long()
    rows = torch.cat([spread[spread >= 0], torch.arange(length - last, length)])
    return rows.unique().to(device)


def layer(
    module: Any, q: Tensor, k: Tensor, v: Tensor, logits: Logits, candidates: Candidates
) -> dict[str, np.ndarray]:
    """Measurements of one layer: arrays `[candidates, heads]` by name.

    `pattern_*` per q head: recall, error, pairs and blocks (densities); `ring_*` per kv head: recall,
    pairs, blocks; `page_*` per kv head: recall, error of the group, share of keys read.
    """
    L, Hkv = k.shape[2], k.shape[1]
    grid = Grid.causal(1, L, default_block(L), k.device)
    rows = rows_of(L, q.device)
    newest = rows >= L - LAST
    group = q.shape[1] // Hkv
    weight = _output_weight(module, q.shape[1], v.shape[3])  # [Hq, Dv, hidden]
    mass = torch.stack(  # [Hq, R, L]
        [_attention(q, k, rows, h, h // group, logits, grid) for h in range(q.shape[1])]
    )
    values = v[0].float().repeat_interleave(group, 0)
    exact = mass @ values  # [Hq, R, Dv]
    norm = torch.einsum("hrd,hdo->ro", exact, weight).norm(dim=-1).clamp(min=1e-9)  # [R]

    def change(kept: Tensor) -> tuple[Tensor, Tensor]:
        """Recall [Hq, R] and change of each head's output [Hq, R, Dv] under a mask [Hq, R, L]."""
        some = mass * kept
        recall = some.sum(-1)
        return recall, exact - some @ values / recall.clamp(min=1e-9)[..., None]

    def group_error(delta: Tensor) -> Tensor:
        """Relative error of each kv head's group, [Hkv, R]."""
        out = torch.einsum("hrd,hdo->hro", delta, weight).unflatten(0, (Hkv, group))
        return out.sum(1).norm(dim=-1) / norm

    found: dict[str, list[Tensor]] = {}

    def note(**values: Tensor) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value.float().cpu())

    def densities(lists: Any) -> tuple[Tensor, Tensor]:
        pairs = lists.pairs()[0] / grid.pairs()[0]
        return pairs, lists.blocks()[0] / grid.blocks()[0]

    for pattern in candidates.patterns.values():
        lists = pattern.lists(q, k, grid, logits.scale)
        recall, delta = change(lists.mask(rows)[0])
        error = torch.einsum("hrd,hdo->hro", delta, weight).norm(dim=-1) / norm
        pairs, blocks = densities(lists)
        note(
            pattern_recall=recall.mean(1),
            pattern_error=error.mean(1),
            pattern_pairs=pairs,
            pattern_blocks=blocks,
        )
    for ring in candidates.rings.values():
        lists = ring.lists(q, k, grid, logits.scale)
        recall = change(lists.mask(rows)[0])[0].view(Hkv, group, -1).mean((1, 2))
        pairs, blocks = (d.view(Hkv, group).mean(1) for d in densities(lists))
        note(ring_recall=recall, ring_pairs=pairs, ring_blocks=blocks)
    for selector in candidates.selectors.values():
        kept, share = _pages_kept(selector, q, k, rows[newest], logits.scale)
        everything = kept.new_ones(kept.shape[0], len(rows), L)
        everything[:, newest] = kept
        recall, delta = change(everything)
        recall = recall[:, newest].view(Hkv, group, -1).mean((1, 2))
        note(page_recall=recall, page_error=group_error(delta)[:, newest].mean(1), page_share=share)
    return {name: torch.stack(values).numpy() for name, values in found.items()}


def ring_effects(
    candidates: Candidates, out: Tensor, q: Tensor, k: Tensor, v: Tensor, logits: Logits
) -> Callable[[Tensor], np.ndarray]:
    """A function of the gradient of out `[1, Hq, L, Dv]`: each ring's effect `[rings, kv heads]`."""
    L, Hkv = k.shape[2], k.shape[1]
    group = q.shape[1] // Hkv
    heads = list(range(q.shape[1]))
    kv = torch.arange(Hkv, device=q.device).repeat_interleave(group)
    grid = Grid.causal(1, L, default_block(L), k.device)
    kernel = kernels.pick(kernels.PREFILL, lists=True, logits=logits.special)
    changes = [
        out - kernel.run(q, k, v, ring.lists(q, k, grid, logits.scale), kv, **logits.of(heads))
        for ring in candidates.rings.values()
    ]

    def effects(grad: Tensor) -> np.ndarray:
        felt = [(grad * change).float().sum((0, 2, 3)).view(Hkv, group).sum(1) for change in changes]
        return torch.stack(felt).abs().cpu().numpy()

    return effects


def _attention(q, k, rows, head, kv_head, logits: Logits, grid: Grid) -> Tensor:
    """Exact attention [R, L] of one q head's rows; a sink logit takes its share and is left out."""
    scores = q[0, head, rows].float() @ k[0, kv_head].float().T * logits.scale
    if logits.softcap:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    at = torch.arange(grid.Sk, device=q.device)
    scores = scores.masked_fill(at > rows[:, None], -torch.inf)
    if logits.s_aux is None:
        return torch.softmax(scores, -1)
    total = torch.logaddexp(torch.logsumexp(scores, -1), logits.s_aux[head].float())
    return torch.exp(scores - total[:, None])


def _pages_kept(selector, q, k, rows, scale) -> tuple[Tensor, Tensor]:
    """Keys [Hq, R, L] that decode steps at `rows` would read, and their mean share by kv head."""
    L, Hkv, group = k.shape[2], k.shape[1], q.shape[1] // k.shape[1]
    pages = torch.nn.functional.pad(k[0], (0, 0, 0, -L % PAGE), value=torch.nan)
    pages = pages.unflatten(1, (-1, PAGE))
    low = pages.nan_to_num(torch.inf).amin(2)
    high = pages.nan_to_num(-torch.inf).amax(2)
    steps = q[0, :, rows].transpose(0, 1)[:, :, None]  # each row a batch row with one new query
    spread = (len(rows), -1, -1, -1)
    chosen = selector.pages(steps, low.expand(spread), high.expand(spread), rows + 1, scale)
    used = torch.arange(chosen.pages.shape[2], device=q.device) < chosen.count[..., None]
    read = torch.zeros(len(rows), Hkv, low.shape[1] + 1, dtype=torch.bool, device=q.device)
    read.scatter_(2, torch.where(used, chosen.pages, low.shape[1]), True)
    read = read[..., :-1].repeat_interleave(PAGE, 2)[..., :L]
    read = read & (torch.arange(L, device=q.device) <= rows[:, None])[:, None]
    share = (read.sum(2) / (rows + 1)[:, None]).mean(0)
    return read.transpose(0, 1).repeat_interleave(group, 0), share


def _output_weight(module: Any, heads: int, dim: int) -> Tensor:
    """The output projection's columns of each head, `[Hq, Dv, hidden]`, float32."""
    out = next((getattr(module, name) for name in OUTPUTS if hasattr(module, name)), None)
    weight = getattr(out, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.shape[1:] != (heads * dim,):
        eye = torch.eye(heads * dim, device=next(module.parameters()).device)
        eye = eye.to(next(p.dtype for p in module.parameters() if p.is_floating_point()))
        if out is None:
            return eye.float().view(heads, dim, -1)
        weight = (out(eye) - out(eye[:1] * 0)).T  # packed weights: ask the module
    return weight.float().T.reshape(heads, dim, -1)
