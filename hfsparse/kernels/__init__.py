"""Which kernel serves which need: a table of capability checks, the first that fits wins.

Kernels know nothing of plans, models or caches. A check answers None, or why the kernel can't run;
`explain` prints these. New kernels are one file and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from hfsparse.kernels import dense, reference
from hfsparse.lists import BlockLists, Grid, PageLists
from hfsparse.lists.choice import Choice
from hfsparse.lists.places import Places


@dataclass(frozen=True)
class Need:
    """What a kernel is asked for."""

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

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None = None, **more) -> Need:
        """For q `[B, H, Sq, D]`, k `[B, Hkv, Sk, D]`, v `[B, Hkv, Sk, Dv]` and sink logits."""
        given = (q, k, v) if s_aux is None else (q, k, v, s_aux)
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        return cls(q.device, q.dtype, q.shape[-1], v.shape[-1], grad=grad, **more)


@dataclass(frozen=True)
class Kernel:
    """One row of the table: what it is called, what runs, and when it can't (None: it can)."""

    name: str
    run: Callable[..., Tensor]
    why_not: Callable[[Need], str | None]


def _dense_only(need: Need) -> str | None:
    if need.lists:
        return "reads every key: no block or page lists"
    if need.skip:
        return NO_SKIP
    return "no softcap, no sink logits" if need.logits else None


def _no_triton(need: Need) -> str | None:
    """Why Triton kernels can't run at all: they are imported where this says None."""
    if not _installed("triton"):
        return "Triton is not installed"
    if need.device.type != "cuda" and not import_module("triton").knobs.runtime.interpret:
        return f"needs a CUDA device, not {need.device.type}"
    return None


def _triton_prefill(need: Need) -> str | None:
    return _no_triton(need) or import_module("hfsparse.kernels.triton.prefill").why_not(need)


def _triton_decode(need: Need) -> str | None:
    return _no_triton(need) or import_module("hfsparse.kernels.triton.decode").why_not(need)


def _fa4(need: Need) -> str | None:
    if need.skip:
        return NO_SKIP
    fa4 = import_module("hfsparse.kernels.fa4")
    if why := fa4.why_not(need):
        return why
    if need.tokens < FA4_PAYS:
        return f"others are faster under {FA4_PAYS:,} tokens"
    return None if need.lists or need.plain else "no full heads with padding or a past"


def _fa4_prefill(q: Tensor, k: Tensor, v: Tensor, what: BlockLists | Grid, *args, **more) -> Tensor:
    fa4 = import_module("hfsparse.kernels.fa4")
    if isinstance(what, Grid):
        return fa4.dense(q, k, v, **more)
    return fa4.prefill(q, k, v, what, *args, **more)


def _lazily(module: str, function: str) -> Callable[..., Tensor]:
    """A kernel that is imported when it first runs."""
    return lambda *args, **more: getattr(import_module(module), function)(*args, **more)


_installed = cache(lambda name: find_spec(name) is not None)

NO_SKIP = "no skip threshold"
FA4_PAYS = 8192  # benchmarks/prefill.py: below, its host time counts

PREFILL = (
    Kernel("FA4", _fa4_prefill, _fa4),
    Kernel("torch sdpa", dense.prefill, _dense_only),
    Kernel("Triton", _lazily("hfsparse.kernels.triton.prefill", "prefill"), _triton_prefill),
    Kernel("reference (PyTorch)", reference.prefill, lambda need: None),
)
DECODE = (  # the first serves all stores of a layer at once, the others one store a call
    Kernel("Triton", _lazily("hfsparse.kernels.triton.decode", "decode"), _triton_decode),
    Kernel("torch sdpa", dense.decode, _dense_only),
    Kernel("reference (PyTorch)", reference.decode, lambda need: None),
)


@lru_cache(512)
def pick(table: tuple[Kernel, ...], need: Need) -> Kernel:
    """The first kernel of a table that can serve."""
    return next(kernel for kernel in table if kernel.why_not(need) is None)


def fused(need: Need) -> bool:
    """Whether a kernel of a GPU serves block lists; else the reference does."""
    return pick(PREFILL, replace(need, lists=True)).run is not reference.prefill


def choose(pattern, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """`pattern.lists`, fused where it can be."""
    if _no_triton(Need.of(q, k, k)) is None:
        fused = import_module("hfsparse.kernels.triton.estimate")
        if fused.why_not(pattern, q, grid) is None:
            return fused.lists(pattern, q.detach(), k.detach(), grid, scale)
    return pattern.lists(q, k, grid, scale)


def choose_pages(
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
    """`selector.pages`, fused where it can be.

    heads: an index of the heads of q that are meant. below: rows of fewer tokens get empty lists,
    and nothing of them is kept. choice: the rows' last one, which is renewed where it is due. read
    [Hkv] int64: by how many keys the lists hold, it is raised.
    """
    if _no_triton(Need.of(q, q, q)) is None:
        fused = import_module("hfsparse.kernels.triton.quest")
        if fused.why_not(selector, q, index) is None:
            q, some = (q, heads) if isinstance(heads, Tensor) else (q[:, heads], None)
            more = some, below, choice, read
            return fused.pages(selector, q.detach(), index, length, scale, *more)
    lists = selector.pages(q[:, heads], index, length, scale)
    lists = PageLists(lists.pages, lists.count.masked_fill((length < below)[:, None], 0))
    if choice is not None:
        lists = choice.renew(lists, length, selector.budget.refresh)
    if read is not None:
        read += lists.keys(length).sum(0)
    return lists


def append(k: Tensor, v: Tensor, into: Places, at: Tensor) -> bool:
    """Store a decode step's tokens as `triton_append.append` does, if that can; whether it did."""
    need = Need.of(k, into.k, into.v, v)  # whichever of the four is trained
    if _no_triton(need) is not None:
        return False
    fused = import_module("hfsparse.kernels.triton.append")
    if fused.why_not(need) is not None:
        return False
    fused.append(k, v, into, at)
    for part in into.parts:
        if part.follow is not None:
            part.follow(at)
    return True


def pairs(lists: BlockLists) -> Tensor:
    """[B, H] query-key pairs kept."""
    counts = lists.full_count
    if _no_triton(Need(counts.device, torch.float32, 0, 0)) is None:
        return import_module("hfsparse.kernels.triton.count").pairs(lists)
    return lists.pairs()
