"""What changed between two plans, for people: one line a change, heads by range.

    for line in differences(Plan.load("a.yaml"), Plan.load("b.yaml")):
        print(line)     # layers 1-3 prefill: q heads 0-2, 5: stream -> full

Where a plan came from and what was measured on a device (`made`, `measured`) are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain, groupby
from typing import Any

from hfsparse.plan.layer_rules import TAKES
from hfsparse.plan.parts import Layer, every_parameter, key_of
from hfsparse.plan.plan import Plan
from hfsparse.plan.words import runs, span

UNITS = {"prefill": "q heads", "cache": "kv heads", "decode": "kv heads"}
SHAPE = ("layers", "q_heads", "kv_heads")


def differences(old: Plan, new: Plan) -> list[str]:
    """A line for each thing that changed; none where both compute and expect the same."""
    return [
        *_changes("model: ", _rename_keys(asdict(old.model)), _rename_keys(asdict(new.model))),
        *_pattern_changes(old, new),
        *_changes("data: ", _contents(old), _contents(new)),
        *_changes("below: ", asdict(old.below), asdict(new.below)),
        *_changes("", {"skip": old.skip}, {"skip": new.skip}),
        *_changes("extend: ", _extension(old), _extension(new)),
        *_layer_changes(old, new),
        *chain.from_iterable(
            _changes(
                f"expected at {length}: ",
                old.expected.get(length, {}),
                new.expected.get(length, {}),
            )
            for length in sorted({*old.expected, *new.expected})
        ),
    ]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in few words: 0, 1, 2 and 5 are `0-2, 5`."""
    return ", ".join(map(span, runs(numbers)))


def _rename_keys(model: dict[str, Any]) -> dict[str, Any]:
    return {key_of(name): value for name, value in model.items()}


def _contents(plan: Plan) -> dict[str, str]:
    return {name: f"sha256:{each.sha256[:12]}" for name, each in plan.data.items()}


def _extension(plan: Plan) -> dict[str, Any]:
    return {} if plan.extend is None else every_parameter(plan.extend)


def _changes(what: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if before != after:
            yield f"{what}{key} {_show(before)} -> {_show(after)}"


def _show(value: Any) -> str:
    return "none" if value is None else str(value)


def _pattern_changes(old: Plan, new: Plan) -> Iterator[str]:
    for name in dict.fromkeys((*old.patterns, *new.patterns)):
        before, after = (
            every_parameter(plan.patterns[name]) if name in plan.patterns else None
            for plan in (old, new)
        )
        if before and after:
            yield from _changes(f"pattern {name}: ", before, after)
        elif before or after:
            kind, *rest = ((before or after) or {}).items()
            words = ", ".join(f"{key} {_show(value)}" for key, value in rest)
            where = "only in the first" if before else "only in the second"
            yield f"pattern {name} is {where}: {kind[1]} {words}"


def _layer_changes(old: Plan, new: Plan) -> Iterator[str]:
    """Totals of each phase, then layers that changed alike, a line a phase and pair of words."""
    if any(getattr(old.model, key) != getattr(new.model, key) for key in SHAPE):
        yield "layers: the shapes of the models differ, so heads can't be compared"
        return
    changed = [_head_changes(old, new, *pair) for pair in zip(old.layers, new.layers, strict=True)]
    for part, unit in UNITS.items():
        total = sum(len(getattr(layer, part)) for layer in old.layers)
        heads = sum(len(heads) for each in changed for (p, *_), heads in each.items() if p == part)
        if heads:
            yield f"{part}: {heads} of {total} {unit} changed"
    for found, run in groupby(range(len(changed)), key=changed.__getitem__):
        layers = list(run)
        name = f"layers {span(layers)}" if len(layers) > 1 else f"layer {layers[0]}"
        for (part, before, after), heads in found.items():
            unit = UNITS[part] if len(heads) > 1 else UNITS[part].removesuffix("s")
            yield f"{name} {part}: {unit} {ranges(heads)}: {before} -> {after}"


def _head_changes(old: Plan, new: Plan, one: Layer, two: Layer) -> dict[tuple, list[int]]:
    """(phase, old word, new word) -> heads. A new name for equal numbers is no change of heads."""
    found: dict[tuple, list[int]] = {}
    for part in TAKES:
        words = zip(getattr(one, part), getattr(two, part), strict=True)
        for head, (before, after) in enumerate(words):
            if before != after and old.patterns.get(before, before) != new.patterns.get(
                after, after
            ):
                found.setdefault((part, before, after), []).append(head)
    return found
