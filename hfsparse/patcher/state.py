"""What a patch leaves on a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from transformers import PreTrainedModel

from hfsparse.errors import PatchError
from hfsparse.models.names import text_decoder
from hfsparse.models.sharding import Shard
from hfsparse.patcher.ahead import Ahead
from hfsparse.patcher.exact import Exact
from hfsparse.patcher.supported import check_model
from hfsparse.plan import Plan
from hfsparse.runtime.batch import Pool
from hfsparse.runtime.cache.held import Held, Later
from hfsparse.runtime.graphs import Graphs
from hfsparse.runtime.layer_plan import LayerPlan, layer_plans_of
from hfsparse.runtime.parts import ContextParallel


@dataclass
class OwnConfig:
    """The copy of a config that a model has while it is patched: others may share the original."""

    original: Any
    copy: Any
    modules: list[Any]  # those that had the original
    before: dict[str, Any]  # attributes of the copy when it was new

    def give_back(self) -> None:
        """Put the original back, with what was changed in the copy meanwhile."""
        name = "_attn_implementation_internal"
        setattr(self.copy, name, getattr(self.original, name))
        for name, value in vars(self.copy).items():
            if name not in self.before or value is not self.before[name]:
                vars(self.original)[name] = value
        for module in self.modules:
            if module.config is self.copy:
                module.config = self.original


def copy_configs(model: PreTrainedModel) -> list[OwnConfig]:
    """A copy of each config that the model and its submodels have, still parts of one another."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    copies = {key: copy.copy(config) for key, config in configs.items()}
    for own in copies.values():
        for name, part in vars(own).items():
            vars(own)[name] = copies.get(id(part), part)
    found = []
    for key, config in configs.items():
        modules = [m for m in model.modules() if getattr(m, "config", None) is config]
        found.append(OwnConfig(config, copies[key], modules, dict(vars(copies[key]))))
    return found


@dataclass
class State:
    """What a patch leaves on the text decoder (as `_hfsparse`)."""

    owner: str
    model: PreTrainedModel  # the one that was patched: it holds the decoder, or is it
    plan: Plan
    layers: list[LayerPlan]  # of the layers that have attention
    configs: list[OwnConfig]
    graphs: Graphs
    shard: Shard  # the heads of these layers that are this rank's
    context: ContextParallel | None  # how ranks share rows' tokens
    ahead: Ahead
    exact: Exact | None = None  # `layers` read all keys then, and their `draft` what the plan says
    hooks: list[Any] = field(default_factory=list)
    forward: Callable | None = None  # the model's, where it was not its class's
    # After the last call that had a cache: what each layer of it holds, and the columns it saw.
    held: list[list[Held | Later]] = field(default_factory=list)
    seen: int = 0
    states: list[int] = field(default_factory=list)  # bytes of each layer's state beside these
    # Of continuous batching: its managers, and the pool that each of its caches is.
    managers: WeakSet[Any] = field(default_factory=WeakSet)
    pools: WeakKeyDictionary[Any, Pool] = field(default_factory=WeakKeyDictionary)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the model has: managers serve the original."""
        return {name: x for name, x in vars(self).items() if name not in ("managers", "pools")}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept, managers=WeakSet(), pools=WeakKeyDictionary())

    @property
    def whose(self) -> str:
        """What of the model is this rank's; empty: all."""
        return f"{self.shard if self.context is None else self.context}"

    @property
    def all_graphs(self) -> list[Graphs]:
        return [self.graphs] if self.exact is None else [self.graphs, self.exact.graphs]


def is_patched(model: Any) -> bool:
    """Whether a patch lies on the model or on a part of it."""
    return bool(layer_plans_of(model))


def state_of(model: PreTrainedModel) -> State:
    """What a patch left on this model; PatchError for one that is not patched."""
    check_model(model)
    state = text_decoder(model).__dict__.get("_hfsparse") if is_patched(model) else None
    if state is None:
        raise PatchError(
            f"this {type(model).__name__} is not patched: call hfsparse.patch(model) first"
        )
    return state
