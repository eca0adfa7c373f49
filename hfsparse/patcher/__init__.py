"""Make a model follow a plan, and give it back exactly as it was.

    with hfsparse.patch(model, "plan.yaml") as handle:
        model.generate(**inputs)
        print(handle.stats())

`supported` (with `probe`) says which models can be patched, `resolve` what each layer needs of a
plan. `install` sets and takes away what a patch is: `hooks` around forwards, which `adopt` caches,
and `generation` in `generate`, whose calls are answered (`answering`) by steps that ran `ahead` or
by drafts (`exact`), both `choosing` as it does. All `state` lies on the model, so `unpatch(model)`
needs no handle.
`explain`, `figures` and `memory` tell what a plan does, holds and needs; `saved` keeps caches in
folders.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection
from functools import partial

import torch
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from hfsparse.errors import PatchError
from hfsparse.models.layers import layer_shapes
from hfsparse.models.sharding import check_same, group_of, least, shard_of, together
from hfsparse.patcher.ahead import Ahead
from hfsparse.patcher.context import NO_GRAPH, why_not
from hfsparse.patcher.exact import Exact
from hfsparse.patcher.explain import explain
from hfsparse.patcher.extend import check_turns, find_extensions
from hfsparse.patcher.handle import Patched
from hfsparse.patcher.install import install, unpatch
from hfsparse.patcher.resolve import (
    resolve_below,
    resolve_exact,
    resolve_layers,
    why_not_exact,
)
from hfsparse.patcher.state import State, copy_configs, is_patched
from hfsparse.patcher.supported import attention_modules, check_host, check_model
from hfsparse.plan import ModelId, Plan
from hfsparse.plan.sources import open_plan
from hfsparse.runtime.extend import Extension
from hfsparse.runtime.graphs import Graphs
from hfsparse.runtime.layer_plan import LayerPlan
from hfsparse.runtime.parts import ContextParallel

__all__ = ["explain", "patch", "unpatch"]


def patch(
    model: PreTrainedModel,
    plan: Plan | str | os.PathLike | None = None,
    allow: Collection[str] = (),
    fuse: bool = False,
    exact: bool = False,
    context_parallel: ContextParallel | ProcessGroup | None = None,
) -> Patched:
    """Make `model` follow `plan` until `undo()`; None drops nothing.

    plan: a Plan, its file, the name of one that is shipped (`duo:llama-3.1-8b-instruct`; `hfsparse
    plans` lists them), or an address on the Hugging Face hub, `hf://ORG/REPO/plan.yaml`, with
    `@REVISION` behind REPO, and `#sha256:…` behind all, to have no other than the one of this hash.
    On a GPU, decode steps are replayed as CUDA graphs. With fuse=True torch.compile fuses their
    small kernels: faster, after some 13 s of compiling at the first steps of a batch size.
    allow={"fingerprint"} takes a plan made for another configuration of the same shape.
    With exact=True the plan only drafts tokens, from a cache that keeps everything, and steps of
    the whole model verify them: `generate` gives the dense model's tokens (`patcher.exact`).
    context_parallel: a process group (or a ContextParallel of one) whose ranks share the tokens of
    each prompt and keep the keys of their own; every rank patches its model and makes the same
    calls (`patcher.context`). Raises an Error (PlanError, PatchError, UsageError) before anything
    changes. Warns of a plan that nothing verified.
    """
    check_model(model)
    context = ContextParallel.of(context_parallel)
    group = group_of(model) if context is None else context.group
    work = partial(_prepare, model, plan, allow, fuse, exact, context)
    modules, state, extensions = together(group, work)
    settings = ", fused" * fuse + (f", {context.settings}" if context else "")
    check_same(group, state.plan.hash()[:19] + settings)
    install(model, modules, state)
    handle = Patched(model, state)
    if extensions:
        try:
            together(group, partial(check_turns, model, extensions))
        except BaseException:
            handle.undo()
            raise
        handle.reset_stats()  # that token was nobody's
    return handle


def _prepare(
    model: PreTrainedModel,
    plan: Plan | str | os.PathLike | None,
    allow: Collection[str],
    fuse: bool,
    exact: bool,
    context: ContextParallel | None,
) -> tuple[list[torch.nn.Module], State, dict[int, Extension]]:
    """Modules that follow a plan, what a patch leaves on the model, and how rows are extended."""
    if is_patched(model):
        raise PatchError(
            f"this {type(model).__name__} is patched already: call handle.undo() or "
            "hfsparse.unpatch(model) first"
        )
    if plan is not None and not isinstance(plan, (Plan, str, os.PathLike)):
        raise PatchError(f"the plan is a {type(plan).__name__}: give a Plan, its file, or None")
    for name, value in (("fuse", fuse), ("exact", exact)):
        if type(value) is not bool:
            raise PatchError(f"{name} is {value!r}: give True or False")
    modules = attention_modules(model)
    if plan is None:
        plan = Plan.full(ModelId.of(model))
    else:  # the caller may go on with theirs
        plan = copy.deepcopy(plan) if isinstance(plan, Plan) else open_plan(plan)
    plan.validate()
    plan.check(model, allow)
    if plan.unproved and not exact:
        warnings.warn(
            f"plan {plan.hash()[:19]} was verified by nothing ({plan.unproved}): it may lose "
            "answers. Compare it with dense on your own questions, by hfsparse eval custom",
            stacklevel=4,
        )
    below = resolve_below(plan, model.device)
    shapes = layer_shapes(model)
    extensions, drafts = find_extensions(model, plan, shapes), None
    shard = shard_of(model, modules, shapes)
    linear, agree = any(shape.has_state for shape in shapes), least(group_of(model))
    if context is not None and (exact or fuse):
        raise PatchError(
            f"{'exact' if exact else 'fuse'}=True can't be followed where ranks share a prompt's "
            "tokens (context_parallel): leave one of both out"
        )
    if exact:
        layers = resolve_exact(plan, shapes, below)
        if why := why_not_exact(model, plan, shapes, layers, shard):
            raise PatchError(
                f"exact=True can't be followed: {why}. Leave exact out, or give another plan"
            )
        drafts = Exact(Graphs([layer.draft for layer in layers], fuse=fuse))
    else:
        layers = resolve_layers(plan, shapes, below, extensions, shard, context)
    if context is not None and (why := why_not(model, plan, shapes, layers)):
        raise PatchError(
            f"context_parallel can't be followed: {why}. Leave context_parallel out, or give "
            "another plan or model"
        )
    check_host(modules, layers)
    graphs = Graphs(layers, linear, fuse, agree)
    if context is not None:
        graphs.never = graphs.why = NO_GRAPH
    ahead = Ahead(graphs, _why_not_ahead(model, layers, exact))
    of = layers[0].owner, model, plan, layers, copy_configs(model)
    state = State(*of, graphs, shard, context, ahead, drafts)
    return modules, state, extensions


def _why_not_ahead(model: PreTrainedModel, layers: list[LayerPlan], exact: bool) -> str | None:
    """Why no step of a patched model ever runs ahead of `generate`."""
    if exact:
        return "exact mode verifies drafts"
    if "forward" in vars(model) or "generate" in vars(model):
        return "its forward or its generate is not its class's (accelerate's hooks?)"
    if layers[0].context is not None:
        return "ranks share its tokens"
    hosts = any(layer.hosts for layer in layers)
    return "pages in host memory can't be taken back without waiting" if hosts else None
