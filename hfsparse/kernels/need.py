"""What a kernel is asked for, and what a row of the tables says of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Need(NamedTuple):
    """What a kernel is asked for. Each table looks at what matters to it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int  # of q and k
    value_dim: int
    lists: bool = False  # block or page lists
    logits: bool = False  # softcap or sink logits
    grad: bool = False
    block: int = 128  # tokens in a block of the lists
    tokens: int = 1 << 20  # keys
    plain: bool = True  # no padding, no past
    skip: bool = False  # a threshold under which tiles are skipped
    lse: bool = False  # the logarithm of each query's sum of exponentials, too
    latents: bool = False  # values are the first dims of their keys, and lie there alone
    bands: bool = False  # rings, of which new tokens read a window
    dropped: bool = False  # a ring that has dropped keys is part of the grid
    packed: bool = False  # some keys of the cache lie in fewer bits
    hosted: bool = False  # some keys of the cache lie in host memory
    pooled: bool = False  # rows lie in the pages of a pool
    prompt: bool = False  # append: not a step's tokens, but those of rows without a past
    slots: int = 0  # of the hot set that keys are fetched into
    chooser: Any = None  # the pattern or selector that is to choose
    index_dtype: torch.dtype | None = None  # of what a selector reads of the cache; None: as q
    codes: torch.dtype | None = None  # of a quantised matrix

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None = None, **more) -> Need:
        """For q `[B, H, Sq, D]`, k `[B, Hkv, Sk, D]`, v `[B, Hkv, Sk, Dv]` and sink logits."""
        grad = torch.is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (s_aux is not None and s_aux.requires_grad)
        )
        return cls(q.device, q.dtype, q.shape[-1], v.shape[-1], grad=grad, **more)


@dataclass(frozen=True, eq=False)
class Kernel:
    """One row of a table: what it is called, what runs, and when it can't (None: it can)."""

    name: str
    run: Callable[..., Any]  # as the table's other rows: hfsparse/kernels/table.py
    why_not: Callable[[Need], str | None]
    fused: bool = False  # prefill: block lists cost no more host time or memory than whole rows
    # decode, append and fetch: rows' lengths are read on the device, and nothing that lies beyond
    # them: room in the cache costs nothing, and a step recorded as a CUDA graph serves longer rows.
    device_lengths: bool = False
