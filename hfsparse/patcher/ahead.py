"""The next step of `generate`, launched before the host has looked at the last token.

`generate` asks for the logits behind one token at a time. It chooses the next token from them, asks
its criteria, tells its streamer, and calls again: on the host, while the GPU waits. So behind a
step that was replayed the next token is chosen on the GPU as `generate` will choose it (its
processors, the random numbers that it will draw with), and the step that reads it is launched at
once, on a stream of its own. What `generate` does meanwhile waits for the last step alone. Where it
comes back with that token, it gets what is under way, and the step behind it is launched.

It chooses and decides as ever. Where it comes back with something else or not at all, the cache has
the step taken back: its key goes, choices, counts and states of linear layers are copied back. By
then a ring has overwritten the oldest key beyond its window: it can go back one token less.
No step is launched behind the last token that `max_length` allows; one that is taken back behind
any other has cost the GPU a step. None is under way outside of `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import logits_process

from hfsparse.models.names import find_cache
from hfsparse.patcher.choosing import Choosing, is_plain_step, later_call
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.call import running_ahead
from hfsparse.runtime.graphs import NO_REPLAY, Graphs, NotReady
from hfsparse.runtime.graphs.lane import Lane

PAUSE = 8  # steps that none runs ahead of, for each wrong token in a row
WRONG = "generate chooses other tokens than its known processors do: one of a user's own?"
# Processors of transformers' own in which the host waits for nothing. Others are not asked: they
# mostly leave the token as it is.
KNOWN = """
Temperature TopK TopP MinP Typical Epsilon RepetitionPenalty MinLength MinNewTokensLength
SuppressTokens SuppressTokensAtBegin ForcedBOSToken ForcedEOSToken ExponentialDecayLengthPenalty
LogitNormalization InfNanRemove
""".split()


class Ahead:
    """What a patch keeps for steps that run ahead."""

    def __init__(self, graphs: Graphs, never: str | None = None):
        self.graphs, self.never = graphs, never
        self.why: str | None = "no generate has run yet"  # why the last step was none
        self.serving: WeakKeyDictionary[CacheLayer, Runner] = WeakKeyDictionary()

    def __reduce__(self):
        return Ahead, (self.graphs, self.never)

    def __str__(self) -> str:
        why = self.never or self.why
        return "yes" if why is None else f"no ({why})"


@dataclass
class Launched:
    """A step that runs ahead."""

    given: dict[str, Any]  # the call that it answers
    layers: list[CacheLayer]
    rows: list[int]  # the cache's, who renews the list whenever it changes
    chosen: torch.cuda.Event | None
    done: torch.cuda.Event | None = None
    output: Any = None


class Runner(LogitsProcessor):
    """Steps ahead of one `generate` over the cache whose first layer this is. It sees the tokens as
    a processor that changes none."""

    lane: Lane  # of the step under way

    def __init__(
        self,
        ahead: Ahead,
        first: CacheLayer,
        config: Any,
        processors: Sequence[LogitsProcessor],
    ):
        self.ahead, self.graphs, self.first = ahead, ahead.graphs, first
        ahead.serving[first] = self
        self.choosing = Choosing(config, [each for each in processors if _is_known(each)])
        self.ids: Tensor | None = None  # [B, n] tokens so far, where logits were asked for last
        self.step: Launched | None = None
        self.wrong = self.pause = 0  # tokens in a row, steps that are still to go by
        self.held: list[Tensor] = []  # what a step changes, and what it was before
        self.were: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids = input_ids
        return scores

    def answer(self, forward: Callable, given: dict[str, Any], layers: list[CacheLayer]) -> Any:
        """`forward(**given)` of a model that goes on with a cache of these layers."""
        ids, self.ids = self.ids, None
        plain = ids is not None and is_plain_step(given, layers, ids)
        taken = self._take(given, layers) if plain else self.finish()
        if taken is None:
            output = forward(**given)
            if not plain or self.graphs.why is not None:
                self.ahead.why = self.graphs.why or "generate asks for more than logits"
                return output
        else:
            output = taken.output
        ids = torch.cat([ids, given["input_ids"].to(ids.device)], 1)
        if self.pause:
            self.pause -= 1
        elif self.choosing.left(ids) > 0:
            self._launch(forward, given, layers, ids, output)
        if taken is not None:  # not before: the next step waits for the host's stream
            self.lane.join(taken.done, _tensors(output))
        return output

    def end(self) -> None:
        """No step is under way, and none will be."""
        self.finish()
        self.ahead.serving.pop(self.first, None)

    def finish(self) -> None:
        """Take back the step that is under way, if one is."""
        step, self.step = self.step, None
        if step is None:
            return
        self.lane.join(self.lane.mark(), [])
        self.graphs.take_back_ahead(step.layers)
        if self.held:
            torch._foreach_copy_(self.held, self.were)

    def _wait(self) -> None:
        """Run no step ahead for a while."""
        self.wrong += 1
        self.pause = PAUSE * self.wrong

    def _take(self, given: dict[str, Any], layers: list[CacheLayer]) -> Launched | None:
        """The step under way, which the cache counts from now on, if a call asks for it."""
        step = self.step
        if step is None:
            return None
        self.lane.join(step.chosen, _tensors(step.given))
        graph = self.graphs.graph_of(layers)
        known = layers[0].rows is step.rows and graph is not None and not graph.stale()
        same = known and _same(step.given, given)
        if not self.graphs.agree(same):  # all ranks take it, or none
            if known:
                self._wait()
                self.ahead.why = WRONG
            return self.finish()
        self.step, self.wrong = None, 0
        self.graphs.count_ahead(layers)
        return step

    def _launch(
        self,
        forward: Callable,
        given: dict[str, Any],
        layers: list[CacheLayer],
        ids: Tensor,
        output: Any,
    ) -> None:
        """Choose the tokens behind ids `[B, n]` from their output, and run the step that reads
        them."""
        graph = self.graphs.graph_of(layers)
        if graph is None or len(graph.devices) > 1:
            self.ahead.why = "its layers lie on several devices" if graph else NO_REPLAY
            return
        self.lane = lane = Lane(graph.device)
        try:
            made = later_call(given, given["input_ids"], 1)  # all but the tokens, beside a step
            with lane.run([ids, output.logits, *_tensors(made)]):
                self._note(self.graphs.beside(find_cache(given), layers))
                with self.choosing.same_numbers(ids.device):
                    tokens = self.choosing.choose(ids, output.logits)
                made["input_ids"] = tokens.to(given["input_ids"].device)
                self.step = Launched(made, layers, layers[0].rows, lane.mark())
                with running_ahead():
                    self.step.output = forward(**made)
                self.step.done, self.ahead.why = lane.mark(), None
        except NotReady as why:
            self.step, self.ahead.why = None, str(why)
        except Exception as error:  # as the call itself will raise, if it comes
            self.finish()
            self._wait()
            self.ahead.why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _note(self, tensors: list[Tensor]) -> None:
        """Keep what tensors hold that a step will change."""
        if [*map(id, tensors)] != [*map(id, self.held)]:
            self.held, self.were = tensors, [torch.empty_like(t) for t in tensors]
        if tensors:
            torch._foreach_copy_(self.were, tensors)  # in one launch, where they are of one type


def _is_known(processor: LogitsProcessor) -> bool:
    kind = type(processor)
    name = kind.__name__.removesuffix("LogitsProcessor").removesuffix("LogitsWarper")
    return kind.__module__ == logits_process.__name__ and name in KNOWN


def _tensors(named: dict[str, Any]) -> list[Tensor]:
    return [x for x in named.values() if isinstance(x, Tensor)]


def _same(made: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether two calls ask for the same; the host waits for what the tokens are chosen from."""
    if made.keys() != given.keys():
        return False
    pairs = [(made[name], x) for name, x in given.items()]
    tensors = [pair for pair in pairs if isinstance(pair[1], Tensor)]
    if any(a is not b and a != b for a, b in pairs if not isinstance(b, Tensor)):
        return False
    alike = all(isinstance(a, Tensor) and a.dtype == b.dtype for a, b in tensors)
    return alike and all(torch.equal(a, b) for a, b in tensors)
