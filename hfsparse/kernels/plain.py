"""What PyTorch does where no kernel can: patterns and selectors choose by their own definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from hfsparse.kernels.codes import Quantised
from hfsparse.lists import BlockLists, Grid, PageLists
from hfsparse.lists.choice import Choice

# How models write an RMS norm: they round before they weigh, or behind it, or weigh by one more.
NORM_FORMS = ("rounded", "whole", "one more")
# The activations of an MLP's gate.
GATE_FORMS = ("silu", "gelu, by a tanh")


def estimate(pattern, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """`pattern.lists`."""
    return pattern.lists(q, k, grid, scale)


def select(
    selector,
    q: Tensor,
    index: dict[str, Tensor],
    length: Tensor,
    scale: float,
    heads: slice | Tensor = slice(None),
    below: int = 0,
    choice: Choice | None = None,
    read: Tensor | None = None,
) -> PageLists:
    """`selector.pages` of some heads of q; a choice that is kept is renewed where it is due."""
    lists = selector.pages(q[:, heads], index, length, scale)
    lists = replace(lists, count=lists.count.masked_fill((length < below)[:, None], 0))
    if choice is not None:
        lists = choice.renew(lists, length, selector.budget.refresh)
    if read is not None:
        read += lists.keys(length).sum(0)
    return lists


def count(lists: BlockLists) -> Tensor:
    """`lists.pairs()`, which looks at no more blocks than some query block reads in part."""
    some = lists.part_index[..., : int(lists.part_count.max())]
    return replace(lists, part_index=some).pairs()


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """`linear` of x `[..., K]` with each of weights `[Ni, K]` and its bias, side by side."""
    return torch.cat([linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    """x `[..., N]` by the root of its mean square, and weight `[N]`; form: of NORM_FORMS."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == "rounded":
        return weight * wide.to(x.dtype)
    return (wide * (1.0 + weight.float() if form == "one more" else weight)).to(x.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q `[B, H, S, D]` and k `[B, Hkv, S, D]`, whose halves are turned by angles of which cos and
    sin `[B or 1, S, D]` are given (RoPE, arXiv 2104.09864)."""
    made = []
    for x in (q, k):
        low, high = x.chunk(2, -1)
        made.append(x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None])
    return tuple(made)


def gated(gate: Tensor, up: Tensor, form: str) -> Tensor:
    """The activation of gate `[..., N]`, times up `[..., N]`; form: of GATE_FORMS."""
    return (silu(gate) if form == "silu" else gelu(gate, approximate="tanh")) * up


def quantised(x: Tensor, matrices: Sequence[Quantised], biases: Sequence[Tensor | None]) -> Tensor:
    """`linear` of x `[..., K]` with the numbers of each matrix `[Ni, K]` and its bias, side by
    side, in float32 and rounded to x's type."""
    biases = [None if bias is None else bias.float() for bias in biases]
    parts = [
        linear(x.float(), matrix.numbers(), bias)
        for matrix, bias in zip(matrices, biases, strict=True)
    ]
    return torch.cat(parts, -1).to(x.dtype)
