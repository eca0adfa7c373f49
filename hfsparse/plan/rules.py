"""The rules that hold for any plan, built in code or read from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import chain
from typing import Any, Literal, get_args, get_origin

from hfsparse.errors import Problem
from hfsparse.lists.packed import said
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan.extend import RULES
from hfsparse.plan.files import DIGEST, FILE, DataFile
from hfsparse.plan.kept import Full
from hfsparse.plan.layer_rules import BUILT_IN, layers_rules
from hfsparse.plan.parts import (
    BAD,
    MAX_DEPTH,
    NAME,
    Below,
    ModelId,
    Placed,
    hints,
    key_of,
    kinds,
    written_fields,
)
from hfsparse.plan.words import dotted, nearest, show
from hfsparse.reading import SURROGATE


def rules(
    parts: dict[str, Any], line_of: Callable[..., int | None] = lambda *path: None
) -> Iterator[Problem]:
    """Every rule that a plan of these parts breaks, one after the other, but of BAD parts none."""
    model_problems = _model_rules(parts["model"])
    model = None if model_problems else parts["model"]
    patterns = parts["patterns"] if type(parts["patterns"]) is dict else {}
    for path, text in chain(
        model_problems,
        _pattern_rules(parts["patterns"]),
        _table_rules(parts["data"]),
        _named_rules(patterns, parts["data"]),
        _field_rules(parts["below"], Below, ("below",)),
        _skip_rules(parts["skip"]),
        _extend_rules(parts["extend"], patterns),
        layers_rules(parts["layers"], model, patterns, line_of),
        _expected_rules(parts["expected"]),
        _mapping_rules(parts["measured"], ("measured",)),
        _mapping_rules(parts["made"], ("made",)),
    ):
        yield line_of(*path), text


def _model_rules(model: ModelId) -> list[Placed]:
    broken = list(_field_rules(model, ModelId, ("model",)))
    heads = () if broken else (model.q_heads, model.kv_heads)
    if heads and BAD not in heads and model.q_heads % model.kv_heads:
        given = f"{model.q_heads} q heads over {model.kv_heads} kv heads"
        broken = [(("model", "q_heads"), f"{given}: give a multiple of kv_heads")]
    return broken


def _pattern_rules(patterns: dict[str, Any]) -> Iterator[Placed]:
    if type(patterns) is not dict:
        yield ("patterns",), f"patterns is {show(patterns)}: give a mapping from name to pattern"
        return
    for name, pattern in patterns.items():
        path = ("patterns", name)
        if type(name) is not str or not NAME.fullmatch(name) or name in BUILT_IN["decode"]:
            rule = "a letter, then up to 63 letters, digits, _ . - (and not full, ring or kept)"
            yield path, f"pattern name {show(name)}: give {rule}"
        if type(pattern) in kinds().values():
            yield from _field_rules(pattern, type(pattern), path)
        elif pattern is not BAD:
            yield path, f"{dotted(path)} is {show(pattern)}: give one of {', '.join(kinds())}"


def _table_rules(data: dict[str, DataFile]) -> Iterator[Placed]:
    if data is BAD:
        return
    if type(data) is not dict:
        yield ("data",), f"data is {show(data)}: give a mapping from name to file and sha256"
        return
    for name, each in data.items():
        path = ("data", name)
        if type(name) is not str or not NAME.fullmatch(name):
            rule = "a letter, then up to 63 letters, digits, _ . -"
            yield path, f"data name {show(name)}: give {rule}"
        if each is BAD:
            continue
        yield from (broken := list(_field_rules(each, DataFile, path)))
        if broken:
            continue
        if each.file is not BAD and not FILE.fullmatch(each.file):
            rule = "give the name of a .safetensors file that lies beside the plan, without folders"
            yield (*path, "file"), f"{dotted(path)}.file is {show(each.file)}: {rule}"
        if each.sha256 is not BAD and not DIGEST.fullmatch(each.sha256):
            rule = "give the 64 hex digits that sha256sum prints for the file"
            yield (*path, "sha256"), f"{dotted(path)}.sha256 is {show(each.sha256)}: {rule}"


def _named_rules(patterns: dict, data: dict) -> Iterator[Placed]:
    """Selectors name tables that the plan has."""
    known = data if type(data) is dict else {}
    for name, pattern in patterns.items():
        if type(pattern) not in kinds().values() or "data" not in hints(type(pattern)):
            continue
        if data is not BAD and type(pattern.data) is str and pattern.data not in known:
            path = ("patterns", name, "data")
            made = f"hfsparse profile MODEL --selector {pattern.kind} makes one"
            hint = nearest(pattern.data, known) if known else f"add it there; {made}"
            yield path, f"{dotted(path)} is {show(pattern.data)}, which is not under data: {hint}"


def _field_rules(value: Any, cls: type, path: tuple) -> Iterator[Placed]:
    if type(value) is not cls:
        yield path, f"{dotted(path)} is {show(value)}: give a {cls.__name__}"
        return
    for each in written_fields(cls):
        place = (*path, key_of(each.name))
        if wrong := wrong_value(cls, each.name, getattr(value, each.name)):
            yield place, f"{dotted(place)} {wrong}"


def _skip_rules(skip: float | None) -> Iterator[Placed]:
    if skip is None or skip is BAD:
        return
    if type(skip) not in (int, float) or not (_plain_scalar(skip) and skip > 0):
        rule = "give a number of nats above 0 (BLASST's threshold is e^-skip), or leave it out"
        yield ("skip",), f"skip is {show(skip)}: {rule}"


def _extend_rules(extend: Any, patterns: dict) -> Iterator[Placed]:
    if extend is None or extend is BAD:
        return
    if type(extend) not in RULES.values():
        yield ("extend",), f"extend is {show(extend)}: give one of {', '.join(RULES)}"
        return
    yield from _field_rules(extend, type(extend), ("extend",))
    for name, pattern in patterns.items():
        by_place = hasattr(pattern, "band") or hasattr(pattern, "placed")
        if isinstance(pattern, (Streaming, Full)):
            if pattern.bits != 16:
                yield (
                    ("patterns", name),
                    f"patterns.{name} keeps {said(pattern.bits)}, and extend reads keys of 16 "
                    "bits: give that beside it",
                )
        elif type(pattern) in kinds().values() and not by_place:
            yield (
                ("patterns", name),
                f"patterns.{name} is {pattern.kind}, which looks at scores, and extend changes "
                "these from chunk to chunk: give heads full, streaming or strided beside it",
            )


def _expected_rules(expected: dict[int, dict[str, float]]) -> Iterator[Placed]:
    yield from (broken := list(_mapping_rules(expected, ("expected",))))
    if broken or expected is BAD:
        return
    for length, figures in expected.items():
        path = ("expected", length)
        if type(length) is not int or length < 1:
            yield path, f"expected has {show(length)}: give a length in tokens, 1 or more"
        if type(figures) is not dict:
            yield path, f"{dotted(path)} is {show(figures)}: give a mapping from figure to number"
            continue
        for name, value in figures.items():
            if type(name) is not str or (type(value) not in (int, float) and value is not BAD):
                place = (*path, name)
                yield place, f"{dotted(place)} is {show(value)}: give a name and its number"


def _mapping_rules(data: dict, path: tuple) -> Iterator[Placed]:
    if data is not BAD and type(data) is not dict:
        yield path, f"{dotted(path)} is {show(data)}: give a mapping"
        return
    yield from _data_rules(data, path)


def _data_rules(data: Any, path: tuple) -> Iterator[Placed]:
    """Plain data only: what YAML and JSON give back as it was."""
    if data is BAD:
        return
    if len(path) > MAX_DEPTH:
        yield path, f"{dotted(path)} is nested deeper than {MAX_DEPTH}: give flatter data"
    elif type(data) is dict:
        for key, value in data.items():
            if type(key) not in (str, int) or not _plain_scalar(key):
                yield path, f"{dotted(path)} has the key {show(key)}: give text or a whole number"
            yield from _data_rules(value, (*path, key))
    elif type(data) is list:
        for index, value in enumerate(data):
            yield from _data_rules(value, (*path, index))
    elif not _plain_scalar(data):
        yield (
            path,
            (
                f"{dotted(path)} is {show(data)}: give text, true, false, null, a finite number, "
                "a list or a mapping"
            ),
        )


def _plain_scalar(value: Any) -> bool:
    if type(value) is str:
        return not SURROGATE.search(value)
    if type(value) in (int, float):
        return abs(value) < 2**63  # false for NaN and inf
    return value is None or type(value) is bool


def wrong_value(cls: type, name: str, value: Any) -> str | None:
    """What is wrong with `value` for a field of the dataclass `cls`, or None."""
    if value is BAD:
        return None
    hint = hints(cls)[name]
    low, high = next(each for each in fields(cls) if each.name == name).metadata.get(
        "range", (0, 2**31 - 1)
    )
    if hint is int and not (type(value) is int and low <= value <= high):
        return f"is {show(value)}: give a whole number from {low} to {high}"
    if hint is float and not (type(value) in (int, float) and _plain_scalar(value)):
        return f"is {show(value)}: give a number"
    if hint is bool and type(value) is not bool:
        return f"is {show(value)}: give true or false"
    if get_origin(hint) is Literal:
        given = get_args(hint)
        if not any(type(value) is type(each) and value == each for each in given):
            return f"is {show(value)}: give one of {', '.join(map(str, given))}"
    if hint is str and not (type(value) is str and value and _plain_scalar(value)):
        return f"is {show(value)}: give text"
    return None
