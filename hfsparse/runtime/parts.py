"""Context parallel: which tokens of a prompt are read, and kept, by which rank of a group.

context = ContextParallel(group, way="star")
parts = context.parts(1_000_000, device)
parts.kept[context.rank]    # ((start, end), …) of the prompt
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import distributed

from hfsparse.errors import PatchError
from hfsparse.lists import PAGE, default_block
from hfsparse.registry import require

Runs = tuple[tuple[int, int], ...]  # first positions, and the ends behind their last


@dataclass(frozen=True)
class Parts:
    """A prompt's tokens by rank; the last one has the newest, and takes those to come."""

    tokens: int  # that are shared; every rank reads those behind, as new ones
    kept: tuple[Runs, ...]  # by rank, ascending: whose keys it keeps
    read: tuple[Runs, ...]  # by rank: which it reads, the kept ones last
    alone: bool  # whether a rank's tokens attend to those alone that it reads


def share_exactly(tokens: int, unit: int, context: ContextParallel) -> Parts:
    """Every query reads its keys wherever they lie.

    A causal row costs more the later it comes: rank r of N has parts N - 1 - r and N + r of 2 N,
    which together cost the same on each. A part is read as a chunk behind its past.
    """
    ranks = context.ranks
    ends = _cut(tokens, 2 * ranks, unit)
    pairs = [(ranks - 1 - rank, ranks + rank) for rank in range(ranks)]
    runs = tuple(tuple((ends[at], ends[at + 1]) for at in pair) for pair in pairs)
    return Parts(tokens, runs, runs, alone=False)


def share_as_star(tokens: int, unit: int, context: ContextParallel) -> Parts:
    """Star Attention (arXiv 2411.17116): each rank reads its own part of the context behind an
    anchor, the context's first tokens, and no other key; all read the question behind it."""
    shared = max(tokens - context.question, 0)
    ends = _cut(shared, context.ranks, unit, context.question)
    kept = tuple(((start, end),) for start, end in pairwise(ends))
    most = ends[1] if context.anchor is None else context.anchor
    anchors = [((0, min(most, start)),) if most and start else () for ((start, _),) in kept]
    read = tuple(anchor + own for anchor, own in zip(anchors, kept, strict=True))
    return Parts(shared, kept, read, alone=True)


def _cut(tokens: int, parts: int, unit: int, question: int = 0) -> list[int]:
    """Ends of so many parts, in whole units but for the last; PatchError where one would be empty.

    Units are pages and blocks, so that no list is another than in one process.
    """
    units = -(-tokens // unit)
    if units < parts:
        behind = f" and {question} of the question" if question else ""
        raise PatchError(
            f"a prompt of {tokens + question} tokens is too short for its ranks to share: they "
            f"take {parts} parts of {unit} tokens or more{behind}. Give a longer prompt or fewer "
            "ranks, or read it without context_parallel"
        )
    return [min(part * units // parts * unit, tokens) for part in range(parts + 1)]


WAYS: dict[str, Callable[[int, int, ContextParallel], Parts]] = {
    "exact": share_exactly,
    "star": share_as_star,
}


@dataclass(frozen=True)
class ContextParallel:
    """How the ranks of a process group share the tokens of each prompt, in `hfsparse.patch`.

    group: of torch.distributed; the model is whole on each rank. way: `exact`, every query reads
    what the plan says, wherever it lies; `star`, by Star Attention, a query reads the anchor and
    its own rank's part. Of `star` alone: question, how many of a prompt's last tokens read all
    parts; anchor, how many of its first ones stand in front of each part, None: as many as a part
    has. Raises an Error for what is none of these.
    """

    group: Any
    way: str = "exact"
    question: int = 128
    anchor: int | None = None

    def __post_init__(self):
        if not isinstance(self.group, distributed.ProcessGroup):
            raise PatchError(
                f"context_parallel is a {type(self.group).__name__}: give a process group of "
                "torch.distributed (distributed.group.WORLD is that of all ranks), or a "
                "ContextParallel of one"
            )
        if distributed.get_rank(self.group) < 0:
            raise PatchError("this rank is not in the group of context_parallel: give it its own")
        require(self.way in WAYS, f"way is {self.way!r}: give {' or '.join(WAYS)}")
        whole = type(self.question) is int and self.question >= 1
        require(whole, f"question is {self.question!r}: give tokens, 1 or more")
        whole = self.anchor is None or (type(self.anchor) is int and self.anchor >= 0)
        require(whole, f"anchor is {self.anchor!r}: give tokens, 0 or more, or None")
        if self.way != "star":
            require(self.anchor is None, f"way is {self.way}, which has no anchor: leave it out")

    @classmethod
    def of(cls, given: Any) -> ContextParallel | None:
        """What `patch` is given: one of these, a group, or None."""
        return given if given is None or isinstance(given, cls) else cls(given)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks}, its own tokens ({self.settings})"

    @property
    def settings(self) -> str:
        """What must be the same on all ranks."""
        if self.way != "star":
            return self.way
        anchor = "a part" if self.anchor is None else self.anchor
        return f"star, anchor {anchor}, question {self.question}"

    @property
    def rank(self) -> int:
        return distributed.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return distributed.get_world_size(self.group)

    @property
    def newest(self) -> bool:
        """Whether this rank keeps the tokens that come behind a prompt."""
        return self.rank == self.ranks - 1

    def parts(self, tokens: int, device: torch.device) -> Parts:
        """Of a prompt of so many tokens; PatchError where it is too short."""
        unit = max(PAGE, default_block(tokens, device))
        return WAYS[self.way](tokens, unit, self)
