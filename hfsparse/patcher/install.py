"""What a patch sets on a model, and how all of it is taken away again.

Nothing in transformers is replaced: one attention and one mask function are registered under a
name of ours, the model is switched to it, and hooks on the text decoder put our layers into the
cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hfsparse.errors import PatchError
from hfsparse.models.names import text_decoder
from hfsparse.patcher import answering, batching
from hfsparse.patcher.generation import SHADOWS
from hfsparse.patcher.hooks import (
    after_forward,
    before_attention,
    before_forward,
    forward,
    refuse_replica,
)
from hfsparse.patcher.state import State, state_of
from hfsparse.runtime.attend import attend
from hfsparse.runtime.call import leave
from hfsparse.runtime.layer_plan import drop_layer_plan, layer_plan_of, put_layer_plan
from hfsparse.runtime.masks import NAME, mask_start

# Not in `install`: a pickled model that was patched may be loaded where none has been.
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask_start)


def install(model: PreTrainedModel, modules: list[Any], state: State) -> None:
    """Make `model`, whose attention modules are `modules`, follow `state`; all of it or nothing."""
    try:
        _install(model, modules, state)
    except BaseException:
        restore(model, state)
        raise


def _install(model: PreTrainedModel, modules: list[Any], state: State) -> None:
    decoder = text_decoder(model)
    for own in state.configs:
        for module in own.modules:
            module.config = own.copy
    decoder.config._attn_implementation_internal = NAME
    decoder._hfsparse = state
    for module, layer in zip(modules, state.layers, strict=True):
        put_layer_plan(module, layer)
    adopt = _bind(before_attention, decoder, like=before_attention)
    keep = state.hooks.append
    keep(decoder.register_forward_pre_hook(before_forward, with_kwargs=True))
    keep(decoder.register_forward_hook(after_forward, with_kwargs=True, always_call=True))
    keep(modules[0].register_forward_pre_hook(adopt, with_kwargs=True))
    if "forward" in decoder.__dict__:
        state.graphs.never = "its decoder's forward is not its class's (accelerate's hooks?)"
    else:
        decoder.forward = _bind(forward, decoder, like=decoder.forward)
    for name, function in SHADOWS.items():
        if hasattr(type(model), name) and name not in vars(model):
            setattr(model, name, _bind(function, model, like=getattr(model, name)))
    if model is not decoder:
        state.forward = model.__dict__.get("forward")  # accelerate's, where it has hooks
        model.forward = _bind(answering.forward, model, decoder, like=model.forward)
        keep(model.register_forward_pre_hook(refuse_replica))
    wrong = [layer_plan_of(m).index for m in modules if m.config._attn_implementation != NAME]
    if wrong:
        raise PatchError(f"layers {wrong} of {type(model).__name__} kept their own attention")


def _bind(function: Callable, *owners: Any, like: Callable) -> functools.partial:
    """A method for one object, or of one and a part of it, with another's signature: unlike a
    bound one, it can be pickled."""
    method = functools.partial(function, *owners)
    return functools.update_wrapper(method, like, assigned=("__module__",), updated=())


def unpatch(model: PreTrainedModel) -> None:
    """Give a patched model back as it was: names, hooks and functions."""
    state = state_of(model)
    if state.model is not model:
        raise PatchError(
            f"this {type(model).__name__} is part of a patched model: give hfsparse.unpatch the "
            "model that was patched, or call handle.undo()"
        )
    restore(model, state)


def restore(model: PreTrainedModel, state: State) -> None:
    """Take off `model` what `install` set, however far that came."""
    while leave(state.owner):
        pass  # interrupted forwards may have left this thread inside
    batching.stop_all(state)
    for graphs in state.all_graphs:
        graphs.kept.clear()
    for hook in state.hooks:
        hook.remove()
    for own in state.configs:
        own.give_back()
    decoder = text_decoder(model)
    if getattr(decoder.forward, "func", None) is forward:
        del decoder.forward
    if getattr(model.__dict__.get("forward"), "func", None) is answering.forward:
        del model.forward
        if state.forward is not None:
            model.forward = state.forward
    vars(decoder).pop("_hfsparse", None)
    for module in model.modules():
        drop_layer_plan(module)
    for name, function in SHADOWS.items():
        if getattr(model.__dict__.get(name), "func", None) is function:
            delattr(model, name)
    for name in ("_compiled_call", "_cache"):
        model.__dict__.pop(name, None)
