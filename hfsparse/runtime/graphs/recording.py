"""One recorded decode step: its capture, its replay, and the check of one against a live step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hfsparse.lists.lengths import Lengths
from hfsparse.models.names import find_cache, parameters
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.call import running
from hfsparse.runtime.decode import Step, chooses, decode
from hfsparse.runtime.graphs.obstacles import Through
from hfsparse.runtime.graphs.pool import find_place, join_recording, lock_devices
from hfsparse.runtime.graphs.states import States
from hfsparse.runtime.graphs.weights import Settings
from hfsparse.runtime.layer_plan import LayerPlan, Logits
from hfsparse.runtime.rows import device_guard

PARTS = (16, 4)  # a step is cut behind these parts of its layers


class Graph:
    """One recorded step, and the tensors that it reads and writes."""

    settings: Settings  # as they were when it was checked

    def __init__(
        self, call: Callable, given: dict[str, Any], lengths: Lengths, key, serving, weights
    ):
        """Record `call(**given)`: its Python runs, its kernels don't."""
        self.key, self.replays, self.weights = key, 0, weights
        self.inputs = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
        self.device = next(iter(self.inputs.values())).device
        lies = dict.fromkeys(layer.device for _, layer in serving.values())
        lies.update(dict.fromkeys(States(find_cache(given)).devices))
        self.others = [device for device in lies if device != self.device]
        self.devices = self.device, *self.others
        self.length = torch.tensor(lengths.rows, device=self.device)
        self.parts: list[torch.cuda.CUDAGraph] = []
        stream, current = find_place(self.device).stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        self._gather(stream)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock_devices(self.devices))
            self.pool = find_place(self.device).held.pool()
            for device in self.others:
                stack.enter_context(join_recording(device))
            stack.enter_context(torch.cuda.stream(stream))
            self._begin(stream)
            try:
                step = Step.recorded(lengths, self.length)
                stack.enter_context(record_step(step, serving, partial(self._cut, stream, serving)))
                output = call(**hide_cache({**given, **self.inputs}))
                self._gather(stream)
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self.parts[-1].capture_end()
                del find_place(self.device).held  # torch may go on counting its pool as recorded to
                raise
            self.parts[-1].capture_end()
        current.wait_stream(stream)
        self.kind = type(output)
        self.outputs = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
        for name, x in self.outputs.items():
            if not isinstance(x, Tensor | Through | None):
                raise TypeError(f"{name} of its output is a {type(x).__name__}")

    def _begin(self, stream) -> None:
        """Record on, as a graph more."""
        self.parts.append(torch.cuda.CUDAGraph())
        self.parts[-1].capture_begin(pool=self.pool, capture_error_mode="thread_local")
        self._scatter(stream)

    def _cut(self, stream, serving: dict, index: int) -> None:
        """Before the attention of layer `index`: the host launches a later part while one runs."""
        if index in {max(1, len(serving) // part) for part in PARTS}:
            self._gather(stream)
            self.parts[-1].capture_end()
            self._begin(stream)

    def stale(self) -> bool:
        """Whether it would read weights where they were, or numbers as they were."""
        return self.weights.moved() or not self.settings.hold()

    def holds(self, layers: list[CacheLayer], rows: list[int], states: States) -> None:
        """Note up to which lengths of rows the key stays as it is, now that it is right."""
        self.states = states
        self.places = [(store, store.k) for layer in layers for store in layer.stores]
        self.least, self.most = min(rows), min(store.until(rows) for store, _ in self.places)
        for store, _ in self.places:
            if max(rows) < store.below:
                self.most = min(self.most, store.below - 1)

    def fits(self, asked: tuple, rows: list[int], states: States) -> bool:
        """Whether it surely serves such a call; else its key tells."""
        return (
            self.least <= min(rows)
            and max(rows) <= self.most
            and self.key[0] == asked
            and all(store.k is k for store, k in self.places)
            and self.states == states
        )

    def launch(self) -> None:
        """What was recorded, over the tensors as they are."""
        for part in self.parts:
            part.replay()

    def _gather(self, stream) -> None:
        """`stream`, of the first device, waits for what the others were told to do."""
        for device in self.others:
            stream.wait_stream(torch.cuda.current_stream(device))

    def _scatter(self, stream) -> None:
        """The other devices wait for `stream`."""
        for device in self.others:
            torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self, given: dict[str, Any], rows: list[int], ended: Tensor | None = None) -> Any:
        """The step's output for these inputs; keys are stored, no counter on the host is. ended: as
        `CacheLayer.ended`."""
        torch._foreach_copy_([*self.inputs.values()], [given[name] for name in self.inputs])
        write_lengths(self.length, rows, ended)
        stream = torch.cuda.current_stream(self.device)
        self._gather(stream)
        self.launch()
        self._scatter(stream)
        made = {n: x.clone() if isinstance(x, Tensor) else x for n, x in self.outputs.items()}
        return show_cache(self.kind(**made), given)


def write_lengths(length: Tensor, rows: list[int], ended: Tensor | None) -> None:
    """Have the device know how long rows are: those that have ended are empty."""
    if len(set(rows)) == 1:
        length.fill_(rows[0])
    else:
        length.copy_(torch.tensor(rows, device="cpu"), non_blocking=True)
    if ended is not None:
        length.masked_fill_(ended.to(length.device), 0)


def run_live(call: Callable, given: dict[str, Any], lengths: Lengths, serving) -> Any:
    """A step as one would record it, run at once."""
    device = next(x.device for x in given.values() if isinstance(x, Tensor))
    length = torch.empty(len(lengths.rows), dtype=torch.long, device=device)
    write_lengths(length, lengths.rows, next(layer.ended for _, layer in serving.values()))
    step = Step.recorded(lengths, length)
    with record_step(step, serving):
        return show_cache(call(**hide_cache(given)), given)


@contextlib.contextmanager
def record_step(step: Step, serving: dict[int, tuple[LayerPlan, CacheLayer]], cut=None):
    """The call that runs as a recorded step; `cut` is told before each layer's attention."""

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> Tensor:
        """As `attend.attend`; it changes nothing on the host."""
        if cut is not None:
            cut(index)
        layer_plan, layer = serving[index]
        if q.device != layer.device:
            raise RuntimeError(f"layer {index} reads keys that lie on another device")
        with device_guard(q):
            out = decode(call.tables, layer_plan, layer, q, k, v, step.on(q.device), logits)
        return out.transpose(1, 2).contiguous()

    call = running()
    call.recorded = attend
    try:
        yield
    finally:
        call.recorded = None


def hide_cache(given: dict[str, Any]) -> dict[str, Any]:
    """The call of a recorded step: only a hybrid's cache shows its layers, for their states."""
    cache = find_cache(given)
    layers = cache.layers if States(cache) else ()
    return {name: Through(layers) if isinstance(x, Cache) else x for name, x in given.items()}


def show_cache(output: Any, given: dict[str, Any]) -> Any:
    cache = next(x for x in given.values() if isinstance(x, Cache))
    for name, value in output.items():
        if isinstance(value, Through):
            output[name] = cache
    return output


def complete_inputs(kwargs: dict, first: CacheLayer, decoder: type, Q: int) -> dict[str, Any]:
    """What a recorded forward gets: no mask, and positions where the caller left them out."""
    given = {**kwargs, "attention_mask": None}
    for name, shape in (("position_ids", (1, Q)), ("cache_position", (Q,))):
        if name in parameters(decoder) and given.get(name) is None:
            at = torch.arange(first.seen, first.seen + Q, device=first.device)
            given[name] = at.view(shape)
    return given


def restride(given: dict[str, Any]) -> dict[str, Any]:
    """Tensors anew: torch.compile compiles for each stride, as one has that is cut from a mask."""
    fresh = {"memory_format": torch.contiguous_format}
    return {n: x.clone(**fresh) if isinstance(x, Tensor) else x for n, x in given.items()}


def describe_call(given: dict[str, Any]) -> tuple:
    """What a call asks for: all of its arguments but tensors' contents."""
    return torch.is_inference_mode_enabled(), *(
        (name, x.shape, x.dtype)
        if isinstance(x, Tensor)
        else (name, x if isinstance(x, (bool, int, float, str, type(None))) else id(x))
        for name, x in given.items()
    )


def describe_buffers(
    layers: list[CacheLayer], rows: list[int], states: States
) -> tuple[tuple, tuple]:
    """What else is frozen in a graph: which selectors choose, and where keys and states lie."""
    stores = [store for layer in layers for store in layer.stores]
    places = tuple(
        (*(t.data_ptr() for t in (*store.tensors(), *store.outside())), store.k.shape[2])
        for store in stores
    )
    return tuple(chooses(store, rows) for store in stores), (*places, states.places())


def measure_difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm())


def snapshot_host(layers: list[CacheLayer]) -> list[tuple]:
    """The host's side of a cache."""
    return [
        (layer.rows, layer.seen, layer.stored, [s.snapshot() for s in layer.stores])
        for layer in layers
    ]


def restore_host(layers: list[CacheLayer], before: list[tuple]) -> None:
    for layer, (rows, seen, stored, stores) in zip(layers, before, strict=True):
        layer.rows, layer.seen, layer.stored = rows, seen, stored
        for store, held in zip(layer.stores, stores, strict=True):
            store.restore(held)
