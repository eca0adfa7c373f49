"""How stores allocate and fill their buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hfsparse.lists import PAGE
from hfsparse.lists.packed import NEWEST
from hfsparse.precision import casts

AT_ONCE = 1024  # pages
ALL = slice(None)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the type that autocast gives to attention, where it is on."""
    kind = tensors[0].device.type
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors) if casts(kind) else tensors


def put(held: Tensor, new: Tensor, rows: slice, first: int, n: int) -> None:
    """The first n slots of new `[B, H, Q, ...]` into held, from slot `first` on, in these rows."""
    held[rows, :, first : first + n] = (
        new if n == new.shape[2] and rows == ALL else new[rows, :, :n]
    )


def at_once(pages: range, held: Tensor) -> Iterator[range]:
    """A prompt's pages, as many at a time as are worked out in wide numbers: all of what is held
    without data."""
    step = max(len(pages), 1) if held.is_meta else AT_ONCE
    for i in range(0, len(pages), step):
        yield pages[i : i + step]


def join_begun(held: list[Tensor], new: list[Tensor], rows: slice, past: int) -> list[Tensor]:
    """New keys and values `[b, H, n, D]` of some rows, behind those of the page that they go on.

    held `[B, H, NEWEST, D]`: the newest pages, where position p lies at p % NEWEST.
    """
    if not (lead := past % PAGE):
        return new
    begun = slice((past - lead) % NEWEST, (past - lead) % NEWEST + lead)
    return [torch.cat([old[rows, :, begun], t], 2) for old, t in zip(held, new, strict=True)]


def hold_newest(held: list[Tensor], new: list[Tensor], rows: slice, pages: range) -> None:
    """Put the last of these pages, of whose tokens `new` is made, among the newest."""
    for page in range(max(pages.start, pages.stop - 2), pages.stop):
        at = page * PAGE % NEWEST
        for old, t in zip(held, new, strict=True):
            part = t[:, :, (page - pages.start) * PAGE : (page - pages.start + 1) * PAGE]
            old[rows, :, at : at + part.shape[2]] = part


def lengthen(t: Tensor, size: int) -> Tensor:
    """t `[B, H, n, ...]` copied into a buffer of `size` slots."""
    out = new_buffer(t, *t.shape[:2], size, *t.shape[3:])
    if t.shape[2]:
        out[:, :, : t.shape[2]] = t
    return out


def new_buffer(t: Tensor, *shape: int) -> Tensor:
    """As `t.new_empty`, and writable later also where this call runs under inference_mode."""
    return _written_later(torch.empty, shape, t.dtype, t.device)


def new_zeros(t: Tensor, *shape: int) -> Tensor:
    """As `new_buffer`, of zeros."""
    return _written_later(torch.zeros, shape, t.dtype, t.device)


@lru_cache
def no_slots(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """A buffer that has no slot yet: it holds nothing, so that all stores share it."""
    return _written_later(torch.empty, shape, dtype, device)


def _written_later(
    make: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What `make` makes, as if no inference_mode were on."""
    if not torch.is_inference_mode_enabled():
        return make(shape, dtype=dtype, device=device)
    with torch.inference_mode(False):
        return make(shape, dtype=dtype, device=device)


def filled(t: Tensor, rows: Sequence[int], unit: int = 1) -> Tensor:
    """The slots of t `[B, H, n, ...]`, each of `unit` tokens, that rows of so many tokens fill.

    Whole pages, as many as the longest row has; zeros where another row has none.
    """
    t = t[:, :, : -(-max(rows) // PAGE) * PAGE // unit]
    ends = [-(-n // unit) for n in rows]
    if min(ends) < t.shape[2]:
        t = t.clone()
        for b, end in enumerate(ends):
            t[b, :, end:] = 0
    return t
