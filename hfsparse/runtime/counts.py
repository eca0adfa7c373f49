"""What a layer computed and read, for `stats()`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from hfsparse.lists import BlockLists
from hfsparse.stats import Work

Table = dict[tuple[int, ...], list[int]]  # by q heads: pairs, blocks


class Counts:
    """What one layer computed for prompts since the last reset, and what dense attention would."""

    def __init__(self, q_heads: int):
        self.q_heads = q_heads
        self.read: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.fetched: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.reset()

    def reset(self) -> None:
        # Prompts, by q head: pairs and blocks; of heads that follow lists the device knows them.
        # What dense attention would compute, of heads that were computed so, and by lists.
        self.whole: Table = {}
        self.listed: Table = {}
        self.kept = _zeros(2, self.q_heads, dtype=torch.float64)
        self.cut = _zeros(self.q_heads)  # query blocks, by a max_share
        # Prompts under a skip threshold, by q head: tiles skipped, tiles looked at.
        self.skipped = _zeros(self.q_heads, 2)
        for found in self.of_steps():
            found.zero_()  # recorded steps go on adding to it

    @staticmethod
    def add(table: Table, heads: tuple[int, ...], work: tuple[int, int]) -> None:
        """To `whole` or `listed`: pairs and blocks of dense attention, of each of these heads."""
        held = table.setdefault(heads, [0, 0])
        held[0], held[1] = held[0] + work[0], held[1] + work[1]

    def add_lists(
        self,
        heads: tuple[int, ...],
        at: slice | Tensor,
        lists: BlockLists,
        pairs: Tensor,
        work: tuple[int, int],
    ) -> None:
        """Heads that followed lists, an index of them, pairs `[B, H]` that the lists keep, and the
        work of dense attention."""
        self.add(self.listed, heads, work)
        device = lists.full_count.device
        self.kept = _moved(self.kept, device)
        self.kept[:, at] += torch.stack([pairs.sum(0), lists.blocks().sum(0)])
        if lists.cut is not None:
            self.cut = _moved(self.cut, device)
            self.cut[at] += lists.cut.sum(0)

    def add_skipped(self, at: slice | Tensor, tiles: Tensor) -> None:
        """tiles [heads, 2]: skipped, and looked at."""
        self.skipped = _moved(self.skipped, tiles.device)
        self.skipped[at] += tiles

    def read_by(self, heads: tuple[int, ...], device: torch.device) -> Tensor:
        """[heads] keys that decode steps of kv heads read, where only the device knows."""
        if (heads, device) not in self.read:
            self.read[heads, device] = _zeros(len(heads), device=device)
        return self.read[heads, device]

    def fetched_by(self, heads: tuple[int, ...], device: torch.device) -> Tensor:
        """[heads, 2] units in host memory that decode steps fetched, and that they read."""
        if (heads, device) not in self.fetched:
            self.fetched[heads, device] = _zeros(len(heads), 2, device=device)
        return self.fetched[heads, device]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Steps that run meanwhile are not counted."""
        before = {id(t): t.clone() for t in self.of_steps()}
        yield
        for t in self.of_steps():
            t.copy_(before.get(id(t), torch.zeros_like(t)))

    def of_steps(self) -> list[Tensor]:
        """What decode steps add to, on their devices."""
        return [*self.read.values(), *self.fetched.values()]

    def found(self, kv_heads: int) -> Work:
        """By kv head: units of pages in host memory that the GPU held, of those that were read."""
        table = np.zeros((2, kv_heads), dtype=np.int64)
        for (heads, _), counted in self.fetched.items():
            fetched, read = counted.cpu().numpy().T
            table[:, heads] += np.stack([read - fetched, read])
        return Work(*table.tolist())

    def keys_read(self, heads: tuple[int, ...]) -> list[int]:
        found = [read.cpu() for (own, _), read in self.read.items() if own == heads]
        return sum(found, _zeros(len(heads))).tolist()

    def work(self) -> tuple[Work, Work]:
        """Pairs and blocks of prompts, by q head."""
        kept, dense = self.kept.cpu().numpy().copy(), np.zeros((2, self.q_heads))
        for tables, found in (((kept, dense), self.whole), ((dense,), self.listed)):
            for heads, work in found.items():
                for table in tables:
                    table[:, heads] += np.array(work)[:, None]
        pairs, blocks = (Work(*each) for each in zip(kept.tolist(), dense.tolist(), strict=True))
        return pairs, blocks


def _zeros(*shape: int, dtype=torch.int64, device: torch.device | str = "cpu") -> Tensor:
    """What is counted in, in any mode."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


def _moved(t: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return t.to(device)
