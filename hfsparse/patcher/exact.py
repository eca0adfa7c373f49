"""Exact mode: the plan drafts, and one step of the whole model verifies what it drafted.

    handle = hfsparse.patch(model, "plan.yaml", exact=True)

Speculation with the model's own sparse reads (TriForce, arXiv 2404.11912; MagicDec, 2408.11049;
speculative decoding, 2211.17192), beneath `generate`. That asks for the logits behind one token at
a time. Behind it some are drafted: steps that read what the plan says of a cache that holds all.
Then one call reads the token and its drafts densely, and overwrites the drafts' keys. The cache
goes back to the token that was asked for, and what was found behind the others is kept: where
`generate` goes on with what was drafted, it gets that, and the cache has back a token more.

So it sees the dense model's logits and cache, and chooses from them as ever: by its processors, in
a batch (as long as all rows go on as drafted), until its criteria say so. Drafts are drawn with the
random numbers that it will draw with: `torch.multinomial` takes the token whose probability is the
largest multiple of its noise, so that alike distributions mostly give the same token (Gumbel
coupling, arXiv 2408.07978). Nothing is rejected and drawn anew: a seed gives the tokens that it
gives the dense model, up to ties of rounding, since a call of several tokens rounds otherwise than
as many steps do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.cache_utils import Cache
from transformers.generation import logits_process

from hfsparse.models.names import find_cache
from hfsparse.patcher.choosing import Choosing, is_plain_step, later_call
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.call import drafting
from hfsparse.runtime.decode import chooses
from hfsparse.runtime.graphs import Graphs
from hfsparse.stats import Drafts

# Tokens that are drafted at first and at most, and those that go by without any after a single one
# was wrong: a draft costs what a model's weights do, however few keys it reads.
FIRST, MOST, PAUSE = 3, 7, 8
# Processors of transformers' own that keep something of each call, or call a user's function.
STATEFUL = (
    *("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"),
    "PrefixConstrainedLogitsProcessor",
)


class Exact:
    """What exact mode keeps beside a patch."""

    def __init__(self, graphs: Graphs):
        self.graphs = graphs  # of drafting steps
        self.drafts = Drafts()
        self.serving: WeakKeyDictionary[CacheLayer, Drafter] = WeakKeyDictionary()

    def __reduce__(self):
        return Exact, (self.graphs,)


class Drafter(LogitsProcessor):
    """Drafts for one `generate`, whose tokens it sees as a logits processor that changes none."""

    def __init__(self, drafts: Drafts, config: Any, processors: Sequence[LogitsProcessor]):
        self.drafts = drafts
        self.choosing = Choosing(config, [each for each in processors if _repeats(each)])
        self.ids: Tensor | None = None  # [B, n] tokens so far, where logits were asked for last
        self.length = FIRST  # tokens that are drafted next,
        self.pause = 0  # after so many others
        self.verified: _Verified | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids = input_ids
        return scores

    def answer(self, forward: Callable, given: dict[str, Any], layers: list[CacheLayer]) -> Any:
        """`forward(**given)` of a model that goes on with a cache of these layers."""
        ids, self.ids = self.ids, None
        verified, self.verified = self.verified, None
        tokens = given.get("input_ids")
        if ids is None or not is_plain_step(given, layers, ids):
            return forward(**given)
        ids = torch.cat([ids, tokens.to(ids.device)], 1)
        if verified is not None:
            if verified.goes_on(tokens, layers):
                for layer in layers:
                    layer.give_back()
                self.drafts.accepted += 1
                return self._next(verified, find_cache(given), layers)
            self.length = verified.next_length
            if not self.length:
                self.length, self.pause = 1, PAUSE
        count = min(self.length, self.choosing.left(ids))
        rows, self.pause = layers[0].rows, self.pause - 1
        sparse = any(chooses(store, rows) for layer in layers for store in layer.stores)
        if self.pause >= 0 or count < 1 or not sparse:
            return forward(**given)
        drafted = self._draft(forward, given, layers, ids, count)
        tokens = torch.cat([tokens, drafted.to(tokens.device)], 1)
        output = forward(**later_call(given, tokens, 0))
        for layer in layers:
            layer.take_back(count)
        self.drafts.steps += 1
        self.drafts.drafted += count
        return self._next(_Verified(output, tokens), find_cache(given), layers)

    def _next(self, verified: _Verified, cache: Cache, layers: list[CacheLayer]) -> Any:
        """The output behind the next of the tokens that were verified."""
        verified.rows, self.verified = layers[0].rows, verified
        return verified.output(cache)

    def _draft(
        self,
        forward: Callable,
        given: dict[str, Any],
        layers: list[CacheLayer],
        ids: Tensor,
        count: int,
    ) -> Tensor:
        """[B, count] tokens that the plan has follow; the cache stays as it is."""
        seen, tokens, first = layers[0].seen, given["input_ids"], ids.shape[1]
        try:
            with drafting(), self.choosing.same_numbers(ids.device):
                for at in range(count):
                    logits = forward(**later_call(given, tokens, at)).logits
                    chosen = self.choosing.choose(ids, logits)
                    ids = torch.cat([ids, chosen], 1)
                    tokens = chosen.to(tokens.device)
        finally:
            for layer in layers:
                layer.take_back(layer.seen - seen)
        return ids[:, first:]


class _Verified:
    """What a verifying call found behind a token and its drafts, and how far `generate` went."""

    def __init__(self, output: Any, tokens: Tensor):
        # Without the cache, which would live as long as what is kept for it.
        self.kind, fields = type(output), output.items()
        self.fields = {name: x for name, x in fields if not isinstance(x, Cache)}
        self.cache_name = next(name for name, x in fields if isinstance(x, Cache))
        self.logits = output.logits[:, -tokens.shape[1] :]
        self.tokens, self.at = tokens, -1
        self.rows: list[int] = []  # the cache's, who renews the list whenever it changes

    def output(self, cache: Cache) -> Any:
        """The model's output behind the next token."""
        self.at += 1
        logits = self.logits[:, self.at : self.at + 1]
        return self.kind(**{**self.fields, "logits": logits, self.cache_name: cache})

    def goes_on(self, tokens: Tensor, layers: list[CacheLayer]) -> bool:
        """Whether tokens [B, 1] are what was drafted, behind a cache that nobody has changed."""
        drafted = self.tokens[:, self.at + 1 : self.at + 2]
        return layers[0].rows is self.rows and drafted.shape[1] > 0 and torch.equal(tokens, drafted)

    @property
    def next_length(self) -> int:
        """How many tokens to draft next: more where all were right, fewer where most were wrong.

        One less than powers of two: few lengths of steps are to be recorded.
        """
        count = self.tokens.shape[1] - 1
        if self.at == count:
            return min(2 * count + 1, MOST)
        return count // 2 if 2 * self.at < count else count


def _repeats(processor: LogitsProcessor) -> bool:
    """Whether a processor says the same of the same tokens, however often it is asked."""
    kind = type(processor)
    return kind.__module__ == logits_process.__name__ and kind.__name__ not in STATEFUL
