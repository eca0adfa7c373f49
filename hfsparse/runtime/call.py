"""One forward of a patched text decoder, as its layers see it.

What is the same for every layer of a call lives in the call and dies with it: no other thread or
stream, no later call and none that runs inside this one can see it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

from hfsparse.errors import CacheError

if TYPE_CHECKING:
    from hfsparse.runtime.cache.layer import Layer
    from hfsparse.runtime.decode import Step
    from hfsparse.runtime.layer_plan import LayerPlan


def take_layer(call: Call) -> Layer | None:
    """The layer that the call's last `update` went to, once; None when there is no cache."""
    layer, call.layer = call.layer, None
    if layer is None and call.updates:
        raise CacheError(
            "attention was called twice for one cache update: this model calls it in a way that "
            "hfsparse can't follow. Call handle.undo() and run it as it is"
        )
    return layer


T = TypeVar("T")


class Recorded(NamedTuple):
    """A decode step that is being recorded as a CUDA graph."""

    step: Step
    layers: dict[int, tuple[LayerPlan, Layer]]  # those that it serves, by index
    cut: Callable[[int], None] | None = None  # is told before each layer's attention


class Call:
    """A forward of the model that the patch `owner` is on; None: of a layer by itself."""

    def __init__(self, owner: str | None = None, outer: Call | None = None):
        self.owner, self.outer = owner, outer
        self.layer: Layer | None = None  # of the cache: updated last, and not attended to yet
        self.updates = 0  # of the cache's layers
        self.recorded: Recorded | None = None
        self.starts: dict[Tensor, list[int]] = {}  # masks `[B]`, and what they hold
        self._made: dict[tuple, Any] = {}

    def once(self, make: Callable[..., T], *given) -> T:
        """`make(*given)`, made for the first layer that asks."""
        key = make, *given
        if key not in self._made:
            self._made[key] = make(*given)
        return self._made[key]

    def starts_of(self, mask: Tensor) -> list[int]:
        """The first real column of each row; the device is asked once a call."""
        if mask not in self.starts:
            self.starts[mask] = mask.tolist()
        return self.starts[mask]


_running: ContextVar[Call | None] = ContextVar("hfsparse_call", default=None)


def running() -> Call | None:
    """The innermost call that runs in this thread."""
    return _running.get()


def enter(owner: str) -> None:
    """Begin a call of the model that a patch is on, inside the one that runs."""
    _running.set(Call(owner, _running.get()))


def leave(owner: str) -> bool:
    """End the innermost call of a patch, and what was interrupted inside it; False: none runs."""
    call = _running.get()
    while call is not None and call.owner != owner:
        call = call.outer
    if call is not None:
        _running.set(call.outer)
    return call is not None
