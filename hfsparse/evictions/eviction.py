"""What an eviction is, and the kinds that plans may name.

    @register("snapkv")
    @dataclass(frozen=True)
    class SnapKV:
        size: int = 1024                                          # its parameters in plans

        def scores(self, q, k, grid, scale, softcap, s_aux) -> Tensor: ...

A prompt, or a chunk behind a past, is read before anything of it is evicted. Then a row's newest
`window` keys stay, and those of the highest scores, `size` in all. What is evicted is gone: what a
later question would ask for plays no part in it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hfsparse.lists import Grid
from hfsparse.registry import Registry, require

EVICTIONS = Registry("scores")

register = EVICTIONS.register


class Eviction(Protocol):
    """What caches ask of an eviction. Numbers out of range are refused (`require`)."""

    kind: str  # set by `register`
    # Whether scores of calls add up, and steps evict, too: the cache stays at `size`. If not, each
    # prompt and chunk ranks anew all that is held, and steps are kept until the next does.
    adds_up: bool
    decay: float  # where they add up: what is left of a sum one query later, 0 to 1; 1: all of it

    size: int  # keys that a kv head keeps
    window: int  # of these, how many are its newest, whatever their scores; fewer than `size`

    @property
    def watched(self) -> int | None:
        """How many of a call's newest queries are shown to `scores`; None: all."""
        ...

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        grid: Grid,
        scale: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """What each key is worth: `[B, H, Sk]` float32, of q `[B, Hq, Sq, D]`, k `[B, H, Sk, D]`.

        The grid says which are real: where it has none, q and k may hold anything, NaN included,
        and scores may be anything, too. A key's place is its slot: keys that were evicted before
        have left none. The heads of a group lie side by side. scale, softcap and s_aux `[Hq]` make
        logits of products, as kernels take them.
        """
        ...


def require_sizes(given: Eviction) -> None:
    """Raise UsageError unless there are newest keys that stay, and others to choose."""
    size, window = given.size, given.window
    require(window >= 1, f"window is {window}: give 1 or more keys")
    require(
        size > window,
        f"size is {size}, window {window}: give a size above the window, or scores choose nothing "
        "(a streaming pattern keeps the newest keys)",
    )


def best_keys(eviction: Eviction, score: Tensor, held: Tensor, left: Tensor, most: int) -> Tensor:
    """Slots `[B, H, most]` of the keys that stay, ascending: `left` [B] of the first `held` [B].

    score `[B, H, S]`; of equal ones the first stay. Behind `left` slots lie any.
    """
    slots = score.shape[2]
    slot, ends = torch.arange(slots, device=score.device), held[:, None, None]
    score = score.masked_fill(slot >= ends - eviction.window, torch.inf)
    score = score.masked_fill(slot >= ends, -torch.inf)
    best = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :most]
    beyond = torch.arange(most, device=score.device) >= left[:, None, None]
    return best.masked_fill(beyond, slots).sort(-1).values.clamp(max=slots - 1)
