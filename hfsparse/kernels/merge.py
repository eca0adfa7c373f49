"""Attention over parts of a row, joined into attention over all of it.

    merged = Merged(out, lse)       # of some keys
    merged.add(other, other_lse)    # of others
    merged.out, merged.lse
    join(out, lse, heads, other, other_lse)     # for some heads alone, in the dtype of `out`

Each part counts by the exponential of its LSE, as in Flash-Decoding and Ring Attention
(arXiv 2310.01889). Kernels fill LSE where they are given a tensor for it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Merged:
    """Attention `[..., Dv]` over keys that were added, in float32, and its LSE `[...]`.

    A part in which a query reads nothing has an LSE of -inf, and changes no bit.
    """

    def __init__(self, out: Tensor, lse: Tensor):
        self.out, self.lse = out.float(), lse

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Add attention over other keys."""
        top = torch.maximum(self.lse, lse)
        base = top.masked_fill(top == -torch.inf, 0)  # queries that have read nothing yet
        old, new = (torch.exp(each - base)[..., None] for each in (self.lse, lse))
        total = old + new
        total = total.masked_fill(total == 0, 1)
        self.out = (self.out * old + out.float() * new) / total
        self.lse = top + total.log()[..., 0]


def join(out: Tensor, lse: Tensor, at: slice | Tensor, other: Tensor, more: Tensor) -> Tensor:
    """`out` `[B, H, Q, Dv]` whose heads `at` attend to the keys of `other` `[B, n, Q, Dv]`, too.

    lse `[B, H, Q]`, more `[B, n, Q]`: the LSE of each by itself.
    """
    merged = Merged(out[:, at], lse[:, at])
    merged.add(other, more)
    found = out.clone()  # what it is made of stays as it is, for gradients
    found[:, at] = merged.out.to(out.dtype)
    return found
