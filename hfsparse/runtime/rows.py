"""Heads and rows of a batch, taken apart and put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def _on(t: Tensor) -> AbstractContextManager:
    """Its device as the current one: Triton launches there (a model may lie on several)."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _q_heads(kv_heads: tuple[int, ...], ratio: int) -> list[int]:
    return [h * ratio + i for h in kv_heads for i in range(ratio)]


def _alike(keys: list, device: torch.device) -> Iterator[tuple[Any, Tensor | None]]:
    """Batch rows of equal key: (key, row indices), or (key, None) when all are."""
    for key in dict.fromkeys(keys):
        rows = [b for b, other in enumerate(keys) if other == key]
        yield key, None if len(rows) == len(keys) else torch.tensor(rows, device=device)


def _put(out: Tensor, rows: Tensor | None, at: slice | Tensor, part: Tensor) -> None:
    """Write a part's result into `[B, H, Q, D]` at some rows and heads."""
    if rows is None:
        out[:, at] = part
    else:
        out[rows if isinstance(at, slice) else rows[:, None], at] = part


def _some(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if rows is None else tuple(t[rows] for t in tensors)


def _empty(q: Tensor, v: Tensor) -> Tensor:
    """Room for the output `[B, H, Q, Dv]`, token by token in memory, as models want it next."""
    B, H, Q, _ = q.shape
    if torch.is_grad_enabled():  # autograd refuses some writes into a view of a leaf
        return q.new_empty(B, H, Q, v.shape[3])
    return q.new_empty(B, Q, H, v.shape[3]).transpose(1, 2)


@lru_cache(256)
def _kv_of(at: tuple[int, ...], ratio: int) -> tuple[int, ...]:
    """The kv heads of some q heads: each once where whole groups are meant, else one a q head."""
    kv = tuple(i // ratio for i in at)
    whole = all(kv.count(g) == ratio for g in kv)
    return tuple(sorted(set(kv))) if whole else kv
