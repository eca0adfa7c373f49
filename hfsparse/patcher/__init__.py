"""Make a model follow a plan, and give it back exactly as it was.

    with hfsparse.patch(model, "plan.yaml") as handle:
        model.generate(**inputs)
        print(handle.stats())

Nothing in transformers is replaced: one attention and one mask function are registered under a
name of ours, the model is switched to it, and a hook on the text decoder puts our layers into the
cache. All state lies on the model, so `unpatch(model)` needs no handle.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Collection
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hfsparse.errors import PatchError
from hfsparse.models.fingerprint import windows
from hfsparse.patcher.explain import explain
from hfsparse.patcher.generation import SHADOWS
from hfsparse.patcher.handle import Patched
from hfsparse.patcher.hooks import _after_forward, _before_attention, _before_forward, _forward
from hfsparse.patcher.resolve import _below, _layer_plans
from hfsparse.patcher.state import OwnConfig, State, is_patched
from hfsparse.patcher.supported import _attention_modules, _check_model
from hfsparse.patcher.undo import _restore, unpatch
from hfsparse.plan import ModelId, Plan
from hfsparse.runtime.attend import attention
from hfsparse.runtime.graphs import Graphs
from hfsparse.runtime.masks import NAME, mask_start

__all__ = ["explain", "patch", "unpatch"]

# Not in `patch`: a pickled model that was patched may be loaded where none has been.
AttentionInterface.register(NAME, attention)


AttentionMaskInterface.register(NAME, mask_start)


def patch(
    model: PreTrainedModel,
    plan: Plan | str | os.PathLike | None = None,
    allow: Collection[str] = (),
    fuse: bool = False,
) -> Patched:
    """Make `model` follow `plan` (a Plan or its file) until `undo()`; None drops nothing.

    On a GPU, decode steps are replayed as CUDA graphs. With fuse=True torch.compile fuses their
    small kernels: faster, after half a minute of compiling at the first steps of a batch size.
    allow={"fingerprint"} takes a plan made for another configuration of the same shape. Raises
    PlanError or PatchError before anything changes. Warns of a plan whose proof told nothing.
    """
    _check_model(model)
    if is_patched(model):
        raise PatchError(
            f"this {type(model).__name__} is patched already: call handle.undo() or "
            "hfsparse.unpatch(model) first"
        )
    modules = _attention_modules(model)
    if plan is None:
        plan = Plan.full(ModelId.of(model))
    else:  # the caller may go on with theirs
        plan = copy.deepcopy(plan) if isinstance(plan, Plan) else Plan.load(plan)
    plan.validate()
    plan.check(model, allow)
    if plan.unproved:
        warnings.warn(
            f"plan {plan.hash()[:19]} was verified by nothing ({plan.unproved}): it may lose "
            "answers. Compare it with dense on your own questions, by hfsparse eval custom",
            stacklevel=2,
        )
    below = _below(plan, model.device)
    layers = _layer_plans(plan, [m.layer_idx for m in modules], windows(model), below)
    decoder = model.get_decoder()

    graphs = Graphs(layers, linear=len(layers) < plan.model.layers, fuse=fuse)
    state = State(layers[0].owner, model, plan, layers, _own_configs(model), graphs)
    try:
        for own in state.configs:
            for module in own.modules:
                module.config = own.copy
        decoder.config._attn_implementation_internal = NAME
        decoder._hfsparse = state
        for module, layer in zip(modules, layers, strict=True):
            module._hfsparse = layer
        state.hooks.append(decoder.register_forward_pre_hook(_before_forward, with_kwargs=True))
        state.hooks.append(
            decoder.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)
        )
        adopt = _partial(_before_attention, decoder, like=_before_attention)
        state.hooks.append(modules[0].register_forward_pre_hook(adopt, with_kwargs=True))
        if "forward" in decoder.__dict__:
            graphs.never = "its decoder's forward is not its class's (accelerate's hooks?)"
        else:
            decoder.forward = _partial(_forward, decoder, like=decoder.forward)
        for name, function in SHADOWS.items():
            if hasattr(type(model), name):
                setattr(model, name, _partial(function, model, like=getattr(model, name)))
        wrong = [m.layer_idx for m in modules if m.config._attn_implementation != NAME]
        if wrong:
            raise PatchError(f"layers {wrong} of {type(model).__name__} kept their own attention")
    except BaseException:
        _restore(model, state)
        raise
    return Patched(model, state)


def _partial(function: Callable, owner: Any, like: Callable) -> functools.partial:
    """A method for one object, with another's signature: unlike a bound one, it can be pickled."""
    made = functools.partial(function, owner)
    return functools.update_wrapper(made, like, assigned=("__module__",), updated=())


def _own_configs(model: PreTrainedModel) -> list[OwnConfig]:
    """A copy of each config that the model and its submodels have, still parts of one another."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    copies = {key: copy.copy(config) for key, config in configs.items()}
    for own in copies.values():
        for name, part in vars(own).items():
            vars(own)[name] = copies.get(id(part), part)
    made = []
    for key, config in configs.items():
        modules = [m for m in model.modules() if getattr(m, "config", None) is config]
        made.append(OwnConfig(config, copies[key], modules, dict(vars(copies[key]))))
    return made
