"""What a recorded step depends on besides the cache: where weights lie, what modules hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hfsparse.runtime.graphs.pool import find_place
from hfsparse.runtime.masks import row_starts


class Weights:
    """Where a model's weights and buffers lie, as long as nobody moves or replaces one."""

    def __init__(self, decoder: nn.Module):
        held = [
            (table, name, is_traceable_wrapper_subclass(tensor))
            for module in decoder.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self.plain = [(table, name) for table, name, wrapped in held if not wrapped]
        self.tables, self.names = zip(*self.plain, strict=True) if self.plain else ((), ())
        self.wrapped, local = [], []  # any, and those whose parts are plain (DTensor)
        for table, name, wrapped in held:
            parts = _parts(table[name]) if wrapped else []
            if any(is_traceable_wrapper_subclass(getattr(table[name], part)) for part in parts):
                self.wrapped.append((table, name))
            else:
                local += [(table, name, part) for part in parts]
        self.local = [*zip(*local, strict=True)] or [(), (), ()]
        self.lie = self._look()

    def moved(self) -> bool:
        try:
            return self._look() != self.lie
        except (KeyError, TypeError, AttributeError):  # one is gone, or another kind of tensor
            return True

    def _look(self) -> list[int]:
        tensors = map(dict.__getitem__, self.tables, self.names)
        found = [*map(Tensor.data_ptr, tensors)]  # asked in each step: no Python for each of them
        tables, names, parts = self.local
        local = map(getattr, map(dict.__getitem__, tables, names), parts)
        found += map(Tensor.data_ptr, local)
        for table, name in self.wrapped:
            found += _pointers(table[name])
        return found


def _pointers(t: Tensor) -> list[int]:
    """Where a tensor, or what it is made of, lies."""
    if not is_traceable_wrapper_subclass(t):
        return [t.data_ptr()]
    return [at for name in _parts(t) for at in _pointers(getattr(t, name))]


def _parts(t: Tensor) -> list[str]:
    """Names of the tensors that one is made of; of a DTensor a mesh is part, too."""
    return [name for name in t.__tensor_flatten__()[0] if isinstance(getattr(t, name), Tensor)]


def ask_later(mask: Tensor | None) -> Callable[[], list[int] | None]:
    """`row_starts` of a mask as it is now, to be asked later: it waits for nothing told since."""
    if mask is None or not mask.is_cuda:
        return partial(row_starts, mask)
    stream = find_place(mask.device).aside
    ready = torch.cuda.current_stream(mask.device).record_event()

    def ask() -> list[int] | None:
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            return row_starts(mask)

    return ask


class Settings:
    """What a decoder's modules and config hold as Python: a recorded step has frozen it."""

    def __init__(self, decoder: nn.Module):
        own = [vars(m) for m in decoder.modules() if not type(m).__module__.startswith("torch.")]
        held = [
            (table, name)
            for table in (*own, vars(decoder.config))
            for name, x in table.items()
            if name not in MODULE and _plain(x)
        ]
        self.tables, self.names = zip(*held, strict=True)  # a config holds some
        self.was = copy.deepcopy(self._look())

    def hold(self) -> bool:
        """Whether all of it is as it was."""
        return self._look() == self.was

    def _look(self) -> list:
        return [*map(dict.get, self.tables, self.names)]  # asked in each step, as Weights is


MODULE = {*vars(nn.Module())} - {"training"}  # torch's own attributes of a module


def _plain(x: Any) -> bool:
    """Whether it is a number or a word, or holds nothing else (as an adapter's scales)."""
    if isinstance(x, (list, tuple, set, dict)):
        return all(map(_plain, x.values() if isinstance(x, dict) else x))
    return x is None or isinstance(x, (bool, int, float, str))
