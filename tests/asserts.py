"""Every list that a Triton or flash-attn-4 kernel reads or writes is checked, before it is read.

It is so in each test of interpreted kernels and of those on a GPU. The checks run on the lists'
device and wait for nothing, so that they are part of recorded CUDA graphs too: a list wider than
its row ends in an assertion, not in whatever memory lies behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import signature

import torch
from torch import Tensor

from hfsparse.lists import PAGE, BlockLists, PageLists

WATCHED = {  # functions by module of hfsparse.kernels: they read lists, or make them
    "triton.prefill": "prefill",
    "triton.decode": "decode",
    "triton.count": "pairs",
    "triton.estimate": "lists",
    "triton.choose": "pages",
    "fa4": "prefill",
}


def install(put: Callable = setattr) -> None:
    """put(module, name, function): as `setattr`, which is for good, or a monkeypatch's."""
    for module, name in WATCHED.items():
        module = import_module(f"hfsparse.kernels.{module}")
        put(module, name, _checked(getattr(module, name)))


def _checked(function):
    takes = signature(function)

    @wraps(function)
    def run(*args, **more):
        given = takes.bind(*args, **more).arguments
        for value in given.values():
            _check(value, given)
        made = function(*args, **more)
        _check(made, given)
        return made

    return run


def _check(value, given: dict) -> None:
    if isinstance(value, BlockLists):
        block_lists(value)
    elif isinstance(value, PageLists):
        page_lists(value, _pages(given))


def _pages(given: dict) -> int:
    """Pages of the buffers that a call of a decode kernel or a selector is given."""
    if "index" in given:
        return next(iter(given["index"].values())).shape[2]
    return max(-(-part.k.shape[2] // PAGE) for part in given["places"].parts if part.listed)


def block_lists(lists: BlockLists) -> None:
    """Raise RuntimeError, on a GPU end in a device-side assertion, unless lists can be followed."""
    for name in ("full", "part"):
        count, index = (getattr(lists, f"{name}_{of}") for of in ("count", "index"))
        _ascending(f"{name} blocks", count, index, lists.grid.nk)
    if lists.columns is not None:
        ordered = (lists.columns.diff(dim=-1) >= 0).all() & (lists.columns >= 0).all()
        torch._assert_async(ordered, "columns are not ascending positions")


def page_lists(lists: PageLists, pages: int) -> None:
    """As `block_lists`, of a cache with room for so many pages."""
    _ascending("pages", lists.count, lists.pages, pages * (PAGE // lists.unit))


def _ascending(what: str, count: Tensor, index: Tensor, end: int) -> None:
    width = index.shape[-1]
    fits = ((count >= 0) & (count <= width)).all()
    torch._assert_async(fits, f"{what}: a count is beyond the row's width, {width}")
    inside = ((index >= 0) & (index < end)).all()  # the unused ones too: masks gather them
    torch._assert_async(inside, f"{what}: one of them is not below {end}")
    used = torch.arange(1, width, device=index.device) < count[..., None]
    rising = (~used | (index.diff(dim=-1) > 0)).all()
    torch._assert_async(rising, f"{what}: a list does not ascend")
