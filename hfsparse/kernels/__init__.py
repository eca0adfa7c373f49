"""Which kernel serves which need: a table of capability checks, the first that fits wins.

Kernels know nothing of plans, models or caches. A check answers None, or why the kernel can't run;
`explain` prints these. New kernels are one file and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hfsparse.kernels import dense, reference


@dataclass(frozen=True)
class Kernel:
    """One row of the table: what it is called, what runs, and when it can't (None: it can)."""

    name: str
    run: Callable[..., Tensor]
    why_not: Callable[[bool, bool], str | None]  # (page or block lists, softcap or sink logits)


def _dense_only(lists: bool, logits: bool) -> str | None:
    if lists:
        return "reads every key: no block or page lists"
    return "no softcap, no sink logits" if logits else None


PREFILL = (
    Kernel("torch sdpa", dense.prefill, _dense_only),
    Kernel("reference (PyTorch)", reference.prefill, lambda lists, logits: None),
)
DECODE = (
    Kernel("torch sdpa", dense.decode, _dense_only),
    Kernel("reference (PyTorch)", reference.decode, lambda lists, logits: None),
)


def pick(table: tuple[Kernel, ...], *, lists: bool, logits: bool) -> Kernel:
    """The first kernel of a table that can serve."""
    return next(kernel for kernel in table if kernel.why_not(lists, logits) is None)
