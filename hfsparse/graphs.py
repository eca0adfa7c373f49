"""Decode steps of a patched model as CUDA graphs: the Python of a step runs once a cache.

From the third new token of a cache on, the text decoder's forward is recorded and replayed. What
differs from step to step (lengths, positions, the tokens themselves) lies in a few tensors that
are filled anew before each replay; the host's counters advance beside it. A graph belongs to one
cache's buffers and the model's weights: another cache, weights that lie elsewhere, a growth of the
buffers or the first row that passes `below.decode` is recorded anew, at about the price of three
eager steps: none is answered by a graph until one replay gave what the same step gives eagerly.
Each call of `generate` begins anew and sees adapters and hooks that changed (a loop of single
tokens written by hand sees hooks at its next prompt); numbers that modules hold, as an adapter's
scale, are looked at before each replay.
What can't be replayed runs as it is (`Graphs.why`). While a step is recorded, another thread that
draws random numbers on the same GPU may fail: torch's generators know one recording at a time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import threading
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from transformers.cache_utils import Cache

from hfsparse import kernels
from hfsparse.attention import LayerPlan, Step, chooses, is_step, row_starts
from hfsparse.cache import Layer
from hfsparse.call import Recorded, running
from hfsparse.lists import PAGE

WARM = 3  # the step of a cache that is recorded: short answers don't pay, and kernels compile
BACKEND, COMPILE = "inductor", {"dynamic": False, "fullgraph": True}  # of fused steps
OWN_HOOKS = ("transformers.", "hfsparse.patcher")  # of modules whose steps can be recorded
FEW = 8  # replays under which a graph was not worth its recording
PARTS = (16, 4)  # a step is cut behind these parts of its layers
NOISE = 4  # a replay may differ from an eager step so many times as far as two eager steps do


class Graphs:
    """The graphs of one patched model, each of one cache."""

    def __init__(self, layers: list[LayerPlan], linear: bool = False, fuse: bool = False):
        self.layers, self.linear, self.fuse = layers, linear, fuse
        self.kept: WeakKeyDictionary[Layer, Graph] = WeakKeyDictionary()  # by a cache's first layer
        # Steps of a cache without a graph, and which of its stores chose in the last.
        self.warm: WeakKeyDictionary[Layer, tuple[int, tuple]] = WeakKeyDictionary()
        self.moves: WeakKeyDictionary[Layer, int] = WeakKeyDictionary()  # graphs of few replays
        self.refused: WeakKeyDictionary[Layer, str] = WeakKeyDictionary()  # why a cache has none
        self.why: str | None = "no step has run yet"  # why the last one was no replay
        self.never: str | None = None  # why none will be
        self.loose: str | None = None  # why nothing is fused, though it was asked for
        self.held: Callable[[], Layer | None] = lambda: None  # the cache that `stats` looked at
        self.lock = threading.Lock()
        self.compiled = None

    def __reduce__(self):
        return Graphs, (self.layers, self.linear, self.fuse)  # a copy of the model has its own

    def __str__(self) -> str:
        if self.why is not None:
            return f"no ({self.why})"
        return "yes, fused" if self.fuse else f"yes ({self.loose})" if self.loose else "yes"

    def run(self, forward: Callable, decoder: nn.Module, kwargs: dict, cache: Any) -> Any:
        """`forward(**kwargs)` of the text decoder, by a graph where that is possible."""
        layers = [x for x in getattr(cache, "layers", ()) if isinstance(x, Layer)]
        new = new_tokens(kwargs)
        if len(layers) != len(self.layers) or new is None or not layers[0].is_initialized:
            return forward(**kwargs)
        first, Q = layers[0], new.shape[1]
        if Q != 1 or not is_step(first, Q, first.seen + Q):
            self.forget(first)
            self.why = f"the last call had {Q} new tokens: a graph takes one"
            return forward(**kwargs)
        self.why = self.never or self.refused.get(first) or _obstacle(decoder, kwargs, new)
        if self.why is None and not self.lock.acquire(blocking=False):
            self.why = "another thread runs a step of this model"
        if self.why is not None:
            return forward(**kwargs)
        try:
            return self._step(forward, decoder, kwargs, layers)
        finally:
            self.lock.release()

    def forget(self, first: Layer) -> None:
        """Begin anew with a cache: weights, adapters or hooks may have changed."""
        for table in (self.kept, self.warm, self.refused):
            table.pop(first, None)

    def _step(self, forward, decoder, kwargs, layers) -> Any:
        first, mask = layers[0], kwargs.get("attention_mask")
        graph = self.kept.get(first)
        if graph is not None and graph.stale():
            self.forget(first)
            graph = None
        given = _given(kwargs, first, type(decoder))
        asked, rows = _asked(given), [n + 1 for n in first.rows]
        if graph is not None and min(rows) > 1 and graph.fits(asked, rows):
            if mask is None:
                first.lengths(None, first.seen, 1)
            return self._replay(graph, given, layers, rows, mask)
        past, new = first.lengths(row_starts(mask), first.seen, 1)
        if min(new) < 1:
            self.why = "a row has no new token"
            return forward(**kwargs)
        rows = [n + 1 for n in past]
        for layer in layers:
            for store in layer.stores:
                store.room(past, rows)
            layer.places()  # written now: a recorded step can't
        key = (asked, *_lies(layers, rows))
        if graph is not None and graph.key != key:
            moved = graph.key[2] != key[2] and graph.replays < FEW
            self.forget(first)
            self.moves[first] = self.moves.get(first, 0) + 1 if moved else 0
            if self.moves[first] > 1:
                self.refused[first] = self.why = "its buffers move from step to step (beams?)"
                return forward(**kwargs)
            graph = None
        if graph is not None:
            graph.holds(layers, rows)
            return self._replay(graph, given, layers, rows)
        steps, chose = self.warm.get(first, (0, key[1]))
        steps = steps + 1 if chose == key[1] else WARM - 1  # nothing runs first while recorded
        self.warm[first] = steps, key[1]
        if steps < WARM - 1:
            self.why = "the first steps of a cache are not replayed"
        elif (why := self._lasting(decoder, first)) is not None:
            self.why = self.refused[first] = why
        if self.why is not None:
            return forward(**kwargs)
        call = self._fused(decoder) if self.fuse else forward
        serving = self._serving(layers)
        try:
            if steps < WARM:  # once as it will be recorded: compiles, and shows what can't be
                self.why = "the first steps of a cache are not replayed"
                with contextlib.nullcontext() if self.fuse else NoWait():
                    output = _live(call, given, past, rows, serving)
                self._passed(layers, rows)
                return output
            graph = Graph(call, given, past, rows, key, serving, Weights(decoder))
            if graph.weights.moved():
                raise RuntimeError("its forward replaces weights or buffers")
            graph.holds(layers, rows)
            self.kept[first] = graph
            output = self._checked(graph, forward, decoder, kwargs, given, layers, past, rows)
            graph.settings = Settings(decoder)  # behind all that an eager step may set
            return output
        except torch.cuda.OutOfMemoryError:
            self.refused[first] = self.why = "out of memory when it was recorded"
        except Exception as error:  # whatever a model does that can't be compiled or recorded
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if self.fuse:
                self.fuse, self.loose = False, f"not fused, {told}"
            else:
                self.never = f"it can't be recorded, {told}"
            self.why = self.loose or self.never
        return forward(**kwargs)

    def _fused(self, decoder: nn.Module) -> Callable:
        """The decoder's forward, compiled, with one operator in place of each layer's attention."""
        if self.compiled is None:
            self.compiled = torch.compile(type(decoder).forward, backend=BACKEND, **COMPILE)

        def call(**given):
            for layer in self.layers:
                layer.fusing = True
            try:
                return self.compiled(decoder, **given)
            finally:
                for layer in self.layers:
                    layer.fusing = False

        return call

    def _serving(self, layers: list[Layer]) -> dict[int, tuple[LayerPlan, Layer]]:
        return {plan.index: (plan, layer) for plan, layer in zip(self.layers, layers, strict=True)}

    def _checked(self, graph, forward, decoder, kwargs, given, layers, past, rows) -> Any:
        """A graph's first replay, beside the same step run live, with the same kernels.

        Equal bits are asked for, since no bound of a dtype's rounding would show one wrong page of
        many; where the model itself says something else each time, as near as it is to itself.
        """
        before = _snapshot(layers)
        read = [(t, t.clone()) for plan in self.layers for t in plan.counts.read.values()]

        def run() -> Any:
            if not self.fuse:
                return forward(**kwargs)
            output = _live(self._fused(decoder), given, past, rows, self._serving(layers))
            self._passed(layers, rows)
            return output

        def take_back() -> None:
            _restore(layers, before)
            for held, was in read:
                held.copy_(was)
            self.count(rows, -1)

        wanted = run()
        take_back()
        found = self._replay(graph, given, layers, rows)
        if torch.equal(found[0], wanted[0]):
            return found
        take_back()
        again = run()  # the replay may have stored other keys
        if _apart(found[0], again[0]) > NOISE * _apart(wanted[0], again[0]):
            self.never = self.why = "replayed, this model gives something else than eagerly"
            self.kept.clear()
        return again

    def _replay(self, graph, given, layers, rows, mask: Tensor | None = None) -> Any:
        """A step by its graph; a mask that was not looked at yet is while the device is busy."""
        first, starts = layers[0], _later(mask)
        current = torch.cuda.current_stream(graph.device)
        with _alone_on(graph.devices) as places:
            for place in places:
                if place.last is not None and place.last != current:
                    current.wait_stream(place.last)
                place.last = current
            output = graph.replay(given, rows)
        if mask is not None:
            try:
                first.lengths(starts(), first.seen, 1)
            except ValueError:  # no step: its keys lie behind the rows, choices may know of them
                for layer in layers:
                    layer.take_back(0)
                raise
        graph.replays += 1
        self._passed(layers, rows)
        return output

    def _passed(self, layers, rows) -> None:
        """What an eager step changes on the host."""
        for layer in layers:
            layer.rows = rows
            layer.seen += 1
            layer.stored = layer.seen
        self.count(rows)

    def count(self, rows: list[int], times: int = 1) -> None:
        for n in rows:
            self.layers[0].steps[n, 1] += times

    def _lasting(self, decoder, first: Layer) -> str | None:
        """Why no step of this cache can be a graph: asked once, when one is to be recorded."""
        if self.linear:
            return "it has linear layers, whose states are not hfsparse's"
        lies = {t.device.type for t in (*decoder.parameters(), *decoder.buffers())}
        if apart := sorted(lies - {first.device.type}):
            return f"parts of it lie on {', '.join(apart)}"
        if any(layer.observe for layer in self.layers):
            return "the profiler looks on"
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "hooks on every module"
        for name, module in decoder.named_modules():
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            # transformers' own, which collect outputs, stay where they were once asked for
            if name and not all(h.__module__.startswith(OWN_HOOKS) for h in hooks):
                return f"a hook on {name}"
            if name and "forward" in module.__dict__ and not _only_moves(module):
                return f"another forward on {name}"
        store = first.stores[0]
        need = kernels.Need.of(store.k, store.k, store.v, block=PAGE, lists=True)
        kernel = kernels.pick(kernels.DECODE, need)
        return None if kernel.name == "Triton" else f"its keys are read by {kernel.name}"


def _only_moves(module: nn.Module) -> bool:
    """Whether its forward is accelerate's, which brings inputs to the device of the weights."""
    hook = module.__dict__.get("_hf_hook")
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


class Place:
    """What all graphs on a device share: streams, and memory, since no two of them run at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)  # that they are recorded on
        self.aside = torch.cuda.Stream(device)  # for what is asked while one runs
        self.last: torch.cuda.Stream | None = None  # of the last replay
        self.lock = threading.Lock()

    @cached_property
    def held(self) -> torch.cuda.CUDAGraph:
        """A graph that holds the pool from which graphs that begin on this device are recorded.

        A pool whose graphs are all gone can't be used again, and stays reserved.
        """
        held = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            held.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self.device)  # of an empty graph torch warns
            held.capture_end()
        return held

    @cached_property
    def pool(self) -> torch.cuda.MemPool:
        """The memory of graphs that begin on another device."""
        with torch.cuda.device(self.device):
            return torch.cuda.MemPool()


_places: dict[torch.device, Place] = {}


def _place(device: torch.device) -> Place:
    if device not in _places:
        _places.setdefault(device, Place(device))
    return _places[device]


@contextlib.contextmanager
def _alone_on(devices: Sequence[torch.device]):
    """The places of some devices, where no other graph is recorded or launched meanwhile."""
    places = [_place(device) for device in devices]
    with contextlib.ExitStack() as stack:
        for place in sorted(places, key=lambda place: str(place.device)):
            stack.enter_context(place.lock)
        yield places


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
        self.wrapped = [(table, name) for table, name, wrapped in held if wrapped]
        self.tables, self.names = zip(*self.plain, strict=True) if self.plain else ((), ())
        self.lie = self._look()

    def moved(self) -> bool:
        try:
            return self._look() != self.lie
        except (KeyError, TypeError, AttributeError):  # one is gone, or another kind of tensor
            return True

    def _look(self) -> list[int]:
        tensors = map(dict.__getitem__, self.tables, self.names)
        found = [*map(Tensor.data_ptr, tensors)]  # asked in each step: no Python for each of them
        for table, name in self.wrapped:
            found += _pointers(table[name])
        return found


def _pointers(t: Tensor) -> list[int]:
    """Where a tensor, or what it is made of, lies."""
    if not is_traceable_wrapper_subclass(t):
        return [t.data_ptr()]
    inner, _ = t.__tensor_flatten__()
    return [at for name in inner for at in _pointers(getattr(t, name))]


def _later(mask: Tensor | None) -> Callable[[], list[int] | None]:
    """`row_starts` of a mask as it is now, to be asked later: it waits for nothing told since."""
    if mask is None or not mask.is_cuda:
        return partial(row_starts, mask)
    stream = _place(mask.device).aside
    ready = torch.cuda.current_stream(mask.device).record_event()

    def ask() -> list[int] | None:
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            return row_starts(mask)

    return ask


@contextlib.contextmanager
def _aside(device: torch.device):
    """A stream of a device, as its current one, that joins another's recording.

    What is allocated there meanwhile lies in the pool of such recordings.
    """
    place = _place(device)
    with torch.cuda.stream(place.stream), torch.cuda.use_mem_pool(place.pool, device):
        yield


class NoWait(TorchDispatchMode):
    """Raises where the host would wait for the GPU: a recording that does is broken for good."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS or (name in ("index", "index_put_") and _by_mask(args[1])):
            raise RuntimeError(f"the host waits for {name}")
        made = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and args[name == "copy_"].is_cuda and not made.is_cuda:
            raise RuntimeError("the host waits for a copy to it")
        return made


WAITS = "_local_scalar_dense nonzero masked_select equal bincount _unique2 unique_dim".split()


def _by_mask(indices) -> bool:
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)


class Through(Cache):
    """Stands for the cache in a recorded step: attention knows the layers that it serves."""

    def __init__(self):
        super().__init__(layers=[])

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states

    def get_seq_length(self, *args, **kwargs) -> int:
        return 0  # positions are given

    def get_mask_sizes(self, *args, **kwargs) -> tuple[int, int]:
        return 1, 0


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


class Graph:
    """One recorded step, and the tensors that it reads and writes."""

    settings: Settings  # as they were when it was checked

    def __init__(self, call: Callable, given: dict[str, Any], past, rows, key, serving, weights):
        """Record `call(**given)`: its Python runs, its kernels don't."""
        self.key, self.replays, self.weights = key, 0, weights
        self.inputs = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
        self.device = next(iter(self.inputs.values())).device
        lies = dict.fromkeys(layer.device for _, layer in serving.values())
        self.others = [device for device in lies if device != self.device]
        self.devices = self.device, *self.others
        self.length = torch.tensor(rows, device=self.device)
        self.parts: list[torch.cuda.CUDAGraph] = []
        stream, current = _place(self.device).stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        self._gather(stream)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_alone_on(self.devices))
            self.pool = _place(self.device).held.pool()
            for device in self.others:
                stack.enter_context(_aside(device))
            stack.enter_context(torch.cuda.stream(stream))
            self._begin(stream)
            try:
                step = Step.single(past, rows, self.length)
                stack.enter_context(_recording(step, serving, partial(self._cut, stream, serving)))
                output = call(**_without_cache({**given, **self.inputs}))
                self._gather(stream)
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self.parts[-1].capture_end()
                del _place(self.device).held  # torch may go on counting its pool as recorded to
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

    def holds(self, layers: list[Layer], rows: list[int]) -> None:
        """Note up to which lengths of rows the key stays as it is, now that it is right."""
        self.places = [(store, store.k) for layer in layers for store in layer.stores]
        self.least, self.most = min(rows), min(store.until(rows) for store, _ in self.places)
        for store, _ in self.places:
            if max(rows) < store.below:
                self.most = min(self.most, store.below - 1)

    def fits(self, asked: tuple, rows: list[int]) -> bool:
        """Whether it surely serves such a call; else its key tells."""
        return (
            self.least <= min(rows)
            and max(rows) <= self.most
            and self.key[0] == asked
            and all(store.k is k for store, k in self.places)
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

    def replay(self, given: dict[str, Any], rows: list[int]) -> Any:
        """The step's output for these inputs; keys are stored, no counter on the host is."""
        for name, held in self.inputs.items():
            held.copy_(given[name])
        if len(set(rows)) == 1:
            self.length.fill_(rows[0])
        else:
            self.length.copy_(torch.tensor(rows, device="cpu"), non_blocking=True)
        stream = torch.cuda.current_stream(self.device)
        self._gather(stream)
        self.launch()
        self._scatter(stream)
        made = {n: x.clone() if isinstance(x, Tensor) else x for n, x in self.outputs.items()}
        return _with_cache(self.kind(**made), given)


def _live(call: Callable, given: dict[str, Any], past, rows, serving) -> Any:
    """A step as one would record it, run at once."""
    device = next(x.device for x in given.values() if isinstance(x, Tensor))
    step = Step.single(past, rows, torch.tensor(rows, device=device))
    with _recording(step, serving):
        return _with_cache(call(**_without_cache(given)), given)


@contextlib.contextmanager
def _recording(step: Step, serving: dict[int, tuple[LayerPlan, Layer]], cut=None):
    call = running()
    call.recorded = Recorded(step, serving, cut)
    try:
        yield
    finally:
        call.recorded = None


def _without_cache(given: dict[str, Any]) -> dict[str, Any]:
    return {name: Through() if isinstance(x, Cache) else x for name, x in given.items()}


def _with_cache(output: Any, given: dict[str, Any]) -> Any:
    cache = next(x for x in given.values() if isinstance(x, Cache))
    for name, value in output.items():
        if isinstance(value, Through):
            output[name] = cache
    return output


def _obstacle(decoder, kwargs, new: Tensor) -> str | None:
    """Why this step can't be a graph: what may differ from step to step."""
    mask = kwargs.get("attention_mask")
    if not new.is_cuda:
        return f"no CUDA graphs on {new.device.type}"
    if torch.is_grad_enabled():
        return "gradients are wanted: call under torch.no_grad()"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if torch.cuda.is_current_stream_capturing():
        return "the caller records a graph of its own"
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return "the mask is not [batch, columns]"
    for name, x in kwargs.items():
        if not isinstance(x, Tensor | Cache | bool | int | float | str | None):
            return f"{name} is a {type(x).__name__}"
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name) or getattr(decoder.config, name, False):
            return f"{name} is asked for"
    return "tuples are asked for" if kwargs.get("return_dict") is False else None


def new_tokens(kwargs: dict) -> Tensor | None:
    """What a text decoder is given to read, `[B, Q]` or `[B, Q, hidden]`."""
    embeds = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if embeds is None else embeds


@lru_cache
def parameters(decoder: type) -> tuple[str, ...]:
    """What a text decoder's forward takes, in order."""
    return tuple(inspect.signature(decoder.forward).parameters)[1:]


def _given(kwargs: dict, first: Layer, decoder: type) -> dict[str, Any]:
    """What a recorded forward gets: no mask, and positions where the caller left them out."""
    given = {**kwargs, "attention_mask": None}
    for name, shape in (("position_ids", (1, 1)), ("cache_position", (1,))):
        if name in parameters(decoder) and given.get(name) is None:
            given[name] = torch.full(shape, first.seen, device=first.device)
    return given


def _asked(given: dict[str, Any]) -> tuple:
    """What a call asks for: all of its arguments but tensors' contents."""
    return torch.is_inference_mode_enabled(), *(
        (name, x.shape, x.dtype)
        if isinstance(x, Tensor)
        else (name, x if isinstance(x, (bool, int, float, str, type(None))) else id(x))
        for name, x in given.items()
    )


def _lies(layers: list[Layer], rows: list[int]) -> tuple[tuple, tuple]:
    """What else is frozen in a graph: which selectors choose, and where keys lie."""
    stores = [store for layer in layers for store in layer.stores]
    places = tuple((*(t.data_ptr() for t in store.tensors()), store.k.shape[2]) for store in stores)
    return tuple(chooses(store, rows) for store in stores), places


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm())


def _snapshot(layers: list[Layer]) -> list[tuple]:
    """The host's side of a cache."""
    return [
        (layer.rows, layer.seen, layer.stored, [s.low for s in layer.stores]) for layer in layers
    ]


def _restore(layers: list[Layer], before: list[tuple]) -> None:
    for layer, (rows, seen, stored, lows) in zip(layers, before, strict=True):
        layer.rows, layer.seen, layer.stored = rows, seen, stored
        for store, low in zip(layer.stores, lows, strict=True):
            store.low = low  # of a ring; a full store's summaries are the same tensor
