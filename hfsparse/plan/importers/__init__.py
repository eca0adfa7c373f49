"""Plans that other projects published, as plans of ours.

    plan, notes = import_plan("duo", "attn_patterns/my-model", AutoConfig.from_pretrained(model))

`notes` says in plain sentences what a plan can't carry over. Forms: `minference` (MInference,
arXiv 2407.02490), `duo` (DuoAttention, arXiv 2410.10819), `moa` (MoA, arXiv 2406.14909),
`modelopt` (NVIDIA ModelOpt's skip-softmax, BLASST, arXiv 2512.12087).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfsparse.errors import PlanMismatch, UsageError
from hfsparse.models.layers import LayerShape, layer_shapes
from hfsparse.patterns import Pattern
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.plan.importers import duo, minference, moa, modelopt
from hfsparse.plan.importers.form import FORMS, Found, describe_heads, note_heads
from hfsparse.plan.parts import Layer, ModelId
from hfsparse.plan.plan import Plan
from hfsparse.plan.words import nearest, show
from hfsparse.reading import local
from hfsparse.version import __version__

READERS: dict[str, Callable[..., Found]] = {
    "minference": minference.read,
    "duo": duo.read,
    "moa": moa.read,
    "modelopt": modelopt.read,
}
OWNERS = {"share": "duo", "length": "modelopt"}  # whose each setting is
UNSAID = {  # forms that today's words of a plan can't say
    "lukv": "its curves say what share of its keys each kv head keeps, those of the highest scores "
    "of a kvpress press, and a plan has no word for keys dropped by expected attention. Use it in "
    "kvpress, or profile this model: hfsparse profile",
}


def import_plan(
    form: str,
    path: str | Path,
    config: Any = None,
    share: float | None = None,
    length: int | None = None,
) -> tuple[Plan, list[str]]:
    """The plan in `path`, and what could not be carried over.

    config: the model's config (or the model): a plan can't be without its shape and fingerprint.
    share: `duo` only, of kv heads that stream; 0.5 as its authors deploy it.
    length: `modelopt` only, tokens at which `skip` is to be its threshold.
    """
    given = {"share": share, "length": length}
    settings = {name: value for name, value in given.items() if value is not None}
    _check(form, settings)
    path = local(path)
    found = READERS[form](path, **settings)
    if config is None:
        has = _describe_shape(found)
        raise UsageError(
            f"{path} has {has}, and says no more of its model; a plan needs its shape and "
            "fingerprint: give --model-config, a folder with its config.json"
        )
    model = ModelId.of(config)
    if found.shape and found.shape != (model.layers, theirs := getattr(model, found.unit)):
        raise PlanMismatch(
            f"{path} has {_describe_shape(found)}; {model.class_name} has {model.layers} layers of "
            f"{theirs}: give the config of the model that it was made for"
        )
    plan, notes = _build_plan(found, model, layer_shapes(config))
    plan.made = {"version": __version__, "method": form, "imported": path.name}
    if form == "duo":
        settings = {"share": float(settings.get("share", duo.SHARE))}
    plan.made |= settings
    plan.validate()
    plan.check(config)
    return plan, [*found.notes, *notes]


def _check(form: str, settings: dict[str, Any]) -> None:
    """Raise UsageError for a form that can't be read, or what is none of its settings."""
    if form in UNSAID:
        raise UsageError(f"a plan can't say what {form} does: {UNSAID[form]}")
    if form not in READERS:
        raise UsageError(f"unknown form {show(form)}: {nearest(form, FORMS)}")
    for name in settings:
        if OWNERS[name] != form:
            raise UsageError(f"{name} belongs to the form {OWNERS[name]}: leave it out for {form}")
    if not 0 <= settings.get("share", 0) <= 1:
        raise UsageError(f"share is {settings['share']}: give 0 to 1")


def _describe_shape(found: Found) -> str:
    if found.shape is None:
        return "a skip"
    layers, heads = found.shape
    return f"{layers} layers of {heads} {found.unit.replace('_', ' ')}"


def _build_plan(found: Found, model: ModelId, own: list[LayerShape]) -> tuple[Plan, list[str]]:
    """Patterns by name and a Layer each; a ring where every q head of a group streams."""
    if not found.rows:
        return replace(Plan.full(model), skip=found.skip), []
    group, patterns, layers = model.q_heads // model.kv_heads, {}, []
    windowed, shared, wide, kept, left = {}, {}, {}, {}, {}  # layer -> heads, for the notes

    def word(pattern: Pattern | None) -> str:
        if pattern is None:
            return "full"
        patterns[name := _name(pattern)] = pattern
        return name

    for index, (row, shape) in enumerate(zip(found.rows, own, strict=True)):
        told = shape.attends and not shape.chunked and shape.heads == model.heads
        if not told:  # a plan has no words for it
            note_heads(left, index, [pattern is not None for pattern in row])
            row = [None] * len(row)
        q_row = row if found.unit == "q_heads" else [p for p in row for _ in range(group)]
        groups = [q_row[first : first + group] for first in range(0, len(q_row), group)]
        rings = [_join_spans(each) if found.rings else None for each in groups]
        if found.rings and not shape.alone:
            why = windowed if shape.window is not None else shared
            note_heads(why, index, [ring is not None for ring in rings])
            rings = [None] * len(rings)
        elif found.rings:
            streams = [[p is not None for p in each] for each in groups]
            note_heads(kept, index, [any(each) and not all(each) for each in streams])
            wider = [r is not None and {*g} != {r} for g, r in zip(groups, rings, strict=True)]
            note_heads(wide, index, wider)
        prefill, cache = (tuple(word(p) for p in each) for each in (q_row, rings))
        layers.append(Layer(prefill, cache, tuple("ring" if r else "full" for r in rings)))
    notes = [
        f"{what}: {describe_heads(where)}"
        for what, where in (
            ("the model's own window bounds the cache, so these kv heads have no ring", windowed),
            ("layers share these kv heads' keys, so they have no ring", shared),
            ("layers in chunks, without attention or with other heads stay full", left),
            ("kv heads keep every key, and decode reads all: a q head of theirs is full", kept),
            ("kv heads keep, and decode reads, the longest span of their q heads", wide),
        )
        if where
    ]
    return Plan(model, patterns, tuple(layers)), notes


def _join_spans(group: Sequence[Pattern | None]) -> Streaming | None:
    """The ring that holds all that a group's q heads read; None where one reads more."""
    if not all(isinstance(pattern, Streaming) for pattern in group):
        return None
    sizes = ("sink", "recent", "recent_per_token")
    return Streaming(*(max(getattr(pattern, size) for pattern in group) for size in sizes))


def _name(pattern: Pattern) -> str:
    """A name that states every number, so that one name is one pattern."""
    if isinstance(pattern, VerticalSlash):
        return f"vs{pattern.columns}x{pattern.diagonals}"
    if isinstance(pattern, BlockTopK):
        return f"blocks{pattern.min_blocks}"
    rate = f"-{pattern.recent_per_token}" if pattern.recent_per_token else ""
    return f"stream{pattern.sink}-{pattern.recent}{rate}"
