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
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode, logits_process

from hfsparse.models.names import find_cache, text_decoder
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.call import drafting
from hfsparse.runtime.decode import chooses, is_step
from hfsparse.runtime.graphs import Graphs
from hfsparse.stats import Drafts

# Tokens that are drafted at first and at most, and those that go by without any after a single one
# was wrong: a draft costs what a model's weights do, however few keys it reads.
FIRST, MOST, PAUSE = 3, 7, 8
ALONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Processors of transformers' own that keep something of each call, or call a user's function.
STATEFUL = (
    *("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"),
    "PrefixConstrainedLogitsProcessor",
)
TYPES = ("token_type_ids", "mm_token_type_ids")  # a new token's are the last one's


class Exact:
    """What exact mode keeps beside a patch."""

    def __init__(self, graphs: Graphs):
        self.graphs = graphs  # of drafting steps
        self.forward: Callable | None = None  # the model's, where it was not its class's
        self.drafts = Drafts()
        self.drafters: WeakKeyDictionary[CacheLayer, Drafter] = WeakKeyDictionary()

    def __reduce__(self):
        return Exact, (self.graphs,), {"forward": self.forward}


class Drafter(LogitsProcessor):
    """Drafts for one `generate`, whose tokens it sees as a logits processor that changes none."""

    def __init__(self, drafts: Drafts, config: Any, processors: Sequence[LogitsProcessor]):
        self.drafts, self.samples, self.most = drafts, config.do_sample, config.max_length
        self.processors = [each for each in processors if _repeats(each)]
        ends = (getattr(config, f"_{name}_token_tensor", None) for name in ("eos", "pad"))
        self.eos, self.pad = ends
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
        if ids is None or not _is_plain_step(given, layers, ids):
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
        count = min(self.length, self.most - ids.shape[1] - 1)
        rows, self.pause = layers[0].rows, self.pause - 1
        sparse = any(chooses(store, rows) for layer in layers for store in layer.stores)
        if self.pause >= 0 or count < 1 or not sparse:
            return forward(**given)
        drafted = self._draft(forward, given, layers, ids, count)
        tokens = torch.cat([tokens, drafted.to(tokens.device)], 1)
        output = forward(**_ahead(given, tokens, 0))
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
            with drafting(), _same_numbers(ids.device, self.samples):
                for at in range(count):
                    logits = forward(**_ahead(given, tokens, at)).logits[:, -1]
                    chosen = self._choose(ids, logits.to(ids.device, torch.float32, copy=True))
                    ids = torch.cat([ids, chosen], 1)
                    tokens = chosen.to(tokens.device)
        finally:
            for layer in layers:
                layer.take_back(layer.seen - seen)
        return ids[:, first:]

    def _choose(self, ids: Tensor, scores: Tensor) -> Tensor:
        """[B, 1] tokens behind ids [B, n], as `generate` chooses them."""
        for processor in self.processors:
            scores = processor(ids, scores)
        if self.samples:  # as torch.multinomial, which would also have the host wait for its checks
            noise = torch.empty_like(scores).exponential_()
            scores = torch.softmax(scores, -1) / noise
        chosen = scores.argmax(-1, keepdim=True)
        if len(ids) > 1 and self.eos is not None and self.pad is not None:  # rows that have ended
            eos, fill = self.eos.to(ids.device), self.pad.to(ids.device)
            ended = torch.isin(ids[:, -1:], eos) | (ids[:, -1:] == fill)
            chosen = torch.where(ended, fill, chosen)
        return chosen


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


def _is_plain_step(given: dict[str, Any], layers: list[CacheLayer], ids: Tensor) -> bool:
    """Whether a call reads one more token of each row, and asks for nothing but logits."""
    tokens, first = given.get("input_ids"), layers[0]
    if not isinstance(tokens, Tensor) or tokens.shape != (len(ids), 1):
        return False
    known = {"input_ids", "attention_mask", "position_ids", "cache_position", *TYPES}
    more = any(isinstance(x, Tensor) and name not in known for name, x in given.items())
    asked = any(given.get(name) for name in ("output_hidden_states", "output_attentions"))
    asked = asked or given.get("return_dict") is False or given.get("output_router_logits")
    return not more and not asked and is_step(first, 1, first.seen + 1)


def _ahead(given: dict[str, Any], tokens: Tensor, at: int) -> dict[str, Any]:
    """A step's call for tokens `[B, Q]`, the first of them `at` columns behind the step's own."""
    Q, made = tokens.shape[1], {**given, "input_ids": tokens}
    if isinstance(mask := given.get("attention_mask"), Tensor):
        made["attention_mask"] = pad(mask, (0, at + Q - 1), value=1)
    for name in ("position_ids", "cache_position"):
        if (position := given.get(name)) is not None:
            made[name] = position + torch.arange(at, at + Q, device=position.device)
    for name in TYPES:
        if (kind := given.get(name)) is not None:
            made[name] = kind.expand(-1, Q)
    if given.get("logits_to_keep") is not None:
        made["logits_to_keep"] = Q
    return made


def _same_numbers(device: torch.device, draws: bool) -> AbstractContextManager:
    """Random numbers that are drawn inside are drawn again behind it."""
    if device.type == "cpu":
        return torch.random.fork_rng([], enabled=draws)
    return torch.random.fork_rng([device], enabled=draws, device_type=device.type)


def _layers(cache: Any) -> list[CacheLayer]:
    return [x for x in getattr(cache, "layers", ()) if isinstance(x, CacheLayer)]


def forward(model: PreTrainedModel, *args, **kwargs) -> Any:
    """The forward of a model in exact mode: the model's own, or what a drafter answers."""
    exact: Exact | None = text_decoder(model)._hfsparse.exact
    own = exact.forward or type(model).forward.__get__(model)
    layers = [] if args or torch.compiler.is_dynamo_compiling() else _layers(find_cache(kwargs))
    drafter = exact.drafters.get(layers[0]) if layers else None
    return own(*args, **kwargs) if drafter is None else drafter.answer(own, kwargs, layers)


def wants_cache(model: PreTrainedModel, generation_config: Any) -> bool:
    """Whether drafts need the cache of a `generate` that is about to begin."""
    exact: Exact | None = text_decoder(model)._hfsparse.exact
    return exact is not None and generation_config.use_cache is not False


def leave_alone(model: PreTrainedModel, cache: Any) -> None:
    """Draft no more for the `generate` that goes on with a cache: it has drafts of its own."""
    exact: Exact | None = text_decoder(model)._hfsparse.exact
    for layer in () if exact is None else _layers(cache)[:1]:
        exact.drafters.pop(layer, None)


def watch(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
    """`_get_logits_processor`, and a drafter before the others where `generate` goes on alone."""
    original = type(self)._get_logits_processor
    processors = original(self, generation_config, *args, **kwargs)
    exact: Exact | None = text_decoder(self)._hfsparse.exact
    layers = _layers(find_cache(kwargs.get("model_kwargs") or {}))
    if exact is None or not layers:
        return processors
    exact.drafters.pop(layers[0], None)
    mode = generation_config.get_generation_mode()
    if mode not in ALONE or generation_config.is_assistant:
        return processors
    drafter = Drafter(exact.drafts, generation_config, processors)
    exact.drafters[layers[0]] = drafter
    return LogitsProcessorList([drafter, *processors])
