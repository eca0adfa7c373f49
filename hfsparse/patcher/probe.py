"""What a model's code asks of attention, learnt before the model is touched.

A config does not tell whether its window is used, a mask built or a cache read twice; the code
does, so it is run: a second decoder of the same class and config reads two tokens under
FakeTensorMode, which keeps shapes and no data. Two tokens through the model itself would cost a
pass over all its weights, offloaded ones too, and leave traces in hooks, counters and random
states; the second decoder takes no memory and half a second for 8B parameters, once a config. Code
that can't run without data tells nothing: then each call looks for itself, as it does anyway.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers import logging as transformers_logging

from hfsparse.errors import CacheError, Error
from hfsparse.models.names import cache_name
from hfsparse.runtime.call import enter, leave, running
from hfsparse.runtime.layer_plan import LayerPlan, layer_plan_of, put_layer_plan
from hfsparse.runtime.masks import is_start

NAME = "hfsparse-probe"
found: dict[tuple[type, str], str | None] = {}  # what `why_not` answers, by class and config
lock = threading.Lock()  # one probe at a time: it sets what the whole process shares


class Unlike(Error):
    """Code that asks for another attention than ours."""


def attention_modules(decoder: Any) -> dict[nn.Module, int]:
    """A text decoder's attention modules and the layer of each, in layer order; -1: of no layer."""
    found = {
        module: _layer_of(name, module)
        for name, module in decoder.named_modules()
        if all(hasattr(module, each) for each in ("layer_idx", "is_causal", "config"))
    }
    return dict(sorted(found.items(), key=lambda each: each[1]))


def _layer_of(name: str, module: nn.Module) -> int:
    """The layer that a module numbers itself, else the one that it is part of (`layers.5.…`):
    Zamba's modules are told their layer at each call."""
    own, parts = module.layer_idx, name.split(".")
    if own is not None and own >= 0:
        return own
    return next((int(part) for part in parts if part.isdigit()), -1)


def why_not(decoder: Any, plans: Sequence[LayerPlan]) -> str | None:
    """Why each call of this text decoder would be refused; None where no reason was found.

    plans: of its layers with attention, with every head full. The decoder itself is only read.
    """
    key = type(decoder), repr(decoder.config.to_dict())
    with lock:
        if key not in found:
            found[key] = _learn(decoder, plans)
    return found[key]


def _learn(decoder: Any, plans: Sequence[LayerPlan]) -> str | None:
    try:
        with _without_data():
            _run(type(decoder), copy.deepcopy(decoder.config), plans)
    except Unlike as reason:
        return str(reason)
    except CacheError:
        return "it doesn't call attention once for each update of its cache"
    except Exception:  # code that wants data, or more than tokens
        return None
    return None


def _run(decoder: type, config: Any, plans: Sequence[LayerPlan]) -> None:
    """Two tokens through a new decoder; raises Unlike or CacheError for what we can't follow."""
    AttentionInterface.register(NAME, partial(look, {}))
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # nothing is padded
    config._attn_implementation_internal = "eager"
    twin = decoder(config).eval()
    for module, layer_plan in zip(attention_modules(twin), plans, strict=True):
        put_layer_plan(module, layer_plan)
        module.config._attn_implementation_internal = NAME
    cache = DynamicCache(config=config)
    layers = cache.layers or [None] * config.num_hidden_layers
    keeping = [layer_plan for layer_plan in plans if layer_plan.producer is None]
    for layer_plan in keeping:
        layers[layer_plan.index] = layer_plan.new_cache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    enter(plans[0].owner)
    try:
        with DummyValues():
            twin(torch.zeros(1, 2, dtype=torch.long), use_cache=True, **{cache_name(twin): cache})
    finally:
        leave(plans[0].owner)
    if any(layers[each.index].stored < layers[each.index].seen for each in keeping):
        raise CacheError("a layer's attention was not called")


def look(
    made: dict[int, tuple[Tensor, Tensor]],
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Stands for attention: raises Unlike where query and key are not what the config says.

    made: each layer's keys and values, for those that read another's.
    """
    layer_plan = layer_plan_of(module)
    if attention_mask is not None and not is_start(attention_mask):
        raise Unlike(f"it builds attention masks of its own, of {attention_mask.ndim} dimensions")
    says = layer_plan.counts.q_heads, layer_plan.key_heads
    if (query.shape[1], key.shape[1]) != says:
        raise Unlike(
            f"layer {layer_plan.index} attends with {query.shape[1]} q and {key.shape[1]} kv "
            f"heads, where its config says {says[0]} and {says[1]}"
        )
    if sliding_window != layer_plan.sliding_window:
        words = [
            "all tokens" if n is None else f"a window of {n}"
            for n in (sliding_window, layer_plan.sliding_window)
        ]
        raise Unlike(
            f"layer {layer_plan.index} attends to {words[0]}, where its config says {words[1]}"
        )
    if layer_plan.producer is not None:
        producer = layer_plan.producer.index
        theirs = made.get(producer, (None, None))
        if key is not theirs[0] or value is not theirs[1]:
            raise Unlike(
                f"layer {layer_plan.index} doesn't read the keys of layer {producer}, which its "
                "config says"
            )
    elif (layer := running().take_layer()) is not None:
        if layer.index != layer_plan.index:
            raise Unlike(
                f"the attention of layer {layer_plan.index} keeps its keys in layer {layer.index} "
                "of the cache"
            )
        layer.stored = layer.seen
    made[layer_plan.index] = key, value
    return query.new_empty(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous(), None


@contextmanager
def _without_data() -> Iterator[None]:
    """Tensors have shapes only, random states stay, and nobody is told of what fails."""
    log, said = logging.getLogger(FakeTensorMode.__module__), transformers_logging.get_verbosity()
    was, log.disabled = log.disabled, True
    transformers_logging.set_verbosity_error()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.no_grad(),
            FakeTensorMode(),
            torch.device("cpu"),
        ):
            yield
    finally:
        log.disabled = was
        transformers_logging.set_verbosity(said)


class DummyValues(TorchDispatchMode):
    """Stand for what only data could tell: numbers are 0, nothing is true, no expert is chosen."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        if func is torch.ops.aten._grouped_mm.default:  # knows no float32 without data
            return args[0].new_empty((len(args[0]), args[1].shape[-1]))
        return func(*args, **(kwargs or {}))
