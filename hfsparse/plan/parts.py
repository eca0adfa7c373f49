"""The parts of a plan, and what is common to all that read, check and write them."""

from __future__ import annotations

import functools
import re
import typing
from dataclasses import Field, dataclass, field, fields
from typing import Any

from hfsparse.errors import PlanError, ShapeError
from hfsparse.evictions import EVICTIONS
from hfsparse.models.classes import class_of
from hfsparse.models.fingerprint import attention_values, fingerprint
from hfsparse.models.layers import UNITS, text_config
from hfsparse.patterns import PATTERNS
from hfsparse.plan.kept import KEPT
from hfsparse.registry import LATER
from hfsparse.selectors import SELECTORS

MAX_BYTES, MAX_DEPTH = 1 << 20, 16
MAX_LAYERS = MAX_HEADS = 1024
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
BAD: Any = object()  # stands for a part that can't be used, which was reported already
Placed = tuple[tuple, str]  # path of keys, sentence


def _up_to(most: int) -> Any:
    return field(metadata={"range": (1, most)})


@dataclass(frozen=True)
class ModelId:
    """What a plan must know of its model. Weights are not in it: a fine-tune fits."""

    class_name: str
    layers: int = _up_to(MAX_LAYERS)
    q_heads: int = _up_to(MAX_HEADS)
    kv_heads: int = _up_to(MAX_HEADS)
    head_dim: int = _up_to(1 << 16)
    fingerprint: str

    @property
    def heads(self) -> tuple[int, int]:
        """Of q, and of k and v: a layer with others has no words."""
        return self.q_heads, self.kv_heads

    @property
    def sizes(self) -> str:
        """In words."""
        kv = "kv head" if self.kv_heads == 1 else "kv heads"
        heads = f"{self.q_heads} q heads and {self.kv_heads} {kv} of {self.head_dim}"
        return f"{self.layers} layers, {heads}"

    @classmethod
    def of(cls, model_or_config: Any) -> ModelId:
        """Read a transformers model or config; of a multimodal one, its text decoder.

        A config is of the class that commands load for it (`class_of`).
        """
        whole = getattr(model_or_config, "config", model_or_config)
        is_config = whole is model_or_config
        name = _class_name(whole) if is_config else _own_class(type(model_or_config)).__name__
        try:
            values = attention_values(text_config(whole))
            sizes = {size: values[size] for size in UNITS}
            return cls(class_name=name, fingerprint=fingerprint(values), **sizes)
        except ShapeError as error:
            raise PlanError(
                f"{name} is not a model that a plan can describe: {error}. "
                "Give a decoder of transformers whose layers have equal heads, or its config"
            ) from error


def _own_class(model: type) -> type:
    """A model's class; fully_shard (FSDP) puts one of its own before it."""
    return next(each for each in model.__mro__ if not each.__module__.startswith("torch."))


def _class_name(config: Any) -> str:
    """Of the class that commands load; where transformers has none, as the config calls it."""
    if (loaded := class_of(config)) is not None:
        return loaded.__name__
    return (getattr(config, "architectures", None) or [type(config).__name__])[0]


@dataclass(frozen=True)
class Layer:
    """One word a head: `prefill` per q head, `cache` and `decode` per kv head."""

    prefill: tuple[str, ...]
    cache: tuple[str, ...]
    decode: tuple[str, ...]


@dataclass(frozen=True)
class Below:
    """Tokens in the row under which a head is computed, or kept, in full."""

    prefill: int = 0
    decode: int = 0
    cache: int = 0


def kinds() -> dict[str, type]:
    """Every pattern, selector, eviction and other way of keeping that a plan may name."""
    return {**PATTERNS, **SELECTORS, **EVICTIONS, **KEPT}


@functools.cache
def written_fields(cls: type) -> tuple[Field, ...]:
    """The fields of a dataclass that plans write: all but what it only carries (compare=False)."""
    return tuple(each for each in fields(cls) if each.compare)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Type of each of these fields."""
    types = typing.get_type_hints(cls)
    return {each.name: types[each.name] for each in written_fields(cls)}


def parameters(pattern: Any) -> dict[str, Any]:
    """A pattern or selector as plans write it, plain data."""
    said = {each.name for each in written_fields(type(pattern)) if _said(pattern, each)}
    return {key: value for key, value in every_parameter(pattern).items() if key in {"kind", *said}}


def every_parameter(pattern: Any) -> dict[str, Any]:
    """The same with what plans leave out, `kind` first; float fields are floats, given 1 too."""
    types = hints(type(pattern))
    values = {name: getattr(pattern, name) for name in types}
    floats = {name: float(value) for name, value in values.items() if types[name] is float}
    return {"kind": pattern.kind, **values, **floats}


def _said(pattern: Any, each: Field) -> bool:
    """Whether a parameter is written: one that came later is where it is not at its default."""
    return LATER not in each.metadata or getattr(pattern, each.name) != each.default


def describe(pattern: Any) -> str:
    """A pattern's or selector's parameters, less what is off by default."""
    every = written_fields(type(pattern))
    shown = {each.name: getattr(pattern, each.name) for each in every if _said(pattern, each)}
    off = [each.name for each in every if not shown.get(each.name) and not each.default]
    told = [f"{name} {_short(value)}" for name, value in shown.items() if name not in off]
    return ", ".join(told) or "pages chosen by the last layer before that chooses"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def key_of(name: str) -> str:
    """The plan's key for a field: `class` can't be a Python name."""
    return "class" if name == "class_name" else name


VERSION, NEWEST = 1, 2  # of a plan that uses nothing new, and the last that is known


def version_of(*newer: Any) -> int:
    """The lowest version that has all that a plan uses; newer: what it has of version 2, if any."""
    return NEWEST if any(newer) else VERSION
