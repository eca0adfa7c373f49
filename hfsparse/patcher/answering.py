"""Who answers the calls that a `generate` makes of a patched model: the model itself, a drafter of
exact mode, or a runner whose step is under way; and which rows have ended."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from hfsparse.models.names import find_cache, rename_cache, text_decoder
from hfsparse.patcher.ahead import Runner
from hfsparse.patcher.choosing import ALONE, cache_layers
from hfsparse.patcher.ended import Ended, is_plain, is_watched, shows_nothing
from hfsparse.patcher.exact import Drafter
from hfsparse.runtime.graphs.obstacles import has_hook


class _Running(NamedTuple):
    """A `generate` of a patched model."""

    plain: bool  # as `is_plain`
    runners: list[Runner]


# The one that runs in this thread; None: none does.
_running: ContextVar[_Running | None] = ContextVar("hfsparse_generate", default=None)


def forward(model: PreTrainedModel, decoder: PreTrainedModel, *args, **kwargs) -> Any:
    """The forward of a patched model: its own, or what a drafter or a runner answers."""
    state = decoder.__dict__.get("_hfsparse")
    own = getattr(state, "forward", None) or partial(type(model).forward, model)
    if state is None or torch.compiler.is_dynamo_compiling():
        return own(*args, **kwargs)
    kwargs = rename_cache(model, kwargs)
    layers = [] if args else cache_layers(find_cache(kwargs))
    serving = (state.exact or state.ahead).serving.get(layers[0]) if layers else None
    return own(*args, **kwargs) if serving is None else serving.answer(own, kwargs, layers)


def generate(self, *args, **kwargs) -> Any:
    """`generate`, behind which no step is under way."""
    before = _running.set(_Running(is_plain(args, kwargs), []))
    try:
        return type(self).generate(self, *args, **kwargs)
    finally:
        for runner in _running.get().runners:
            runner.end()
        _running.reset(before)


def wants_cache(model: PreTrainedModel, generation_config: Any) -> bool:
    """Whether who answers needs a cache for a `generate` that has made none, and any would do."""
    return generation_config.use_cache is not False and model._supports_default_dynamic_cache()


def leave_alone(model: PreTrainedModel, cache: Any) -> None:
    """Answer no more for the `generate` that goes on with a cache: it has drafts of its own."""
    state = text_decoder(model)._hfsparse
    for layer in cache_layers(cache)[:1]:
        (state.exact or state.ahead).serving.pop(layer, None)


def watch(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
    """`_get_logits_processor`, and before the others who answers where `generate` goes on alone."""
    original = type(self)._get_logits_processor
    processors = original(self, generation_config, *args, **kwargs)
    state = text_decoder(self)._hfsparse
    exact, ahead = state.exact, state.ahead
    layers = cache_layers(find_cache(kwargs.get("model_kwargs") or {}))
    ahead.why = _why_not_ahead(self, generation_config, layers)
    if not layers:
        return processors
    (exact or ahead).serving.pop(layers[0], None)
    mode = generation_config.get_generation_mode()
    if mode not in ALONE or generation_config.is_assistant:
        return processors
    if exact is not None:
        serving = exact.serving[layers[0]] = Drafter(exact.drafts, generation_config, processors)
        return LogitsProcessorList([serving, *processors])
    running, first = _running.get(), []
    plain = running is not None and running.plain and shows_nothing(generation_config)
    if plain and not is_watched(self):
        first.append(Ended(layers, generation_config._eos_token_tensor))
    if ahead.never is None and ahead.why is None:
        first.append(Runner(ahead, layers[0], generation_config, processors))
        running.runners.append(first[-1])
    return LogitsProcessorList([*first, *processors])


def _why_not_ahead(model: PreTrainedModel, generation_config: Any, layers: list) -> str | None:
    """Why no step of a `generate` that is about to begin runs ahead."""
    if _running.get() is None:
        return "generate is not the model's own"
    if not layers:
        return "generate makes no cache"
    mode = generation_config.get_generation_mode()
    if mode not in ALONE or generation_config.is_assistant:
        return f"generate goes on by {'drafts' if generation_config.is_assistant else mode.value}"
    inside = {*text_decoder(model).modules()}
    for name, module in model.named_modules():
        if name and module not in inside and has_hook(module):
            return f"a hook on {name}"
    return None
