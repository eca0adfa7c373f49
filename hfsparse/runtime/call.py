"""One forward of a patched text decoder, as its layers see it.

What is the same for every layer of a call lives in the call and dies with it: no other thread or
stream, no later call and none that runs inside this one can see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hfsparse.errors import CacheError
from hfsparse.kernels import TABLES, Tables
from hfsparse.lists import Grid
from hfsparse.runtime.parts import Parts

T = TypeVar("T")


class Call:
    """A forward of the model that the patch `owner` is on; None: of a layer by itself."""

    def __init__(self, owner: str | None = None, outer: Call | None = None):
        self.owner, self.outer = owner, outer
        self.tables = TABLES if outer is None else outer.tables  # that kernels are picked from
        # Whether steps only draft, in exact mode: there they follow the plan, others read all keys.
        self.drafts = outer is not None and outer.drafts
        # Whether a step runs ahead: it is replayed, or not run, and the host counts it later.
        self.ahead = outer is not None and outer.ahead
        self.layer: CacheLayerMixin | None = None  # ours, updated last and not attended to yet
        self.given: tuple[Tensor, Tensor] | None = None  # what it was updated with
        self.updated: list[CacheLayerMixin] = []  # the cache's layers that took its tokens
        # The cache's layers that were taken, by the decoder's layer, for others that read its keys;
        # and what a chunk attends to in rings that have dropped it since: keys, values, their grid.
        self.taken: dict[int, CacheLayerMixin] = {}
        self.gathered: dict[int, list[tuple[Tensor, Tensor, Grid | None]]] = {}
        self.batch: Any = None  # a `batch.Batch`, where requests are read side by side
        self.plain: Any = None  # a `plain.PlainPrompt`, where one layer has read one
        # Where a decode step is recorded: attention of a layer, `(index, q, k, v, logits)`.
        self.recorded: Callable[..., Tensor] | None = None
        self.starts: dict[Tensor, tuple[int, ...]] = {}  # masks `[B, 1, 1, 1]`, and what they hold
        self.parts: Parts | None = None  # whose the prompt's tokens are, where ranks share them
        self._made: dict[tuple, Any] = {}

    def take_layer(self) -> CacheLayerMixin | None:
        """The layer that the last `update` went to, once; None when there is no cache."""
        layer, self.layer = self.layer, None
        if layer is None and self.updated:
            raise CacheError(
                "attention was called twice for one cache update: this model calls it in a way "
                "that hfsparse can't follow. Call handle.undo() and run it as it is"
            )
        if layer is not None:
            self.taken[layer.index] = layer
        return layer

    def layer_of(self, producer: int) -> CacheLayerMixin | None:
        """The layer that another's keys went to in this call; None when there is no cache."""
        layer = self.taken.get(producer)
        if layer is None and self.updated:
            raise CacheError(
                f"a layer reads the keys of layer {producer}, which put none into the cache before "
                "it in this call: this model calls attention in a way that hfsparse can't follow. "
                "Call handle.undo() and run it as it is"
            )
        return layer

    def finish(self) -> None:
        """Every layer ran: what the cache's layers took is stored. Where one raised it never is,
        and the next call finds the cache broken."""
        for layer in self.updated:
            if layer is not self.layer:  # that one no attention of ours has read
                layer.stored = layer.seen
        if self.plain is not None:
            self.plain.count()

    def once(self, make: Callable[..., T], *given) -> T:
        """`make(*given)`, made for the first layer that asks."""
        key = make, *given
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = make(*given)
        return made

    def starts_of(self, mask: Tensor) -> tuple[int, ...]:
        """The first real column of each row; the device is asked once a call."""
        if mask not in self.starts:
            self.starts[mask] = tuple(mask.flatten().tolist())
        return self.starts[mask]


_running: ContextVar[Call | None] = ContextVar("hfsparse_call", default=None)
# The innermost call that runs in this thread: `running()`.
running: Callable[[], Call | None] = _running.get


def call_of(owner: str) -> Call:
    """The call of this patch that runs; else one for a layer that runs by itself, as where
    gradients recompute it."""
    call = _running.get()
    return Call(outer=call) if call is None or call.owner != owner else call


def tables() -> Tables:
    """What this thread's next call picks its kernels from."""
    call = _running.get()
    return TABLES if call is None else call.tables


@contextmanager
def use_tables(tables: Tables) -> Iterator[None]:
    """Kernels of this thread's calls are picked from these."""
    with _around() as call:
        call.tables = tables
        yield


@contextmanager
def drafting() -> Iterator[None]:
    """This thread's calls draft."""
    with _around() as call:
        call.drafts = True
        yield


@contextmanager
def running_ahead() -> Iterator[None]:
    """This thread's calls run ahead."""
    with _around() as call:
        call.ahead = True
        yield


@contextmanager
def _around() -> Iterator[Call]:
    """What this thread's calls are begun inside of, as they begin inside one another."""
    call = Call(None, _running.get())
    before = _running.set(call)
    try:
        yield call
    finally:
        _running.reset(before)


def enter(owner: str) -> None:
    """Begin a call of the model that a patch is on, inside the one that runs."""
    _running.set(Call(owner, _running.get()))


def leave(owner: str) -> Call | None:
    """End the innermost call of a patch, and what was interrupted inside it; None: none runs."""
    call = _running.get()
    while call is not None and call.owner != owner:
        call = call.outer
    if call is not None:
        _running.set(call.outer)
    return call
