"""Heads whose blocks positions alone choose: a window, every n-th block, the first, random ones.

Strides are those of Sparse Transformers (arXiv 1904.10509); heads of other `shift`s share the row
among them, as in S2-Attention (arXiv 2407.17678); random blocks are BigBird's (arXiv 2007.14062).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.pattern import register
from hfsparse.registry import require


@register("strided")
@dataclass(frozen=True)
class Strided:
    """Sink and window in tokens, of which whole blocks are read; strides and random in blocks."""

    sink: int = 64
    recent: int = 256
    stride: int = 8
    shift: int = 0
    random: int = 0
    seed: int = 0

    def __post_init__(self):
        require(self.sink >= 0, f"sink is {self.sink}: give 0 or more tokens")
        require(self.recent >= 1, f"recent is {self.recent}: give 1 or more tokens")
        require(self.stride >= 0, f"stride is {self.stride}: give 1 or more blocks, or 0 for none")
        require(
            0 <= self.shift < max(self.stride, 1),
            f"shift is {self.shift}: give 0 or more and less than stride, which is {self.stride}",
        )
        require(self.random >= 0, f"random is {self.random}: give 0 or more blocks")
        require(0 <= self.seed < 1 << 31, f"seed is {self.seed}: give 0 to {(1 << 31) - 1}")

    def lists(self, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
        """Blocks kept for q `[B, H, Sq, D]`; only positions decide, q and k are not read."""
        return self.placed(grid, q.shape[1])

    def placed(self, grid: Grid, heads: int) -> BlockLists:
        """Blocks kept by so many heads.

        What a query reads follows from the number of its block in the row. Where a past is no
        multiple of a block, queries that go together are of two, and read what both read.
        """
        ends = torch.stack([grid.q_first, grid.q_last]) // grid.block  # [2, B, nq]
        keep = self._kept(ends[..., None], grid.nk, grid.block).any(0)
        return BlockLists.of(grid, heads, keep[:, None])

    def _kept(self, query: Tensor, blocks: int, block: int) -> Tensor:
        """Which of the row's blocks the blocks of queries `[..., 1]` read, `[..., blocks]`."""
        key = torch.arange(blocks, device=query.device)
        keep = (key * block < self.sink) | (key == 0)
        keep = keep | (key >= (query * block - self.recent + 1) // block)
        if self.stride:
            keep |= (query - key) % self.stride == self.shift
        keep &= key <= query
        if self.random:
            drawn = _mixed(_mixed(query + _mixed(self.seed)) + key) * blocks + key  # no two alike
            drawn = drawn.masked_fill(keep | (key > query), torch.iinfo(drawn.dtype).max)
            few = drawn.topk(min(self.random, blocks), largest=False).indices
            keep = keep.scatter(-1, few, True) & (key <= query)
        return keep


def _mixed(number):
    """32 bits that look random, of a number or of each of a tensor's; no product overflows."""
    number = number % (1 << 32)
    for _ in range(2):
        number = (number ^ (number >> 16)) * 0x45D9F3B % (1 << 32)
    return number ^ (number >> 16)
