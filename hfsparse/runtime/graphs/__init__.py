"""Decode steps of a patched model as CUDA graphs: the Python of a step runs once a cache.

From the third step over a cache on, the text decoder's forward is recorded and replayed: steps of
one token a row, and each number of tokens up to `STEP` by which drafts are verified. What
differs from step to step (lengths, positions, the tokens themselves) lies in a few tensors that
are filled anew before each replay; the host's counters advance beside it. A graph belongs to one
cache's buffers, the states of its linear layers among them, and the model's weights: another cache,
weights that lie elsewhere, a growth of the buffers or the first row that passes `below.decode` is
recorded anew, at about the price of three eager steps: none is answered by a graph until one replay
gave what the same step gives eagerly.
Each call of `generate` begins anew and sees adapters and hooks that changed (a loop of single
tokens written by hand sees hooks at its next prompt); numbers that modules hold, as an adapter's
scale, are looked at before each replay.
What can't be replayed runs as it is (`Graphs.why`). While a step is recorded, another thread that
draws random numbers on the same GPU may fail: torch's generators know one recording at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hfsparse import kernels
from hfsparse.errors import Error
from hfsparse.lists import PAGE
from hfsparse.lists.lengths import Lengths
from hfsparse.models.names import new_tokens
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.call import running
from hfsparse.runtime.decode import is_step
from hfsparse.runtime.graphs.fewer import with_fewer_launches
from hfsparse.runtime.graphs.obstacles import (
    FSDP,
    NoWait,
    find_obstacle,
    has_hook,
    hooks_everywhere,
    is_known,
)
from hfsparse.runtime.graphs.parts import fused
from hfsparse.runtime.graphs.pool import lock_devices
from hfsparse.runtime.graphs.products import with_own_products
from hfsparse.runtime.graphs.recording import (
    Graph,
    complete_inputs,
    describe_buffers,
    describe_call,
    measure_difference,
    restore_host,
    restride,
    run_live,
    snapshot_host,
)
from hfsparse.runtime.graphs.states import States
from hfsparse.runtime.graphs.weights import Settings, Weights, ask_later
from hfsparse.runtime.layer_plan import LayerPlan
from hfsparse.runtime.masks import row_starts

# How a step is run. All ranks that share a model's heads run it alike, as the one that is ready for
# least: what they sum up together must be summed as often on each, and recorded at once.
EAGER, LIVE, RECORD, REPLAY = range(4)
NO_REPLAY = "the step is no replay"
BUSY = "another thread runs a step of this model"
OTHERS = "another rank is not ready for it"
WARM = 3  # the step of a cache that is recorded: short answers don't pay, and kernels compile
FEW = 8  # replays under which a graph was not worth its recording
NOISE = 4  # a replay may differ from an eager step so many times as far as two eager steps do


@dataclass
class Steps:
    """Steps of so many new tokens over one cache."""

    graph: Graph | None = None
    warm: tuple[int, tuple] | None = None  # how many had none; which stores chose in the last
    moves: int = 0  # graphs of few replays, one after another
    refused: str | None = None  # why there is none

    def forget(self) -> None:
        self.graph = self.warm = self.refused = None


@dataclass(frozen=True)
class Planned:
    """How a step may be run: a graph is there for REPLAY, and a mask if it was not looked at."""

    level: int
    given: dict[str, Any]
    rows: list[int]
    lengths: Lengths | None = None  # where the mask was looked at
    key: tuple | None = None
    graph: Graph | None = None
    mask: Tensor | None = None


class NotReady(Error):
    """A step can't run ahead; nothing has changed."""


class Graphs:
    """The graphs of one patched model, each of one cache and a number of new tokens."""

    def __init__(
        self,
        layers: list[LayerPlan],
        linear: bool = False,
        fuse: bool = False,
        agree: Callable[[int], int] | None = None,  # the least of what all ranks say
    ):
        latents = any(layer.rank for layer in layers)
        self.layers, self.linear, self.fuse = layers, linear, fuse and not latents
        self.keeping = sum(layer_plan.producer is None for layer_plan in layers)  # keys
        # By a cache's first layer, and how many new tokens a step has.
        self.kept: WeakKeyDictionary[CacheLayer, dict[int, Steps]] = WeakKeyDictionary()
        self.why: str | None = "no step has run yet"  # why the last one was no replay
        self.never: str | None = None  # why none will be
        self.single: dict[int, str] = {}  # why none of so many tokens will be
        # Why nothing is fused, though it was asked for.
        self.loose: str | None = "not fused, its cache holds latents" if fuse and latents else None
        self.unfused: dict[int, str] = {}  # why steps of so many tokens, more than one, are not
        # The first layer of the cache that `stats` looked at.
        self.held: Callable[[], CacheLayer | None] = lambda: None
        self.lock = threading.Lock()
        self.agree = agree or (lambda level: level)
        self.known: dict = {}  # which of the decoder's modules have forms of ours
        self.whole = False  # a fused step's decoder is compiled in one, not part by part

    def __reduce__(self):
        return Graphs, (self.layers, self.linear, self.fuse)  # a copy of the model has its own

    def __str__(self) -> str:
        if self.why is not None:
            return f"no ({self.why})"
        return "yes, fused" if self.fuse else f"yes ({self.loose})" if self.loose else "yes"

    def run(self, forward: Callable, decoder: nn.Module, kwargs: dict, cache: Any) -> Any:
        """`forward(**kwargs)` of the text decoder, by a graph where that is possible.

        A step that runs ahead is replayed, or NotReady is raised. The cache counts it no sooner
        than `count_ahead`.
        """
        if (call := running()) is not None and call.ahead:
            return self._run_ahead(decoder, kwargs, cache)
        layers = [x for x in getattr(cache, "layers", ()) if isinstance(x, CacheLayer)]
        new = new_tokens(kwargs)
        if len(layers) != self.keeping or new is None or not layers[0].is_initialized:
            return forward(**kwargs)
        first, Q = layers[0], new.shape[1]
        if not Q or not is_step(first, Q, first.seen + Q):
            self.forget(first)
            self.why = f"the last call had {Q} new tokens: prompts and chunks are no steps"
            return forward(**kwargs)
        states, steps = States(cache), self.kept.setdefault(first, {}).setdefault(Q, Steps())
        self.why = self.never or self.single.get(Q) or steps.refused or states.why_not()
        self.why = self.why or find_obstacle(decoder, kwargs, new) or self._why_extended(first, Q)
        if self.why is None and Q > 1:
            self.why = self._why_single(states)
        held = self.why is None and self.lock.acquire(blocking=False)
        if not held:
            self.why = self.why or BUSY
        try:
            step = self._plan(decoder, kwargs, layers, states, Q, steps) if held else None
            level = self.agree(step.level if step else EAGER)
            if step is None or level == EAGER:
                self.why = self.why or OTHERS
                return forward(**kwargs)
            if level == REPLAY:
                return self._replay(step, layers)
            return self._first(forward, decoder, kwargs, layers, states, Q, steps, step, level)
        finally:
            if held:
                self.lock.release()

    def _run_ahead(self, decoder: nn.Module, kwargs: dict, cache: Any) -> Any:
        """A replay of a step that the cache does not count yet."""
        layers = [x for x in getattr(cache, "layers", ()) if isinstance(x, CacheLayer)]
        graph = self.graph_of(layers)
        given = complete_inputs(kwargs, layers[0], type(decoder), 1)
        asked, rows = describe_call(given), [n + 1 for n in layers[0].rows]
        why = NO_REPLAY if graph is None or graph.stale() else None
        held = why is None and self.lock.acquire(blocking=False)
        try:
            if held and not graph.fits(asked, rows, States(cache)):
                why = "the step is recorded anew"
            ready = held and why is None
            if not self.agree(ready):
                raise NotReady(OTHERS if ready else why or BUSY)
            return self._launch(Planned(REPLAY, given, rows, graph=graph), layers)
        finally:
            if held:
                self.lock.release()

    def graph_of(self, layers: list[CacheLayer]) -> Graph | None:
        """The graph of steps of one token over a cache of these layers, if there is one."""
        steps = self.kept.get(layers[0], {}) if layers else {}
        return steps[1].graph if 1 in steps else None

    def beside(self, cache: Any, layers: list[CacheLayer]) -> list[Tensor]:
        """What a replayed step changes, other than keys and what is kept of pages."""
        stores = (store for layer in layers for store in layer.stores)
        chosen = [t for s in stores if s.choice is not None for t in s.choice.tensors()]
        counted = [t for layer_plan in self.layers for t in layer_plan.counts.of_steps()]
        return [*chosen, *counted, *States(cache).tensors()]

    def count_ahead(self, layers: list[CacheLayer]) -> None:
        """The cache has one token of each row more, whose step has run ahead."""
        self._passed(layers, [n + 1 for n in layers[0].rows])

    def take_back_ahead(self, layers: list[CacheLayer]) -> None:
        """Have the cache be as if a step that has run ahead never had; but what is `beside`."""
        self.count_ahead(layers)
        self.count(layers[0].rows, 1, -1)
        for layer in layers:
            layer.take_back(1)

    def _why_single(self, states: States) -> str | None:
        """Why steps of several tokens are none."""
        if states:
            return "several tokens go another way through linear layers"
        if any(layer.packs for layer in self.layers):
            return "several tokens may pack a page of the cache on their way"
        hosts = any(layer.hosts for layer in self.layers)
        return "several tokens may ask for more pages than a hot set holds" if hosts else None

    def _why_extended(self, first: CacheLayer, Q: int) -> str | None:
        """Why a step over rows too long for the model is none: its launches grow with them."""
        longest = max(first.rows) + Q
        extended = any(layer.extends(longest) for layer in self.layers)
        return "rows longer than the model knows are read chunk by chunk" if extended else None

    def forget(self, first: CacheLayer) -> None:
        """Begin anew with a cache: weights, adapters or hooks may have changed."""
        for steps in self.kept.get(first, {}).values():
            steps.forget()

    def _plan(
        self, decoder, kwargs, layers, states: States, Q: int, steps: Steps
    ) -> Planned | None:
        """How this rank is ready to run a step; None: eagerly, for the reason in `why`."""
        first, mask = layers[0], kwargs.get("attention_mask")
        if steps.graph is not None and steps.graph.stale():
            steps.forget()
        graph, given = steps.graph, complete_inputs(kwargs, first, type(decoder), Q)
        asked, rows = describe_call(given), [n + Q for n in first.rows]
        if graph is not None and min(rows) > Q and graph.fits(asked, rows, states):
            if mask is None:
                first.lengths(None, Q)
            return Planned(REPLAY, given, rows, graph=graph, mask=mask)
        step = self._looked_at(layers, given, mask, states, Q)
        if step is None:
            self.why = "a row has fewer new tokens than others"
            return None
        rows, key = step.rows, step.key
        if graph is not None and graph.key != key:
            moved = graph.key[2] != key[2] and graph.replays < FEW
            steps.forget()
            steps.moves = steps.moves + 1 if moved else 0
            if steps.moves > 1:
                steps.refused = self.why = "its buffers move from step to step (beams?)"
                return None
            graph = None
        if graph is not None:
            graph.holds(layers, rows, states)
            return replace(step, graph=graph)
        count, chose = steps.warm or (0, key[1])
        count = count + 1 if chose == key[1] else WARM - 1  # nothing runs first while recorded
        steps.warm = count, key[1]
        if count < WARM - 1:
            self.why = "the first steps of a cache are not replayed"
        elif (why := self._lasting(decoder, first, states)) is not None:
            self.why = steps.refused = why
        if self.why is not None:
            return None
        return replace(step, level=LIVE if count < WARM else RECORD)

    def _looked_at(self, layers, given, mask, states: States, Q: int) -> Planned | None:
        """A step whose mask was looked at, with room for its tokens; None: a row has fewer."""
        lengths = layers[0].lengths(row_starts(mask), Q)
        if lengths.padded:
            return None
        past, rows = lengths.past, lengths.rows
        for layer in layers:
            layer.room(past, rows)  # and its table is written now: a recorded step can't
        self.held = lambda: None  # buffers may have moved: what they take is told anew
        key = (describe_call(given), *describe_buffers(layers, rows, states))
        return Planned(REPLAY, given, rows, lengths, key)

    def _first(
        self, forward, decoder, kwargs, layers, states, Q: int, steps: Steps, step: Planned, level
    ) -> Any:
        """A step run as it will be recorded, or the one that is recorded."""
        if step.key is None:  # this rank could have replayed it
            step = self._looked_at(layers, step.given, step.mask, states, Q)
        given, rows, lengths = step.given, step.rows, step.lengths
        serving, before = self._serving(layers), []
        forward = with_own_products(forward)
        fuse = self.fuse and Q not in self.unfused
        try:
            before += states.copies()
            given = restride(given) if fuse else given
            if fuse:
                own = self._fused(decoder, states)
            else:
                own = with_fewer_launches(forward, decoder, self.known)
            call = states.settled(own)
            if level == LIVE:  # once as it will be recorded: compiles, and shows what can't be
                self.why = "the first steps of a cache are not replayed"
                with contextlib.nullcontext() if fuse and self.whole else NoWait():
                    output = run_live(call, given, lengths, serving)
                self._passed(layers, rows)
                return output
            steps.graph = None
            graph = self._recorded(call, given, lengths, step.key, serving, Weights(decoder))
            graph.holds(layers, rows, states)
            steps.graph = graph
            step = replace(step, given=given, graph=graph)
            compiled = call if fuse else None
            output = self._checked(step, compiled, forward, kwargs, layers, states)
            graph.settings = Settings(decoder)  # behind all that an eager step may set
            return output
        except torch.cuda.OutOfMemoryError:
            steps.refused = self.why = "out of memory when it was recorded"
        except Exception as error:  # whatever a model does that can't be compiled or recorded
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if fuse and not self.whole:  # what lies between its parts may not be recorded
                self.whole, steps.warm = True, None
                self.why = f"fused part by part it can't be recorded, {told}"
            elif fuse:
                self._unfuse(Q, f"not fused, {told}")
            else:
                self._give_up(Q, f"it can't be recorded, {told}")
        states.restore(before)
        return forward(**kwargs)

    def _recorded(self, *what) -> Graph:
        """A graph, if all ranks have one."""
        try:
            graph = Graph(*what)
            if graph.weights.moved():
                raise RuntimeError("its forward replaces weights or buffers")
        except BaseException:
            self.agree(False)
            raise
        if not self.agree(True):
            raise RuntimeError("another rank couldn't record it")
        return graph

    def _fused(self, decoder: nn.Module, states: States) -> Callable:
        """The decoder's forward, compiled, with one operator in place of each layer's attention."""
        states.unguard()

        def call(**given):
            mode = self.layers[0].mode
            mode.fusing = True
            try:
                with fused(decoder, new_tokens(given).shape[1], self.whole) as forward:
                    return forward(decoder, **given)
            finally:
                mode.fusing = False

        return call

    def _unfuse(self, Q: int, why: str) -> None:
        """Fuse no more steps of Q tokens; where single tokens can't be, none at all."""
        self.why = why
        if Q > 1:
            self.unfused[Q] = why
        else:
            self.fuse, self.loose = False, why

    def _serving(self, layers: list[CacheLayer]) -> dict[int, tuple[LayerPlan, CacheLayer]]:
        own = {layer.index: layer for layer in layers}
        return {each.index: (each, own[(each.producer or each).index]) for each in self.layers}

    def _give_up(self, Q: int, why: str) -> None:
        """Replay no more steps of Q tokens; where single tokens can't be, none at all."""
        self.why = why
        if Q == 1:
            self.never = why
            self.kept.clear()
        else:
            self.single[Q] = why
        for steps in self.kept.values():
            steps.pop(Q, None)

    def _checked(self, step: Planned, compiled, forward, kwargs, layers, states: States) -> Any:
        """A graph's first replay, beside the same step run live, with the same kernels.

        Equal bits are asked for, of the output and of the states that linear layers are left with,
        since no bound of a dtype's rounding would show one wrong page of many; where the model
        itself says something else each time, as near as it is to itself.
        """
        given, rows, Q = step.given, step.rows, step.lengths.columns
        before, were = snapshot_host(layers), states.copies()
        counted = [t for layer_plan in self.layers for t in layer_plan.counts.of_steps()]
        read = [(t, t.clone()) for t in counted]

        def run() -> Any:
            if compiled is None:
                return forward(**kwargs)
            output = run_live(compiled, given, step.lengths, self._serving(layers))
            self._passed(layers, rows)
            return output

        def take_back() -> None:
            restore_host(layers, before)
            states.restore(were)
            for held, was in read:
                held.copy_(was)
            self.count(rows, Q, -1)

        def left(output: Any) -> list[Tensor]:
            return [output[0], *states.copies()]

        wanted = left(run())
        take_back()
        output = self._replay(step, layers)
        found = left(output)
        if self.agree(all(map(torch.equal, found, wanted))):
            return output
        take_back()
        output = run()  # the replay may have stored other keys
        for a, b, c in zip(found, wanted, left(output), strict=True):
            if measure_difference(a, c) > NOISE * measure_difference(b, c):
                self._give_up(Q, "replayed, this model gives something else than eagerly")
        return output

    def _replay(self, step: Planned, layers) -> Any:
        """A step by its graph; a mask that was not looked at yet is while the device is busy."""
        graph, rows, mask = step.graph, step.rows, step.mask
        first, starts, Q = layers[0], ask_later(mask), rows[0] - layers[0].rows[0]
        if mask is not None and graph.states:
            first.lengths(starts(), Q)  # before: what linear layers keep can't be taken back
            mask = None
        output = self._launch(step, layers)
        if mask is not None:
            try:
                first.lengths(starts(), Q)
            except ValueError:  # no step: its keys lie behind the rows, choices may know of them
                for layer in layers:
                    layer.take_back(0)
                raise
        self._passed(layers, rows)
        return output

    def _launch(self, step: Planned, layers: list[CacheLayer]) -> Any:
        """A replay, behind whatever graph was launched last on its devices."""
        graph = step.graph
        current = torch.cuda.current_stream(graph.device)
        with lock_devices(graph.devices) as places:
            for place in places:
                if place.last is not None and place.last != current:
                    current.wait_stream(place.last)
                place.last = current
            graph.replays += 1
            return graph.replay(step.given, step.rows, layers[0].ended)

    def _passed(self, layers, rows) -> None:
        """What an eager step changes on the host."""
        Q = rows[0] - layers[0].rows[0]
        for layer in layers:
            layer.rows = rows
            layer.seen += Q
            layer.stored = layer.seen
        self.count(rows, Q)

    def count(self, rows: list[int], Q: int, times: int = 1) -> None:
        for layer_plan in self.layers:
            for n in rows if layer_plan.leads else ():
                layer_plan.steps[n, Q, n] += times

    def _lasting(self, decoder, first: CacheLayer, states: States) -> str | None:
        """Why no step of this cache can be a graph: asked once, when one is to be recorded."""
        if self.linear and not states:
            return "its linear layers keep their states outside of the cache"
        lies = {t.device.type for t in (*decoder.parameters(), *decoder.buffers())}
        if apart := sorted(lies - {first.device.type}):
            return f"parts of it lie on {', '.join(apart)}"
        if self.layers[0].mode.observe:
            return "the profiler looks on"
        if hooks_everywhere():
            return "hooks on every module"
        if any(type(m).__module__.startswith(FSDP) for m in decoder.modules()):
            return "its weights are gathered from other ranks (FSDP)"
        for name, module in decoder.named_modules():
            if name and has_hook(module):
                return f"a hook on {name}"
            if name and "forward" in module.__dict__ and not is_known(module):
                return f"another forward on {name}"
        if any(
            group.eviction and group.eviction.adds_up for x in self.layers for group in x.groups
        ):
            return "each step ranks the keys that are kept, and evicts some"
        store, tables = first.stores[0], running().tables
        kinds = ((each.packs, each.hosts, each.means) for each in self.layers)
        for packed, hosted, lse in dict.fromkeys(kinds):
            asked = {"block": PAGE, "lists": True, "latents": first.rank > 0, "hosted": hosted}
            need = kernels.Need.of(store.k, store.k, store.v, **asked, packed=packed, lse=lse)
            for table, done in ((tables.decode, "read"), (tables.append, "stored")):
                kernel = kernels.pick(table, need)
                if not kernel.device_lengths:
                    return f"its keys are {done} by {kernel.name}"
        for hot in (part.hot for part in first.places().parts if part.hot is not None):
            need = need._replace(slots=hot.owner.shape[2])
            if not (kernel := kernels.pick(tables.fetch, need)).device_lengths:
                return f"pages in host memory are fetched by {kernel.name}"
        return None
