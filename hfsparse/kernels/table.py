"""Which kernel serves which need: tables of capability checks, the first that fits wins.

Kernels know nothing of plans, models or caches. A row's check answers None, or why it can't run;
`explain` prints these. New kernels are one file and one row. All rows of a table take the same:

PREFILL(q, k, v, reads, kv_heads=None, *, scale, softcap, s_aux, skip, skipped, lse) -> Tensor
    As `reference.prefill`; `reads` is a Grid, without kv_heads, where whole rows are read. Where
    packed pages are needed, past, too: a `Past`, behind whose pages k and v lie.
DECODE(q, places, new, pages, *, scale, softcap, s_aux, span, lse) -> Tensor [B, Hq, Q, Dv]
    All stores of a layer at once, as `per_store.by_store`; pages: a list for each part of the
    places, None where it reads every page. span: of all these keys those at positions from the
    first on and before the second, multiples of a page.
ESTIMATE(pattern, q, k, grid, scale) -> BlockLists
    As the pattern's `lists`.
SELECT(selector, q, index, length, scale, heads, below, choice, read) -> PageLists
    As the selector's `pages`. index: what the cache knows of its pages, by name. heads: an index of
    the heads of q that are meant. below: rows of fewer tokens get empty lists, and nothing of them
    is kept. choice: the rows' last one, which is renewed where it is due. read [Hkv] int64: by how
    many keys the lists hold, it is raised.
APPEND(k, v, into, new) -> None
    New tokens into all stores of a layer, a step's or a prompt's; there is room for them.
FETCH(hot, lists, length, read) -> PageLists
    As `fetch.fetch`: of a store whose keys lie in host memory, before a step reads it.
COUNT(lists) -> Tensor [B, H]
    As `lists.pairs`.
PRODUCTS(x, weights, biases) -> Tensor [..., N0 + N1 + ...]
    As `plain.products`, of a few rows. Steps that are fused are compiled with it; no call asks it.
QUANTISED(x, matrices, biases) -> Tensor [..., N0 + N1 + ...]
    As `plain.quantised`, of a few rows: steps that are recorded ask it, fused or not.
NORMS(x, weight, eps, form) -> Tensor [..., N]
    As `plain.rms_norm`: steps that are recorded and not fused ask it, as the next two.
ROPES(q, k, cos, sin) -> two Tensors, as q and k
    As `plain.rotate`.
GATES(gate, up, form) -> Tensor [..., N]
    As `plain.gated`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfsparse.errors import UsageError
from hfsparse.kernels import cpu, cpu_choose, cpu_decode, dense, fetch, per_store, plain, reference
from hfsparse.kernels.need import Kernel, Need
from hfsparse.kernels.positions import NewTokens
from hfsparse.kernels.rows import q_heads_of
from hfsparse.lists import FULL, BlockLists, Grid, PageLists
from hfsparse.lists.places import Places
from hfsparse.selectors.labels import Labelled

NO_SKIP = "no skip threshold"
NO_PAGES = "no packed pages: what a chunk finds is unpacked for it"
NO_LSE = "no LSE, by which parts of a row are merged"
FA4_PAYS = 8192  # benchmarks/prefill.py: below, its host time counts

_installed = cache(lambda name: find_spec(name) is not None)


@cache
def _module(name: str) -> ModuleType:
    """A module of kernels, imported when it is first needed."""
    return import_module(f"hfsparse.kernels.{name}")


def _lazily(module: str, function: str) -> Callable[..., Any]:
    return lambda *args, **more: getattr(_module(module), function)(*args, **more)


def no_triton(need: Need) -> str | None:
    """Why Triton kernels can't run at all: they are imported where this says None."""
    if not _installed("triton"):
        return "Triton is not installed"
    if need.device.type != "cuda" and not import_module("triton").knobs.runtime.interpret:
        return f"needs a CUDA device, not {need.device.type}"
    return None


def _triton(module: str, check: str = "why_not") -> Callable[[Need], str | None]:
    return lambda need: no_triton(need) or getattr(_module(f"triton.{module}"), check)(need)


def _always(need: Need) -> None:
    """It can."""


def _unpacked(check: Callable[[Need], str | None]) -> Callable[[Need], str | None]:
    """The same check, of a prefill kernel that reads no packed pages."""
    return lambda need: NO_PAGES if need.packed else check(need)


def _dense_only(need: Need) -> str | None:
    if need.lists:
        return "reads every key, not lists of blocks or pages"
    if need.skip:
        return NO_SKIP
    if need.bands:
        return "no windows of rings: those are read by the reference"
    if need.lse:
        return NO_LSE
    return "no softcap, no sink logits" if need.logits else None


def _fa4(need: Need) -> str | None:
    if need.skip:
        return NO_SKIP
    if need.lse:
        return NO_LSE
    if why := _module("fa4").why_not(need):
        return why
    if need.tokens < FA4_PAYS:
        return f"others are faster under {FA4_PAYS:,} tokens"
    return None if need.lists or need.plain else "no full heads with padding or a past"


def _fa4_prefill(q: Tensor, k: Tensor, v: Tensor, reads: BlockLists | Grid, *args, **more):
    if isinstance(reads, Grid):
        return _module("fa4").dense(q, k, v, **more)
    return _module("fa4").prefill(q, k, v, reads, *args, **more)


def _by_lists(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel of block lists that is also given whole rows, as lists of every block."""

    def prefill(q, k, v, reads: BlockLists | Grid, kv_heads: Tensor | None = None, **more):
        if isinstance(reads, Grid):
            heads = q.shape[1]
            kv_heads = torch.arange(heads, device=q.device) // (heads // k.shape[1])
            reads = BlockLists.of(reads, heads, band=FULL)
        return run(q, k, v, reads, kv_heads, **more)

    return prefill


def _triton_decode(
    q: Tensor, places: Places, new: NewTokens, pages: Sequence[PageLists | None], **more
) -> Tensor:
    listed = [part for part in pages if part is not None]
    lists = PageLists.cat(listed) if listed else None
    run = _module("triton.decode").decode
    return run(q, places, new.query_pos, lists, length=new.length, **more)


def _triton_by_store(
    q: Tensor, places: Places, new: NewTokens, pages: Sequence[PageLists | None], **more
) -> Tensor:
    run = _module("triton.decode_store").decode
    if len(places.parts) == 1:
        return run(q, *places.parts, new.query_pos, *pages, length=new.length, **more)
    sinks, lse = more.pop("s_aux", None), more.pop("lse", None)
    ratio, out = q.shape[1] // len(places.cells), q.new_empty(*q.shape[:3], places.v.shape[3])
    for part, lists in zip(places.parts, pages, strict=True):
        own = places.at(q_heads_of(part.heads, ratio), q.device)
        more["s_aux"] = None if sinks is None else sinks[own]
        if lse is not None:
            more["lse"] = sums = lse.new_empty(len(q), len(part.heads) * ratio, q.shape[2])
        out[:, own] = run(q[:, own], part, new.query_pos, lists, length=new.length, **more)
        if lse is not None:
            lse[:, own] = sums
    return out


def _triton_append(k: Tensor, v: Tensor, into: Places, new: NewTokens) -> None:
    _module("triton.append").append(k, v, into, new.query_pos, new.prompt)
    for part in into.parts:
        if part.packed is not None:
            into_pages = part if part.hot is None else part._replace(packed=part.hot.pages)
            _module("triton.pack").pack(into_pages, new.query_pos)
        elif part.hot is not None:
            given = into.at.tensor(part.heads, k.device), new.query_pos
            _module("triton.write_out").write_out(part.hot, k, v, *given)
        if isinstance(part.selector, Labelled) and not part.selector.means:
            _module("triton.labels").follow(
                part, k, into.at.tensor(part.heads, k.device), new.query_pos
            )
        elif part.follow is not None:
            part.follow(new.query_pos)


PREFILL = (
    Kernel("FA4", _fa4_prefill, _unpacked(_fa4), fused=True),
    Kernel("torch sdpa", dense.prefill, _unpacked(_dense_only)),
    Kernel(
        "Triton", _by_lists(_lazily("triton.prefill", "prefill")), _triton("prefill"), fused=True
    ),
    Kernel("torch flash over lists", _by_lists(cpu.prefill), _unpacked(cpu.why_not), fused=True),
    Kernel("reference (PyTorch)", _by_lists(reference.prefill), _unpacked(_always)),
)
DECODE = (
    Kernel("Triton", _triton_decode, _triton("decode"), device_lengths=True),
    Kernel(
        "Triton, store by store", _triton_by_store, _triton("decode_store"), device_lengths=True
    ),
    Kernel("torch flash, store by store", cpu_decode.decode, cpu_decode.why_not),
    Kernel("torch sdpa", per_store.by_store(dense.decode), _dense_only),
    Kernel("reference (PyTorch)", per_store.by_store(reference.decode, dense.decode), _always),
)
ESTIMATE = (
    Kernel("Triton", _lazily("triton.estimate", "lists"), _triton("estimate")),
    Kernel("PyTorch", plain.estimate, _always),
)
SELECT = (
    Kernel("Triton", _lazily("triton.choose", "pages"), _triton("choose")),
    Kernel(
        "PyTorch (scores) and Triton",
        _lazily("triton.choose", "pages"),
        _triton("choose", "why_not_scored"),
    ),
    Kernel("PyTorch, by rows", cpu_choose.pages, cpu_choose.why_not),
    Kernel("PyTorch", plain.select, _always),
)
APPEND = (
    Kernel("Triton", _triton_append, _triton("append"), device_lengths=True),
    Kernel("PyTorch", per_store.append, _always),
)
FETCH = (
    Kernel("Triton", _lazily("triton.fetch", "fetch"), _triton("fetch"), device_lengths=True),
    Kernel("PyTorch", fetch.fetch, _always),
)
COUNT = (
    Kernel("Triton", _lazily("triton.count", "pairs"), _triton("count")),
    Kernel("PyTorch", plain.count, _always),
)
PRODUCTS = (
    Kernel("Triton", _lazily("triton.products", "products"), _triton("products")),
    Kernel("PyTorch", plain.products, _always),
)
QUANTISED = (
    Kernel("Triton", _lazily("triton.products", "products_of_codes"), _triton("products")),
    Kernel("PyTorch", plain.quantised, _always),
)
NORMS = (
    Kernel("Triton, one launch", _lazily("triton.norm_row", "rms_norm"), _triton("norm_row")),
    Kernel("Triton", _lazily("triton.norm", "rms_norm"), _triton("norm")),
    Kernel("PyTorch", plain.rms_norm, _always),
)
ROPES = (
    Kernel("Triton", _lazily("triton.rope", "rotate"), _triton("rope")),
    Kernel("PyTorch", plain.rotate, _always),
)
GATES = (
    Kernel("Triton", _lazily("triton.gated", "gated"), _triton("gated")),
    Kernel("PyTorch", plain.gated, _always),
)


class Tables(NamedTuple):
    """What a call's kernels are picked from."""

    prefill: tuple[Kernel, ...] = PREFILL
    decode: tuple[Kernel, ...] = DECODE
    estimate: tuple[Kernel, ...] = ESTIMATE
    select: tuple[Kernel, ...] = SELECT
    append: tuple[Kernel, ...] = APPEND
    fetch: tuple[Kernel, ...] = FETCH
    count: tuple[Kernel, ...] = COUNT


TABLES = Tables()


@lru_cache(512)
def able(table: tuple[Kernel, ...], need: Need) -> bool:
    """Whether a kernel of a table can serve."""
    return any(kernel.why_not(need) is None for kernel in table)


@lru_cache(512)
def pick(table: tuple[Kernel, ...], need: Need) -> Kernel:
    """The first kernel of a table that can serve; UsageError: none can."""
    for kernel in table:
        if kernel.why_not(need) is None:
            return kernel
    why = "; ".join(f"{kernel.name}: {kernel.why_not(need)}" for kernel in table)
    raise UsageError(
        f"no kernel of this table can serve a call ({why}): give one that can, such as the last of "
        "each table in hfsparse.kernels"
    )
