"""A plan's YAML, read with the line of every key.

    parts, lines = read(text, "plan.yaml")
    plan = Plan(**parts)

Reading goes from text to plain data and lines (`nodes.plain`), then to the parts of a plan
(`_parts`); each step reports what it can't use through `say` and goes on with BAD instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from hfsparse.errors import MAX_PROBLEMS, PlanError
from hfsparse.plan.extend import RULES
from hfsparse.plan.files import DataFile
from hfsparse.plan.layer_rules import TAKES
from hfsparse.plan.nodes import Say, plain
from hfsparse.plan.parts import (
    BAD,
    MAX_HEADS,
    MAX_LAYERS,
    NAME,
    NEWEST,
    VERSION,
    Below,
    Layer,
    ModelId,
    hints,
    key_of,
    kinds,
    version_of,
    written_fields,
)
from hfsparse.plan.rules import rules, wrong_value
from hfsparse.plan.words import dotted, nearest, show, span
from hfsparse.version import __version__

REQUIRED = "model", "layers"
OPTIONAL = "patterns", "data", "below", "skip", "extend", "expected", "measured", "made"
NEWER = "data", "extend"  # what version 1 had not
WORD = re.compile(rf"({NAME.pattern})(?:\*([1-9]\d{{0,3}}))?")
RANGE = re.compile(r"(0|[1-9]\d{0,5})(?:-([1-9]\d{0,5}))?")
LENGTH = re.compile(r"[1-9]\d{0,18}")


class Lines(dict[tuple, int]):
    """The line of each key of a text, by its path."""

    def of(self, *path: Any) -> int:
        """That of a path; where it has none, of what it lies in."""
        while path and path not in self:
            path = path[:-1]
        return self.get(path, 1)


def read(
    text: str | bytes, name: str, folders: Iterable[Path] | None = None
) -> tuple[dict[str, Any], Lines]:
    """The parts of the plan in `text`; PlanError with `name`, every problem and its line.

    folders: where its tables lie; None: they are not read.
    """
    problems: list[tuple[int | None, str]] = []
    lines = Lines()

    def say(where: tuple | int, sentence: str) -> None:
        problems.append((where if isinstance(where, int) else lines.of(*where), sentence))
        if len(problems) >= MAX_PROBLEMS:
            raise PlanError.of(name, problems)

    raw = plain(text, say, lines)
    if raw is BAD:
        raise PlanError.of(name, problems)
    if type(raw) is not dict:
        what = "empty" if raw is None else show(raw)
        say(1, f"the file is {what}: give a mapping that starts with hfsparse: {VERSION}")
        raise PlanError.of(name, problems)
    version = raw.pop("hfsparse", BAD)
    if type(version) is int and version > NEWEST:
        known = f"versions {VERSION} to {NEWEST}"
        newer = f"needs a newer hfsparse than {__version__}; this one reads {known}"
        line = lines.of("hfsparse")
        raise PlanError.of(name, [(line, f"plan version {show(version)}: {newer}")])
    if type(version) is not int or version < VERSION:
        given = "missing" if version is BAD else show(version)
        say(("hfsparse",), f"hfsparse is {given}: give the plan version, hfsparse: {VERSION}")
    elif version < (needed := version_of(*map(raw.get, NEWER))):
        newer = " and ".join(key for key in NEWER if raw.get(key))
        say(("hfsparse",), f"{newer} needs plan version {needed}: write hfsparse: {needed}")
    parts = _parts(raw, lines, say)
    for problem in rules(parts, lines.of):
        say(*problem)
    if folders is not None and not problems:
        parts["data"] = _tables(parts["data"], tuple(folders), say)
    if problems:
        raise PlanError.of(name, problems)
    return parts, lines


def _parts(raw: dict, lines: dict[tuple, int], say: Say) -> dict[str, Any]:
    given = _mapping(raw, (), REQUIRED, OPTIONAL, say)
    sections = {key: {} if given.get(key) is None else given[key] for key in REQUIRED + OPTIONAL}
    model = _values(ModelId, sections["model"], ("model",), say)
    below = _values(Below, sections["below"], ("below",), say)
    patterns, data, skip = sections["patterns"], sections["data"], given.get("skip")
    if type(patterns) is dict:
        patterns = {
            name: _pattern(each, ("patterns", name), say) for name, each in patterns.items()
        }
    if type(data) is dict:
        data = {name: _table(each, ("data", name), say) for name, each in data.items()}
    return {
        **sections,
        "data": data,
        "model": ModelId(**model),
        "below": Below(**below),
        "skip": float(skip) if type(skip) is int and abs(skip) < 2**63 else skip,
        "extend": _extend(given.get("extend"), say),
        "patterns": patterns,
        "expected": _expected(sections["expected"], lines, say),
        "layers": _layers(sections["layers"], model["layers"], lines, say),
    }


def _mapping(
    raw: Any, path: tuple, required: Iterable[str], optional: Iterable[str], say: Say
) -> dict[str, Any]:
    """The values under the known keys, BAD where a required one is missing."""
    known = dict.fromkeys((*required, *optional))
    if type(raw) is not dict:
        if raw is not BAD:
            say(path, f"{dotted(path)} is {show(raw)}: give a mapping of {', '.join(known)}")
        return dict.fromkeys(required, BAD)
    for key in raw:
        if key not in known:
            say((*path, key), f"unknown key {dotted((*path, key))}: {nearest(key, known)}")
    for key in required:
        if key not in raw:
            say(path, f"{dotted((*path, key))} is missing: add it")
    return {key: raw.get(key, BAD) for key in known if key in raw or key in required}


def _values(cls: type, raw: Any, path: tuple, say: Say) -> dict[str, Any]:
    """The fields of a dataclass from a mapping; those that can't be used are BAD."""
    names = {key_of(each.name): each.name for each in written_fields(cls)}
    needed = [key_of(each.name) for each in written_fields(cls) if each.default is MISSING]
    optional = [key for key in names if key not in needed]
    values = {}
    for key, value in _mapping(raw, path, needed, optional, say).items():
        name = names[key]
        if wrong := wrong_value(cls, name, value):
            say((*path, key), f"{dotted((*path, key))} {wrong}")
            value = BAD
        floated = hints(cls)[name] is float and value is not BAD
        values[name] = float(value) if floated else value
    return values


def _pattern(raw: Any, path: tuple, say: Say) -> Any:
    """An instance of the kind that `raw` names; each number out of range is reported by itself."""
    cls = _kind(raw, path, kinds(), say)
    if cls is BAD:
        return BAD
    values = _values(cls, {key: value for key, value in raw.items() if key != "kind"}, path, say)
    good = {name: value for name, value in values.items() if value is not BAD}
    try:  # some numbers are right beside others alone
        made, whole = cls(**good), None
    except ValueError as error:
        made, whole = BAD, error
    alone = {}
    for name in good if whole else ():
        try:
            cls(**{name: good[name]})
        except ValueError as error:
            alone[name] = error
    if len(alone) == 1:  # beside its real neighbours, not at defaults
        alone = dict.fromkeys(alone, whole)
    for name, error in alone.items():
        say((*path, name), f"{dotted(path)}: {error}")
    if whole and not alone:
        say(path, f"{dotted(path)}: {whole}")
    return made if len(good) == len(values) else BAD


def _kind(raw: Any, path: tuple, known: dict[str, type], say: Say) -> Any:
    """The class that `raw` names; BAD for none."""
    if type(raw) is not dict:
        if raw is not BAD:
            names = ", ".join(known)
            say(path, f"{dotted(path)} is {show(raw)}: give a mapping with a kind, one of {names}")
        return BAD
    kind = _mapping(raw, path, ("kind",), raw, say)["kind"]
    if kind is not BAD and (type(kind) is not str or kind not in known):
        word = kind if type(kind) is str else ""
        say((*path, "kind"), f"unknown kind {show(kind)}: {nearest(word, known)}")
        return BAD
    return BAD if kind is BAD else known[kind]


def _extend(raw: Any, say: Say) -> Any:
    path = ("extend",)
    if raw is None:
        return None
    if (cls := _kind(raw, path, RULES, say)) is BAD:
        return BAD
    values = _values(cls, {key: value for key, value in raw.items() if key != "kind"}, path, say)
    if any(value is BAD for value in values.values()):
        return BAD
    try:
        return cls(**values)
    except ValueError as error:
        say(path, f"extend: {error}")
        return BAD


def _table(raw: Any, path: tuple, say: Say) -> Any:
    values = _values(DataFile, raw, path, say)
    return BAD if any(value is BAD for value in values.values()) else DataFile(**values)


def _tables(data: dict[str, DataFile], folders: tuple[Path, ...], say: Say) -> dict[str, DataFile]:
    """With what their files hold."""
    found = {}
    for name, each in data.items():
        try:
            found[name] = each.read(folders)
        except PlanError as error:
            say(("data", name, "file"), f"data.{name}: {error}")
    return found


def _layers(raw: Any, count: int, lines: dict[tuple, int], say: Say) -> tuple:
    """Every layer once; BAD where none is given."""
    if type(raw) is not dict:
        if raw is not BAD:
            say(("layers",), f"layers is {show(raw)}: give one line a layer or a range of layers")
        return BAD
    layers: dict[int, Any] = {}
    for key, value in raw.items():
        path = ("layers", key)
        match = RANGE.fullmatch(str(key))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last:
            say(path, f"layer {show(key)}: give a number or a range such as 1-29")
            continue
        words = _mapping(value, path, TAKES, (), say)
        layer = Layer(**{part: _words(text, (*path, part), say) for part, text in words.items()})
        most = MAX_LAYERS if count is BAD else count
        if last >= most:
            say(path, f"layer {key}: layers go from 0 to {most - 1}")
        taken = [i for i in range(first, min(last + 1, most)) if i in layers]
        if taken:
            say(path, f"layer {span(taken)} is given twice: keep one")
        for i in range(first, min(last + 1, most)):
            layers[i] = layer
            lines["layers", i] = lines[path]
            for part in TAKES:
                lines["layers", i, part] = lines.get((*path, part), lines[path])
    total = max(layers, default=-1) + 1 if count is BAD else count
    missing = [i for i in range(total) if i not in layers]
    if missing:
        say(("layers",), f"layers {', '.join(map(str, missing[:20]))} are missing: give each once")
    return tuple(layers.get(i, BAD) for i in range(total))


def _expected(raw: Any, lines: dict[tuple, int], say: Say) -> Any:
    """Figures by length in tokens: JSON, which plans may go through, makes text of its keys."""
    if type(raw) is not dict:
        return raw
    figures = {}
    for key, value in raw.items():
        length = int(key) if type(key) is str and LENGTH.fullmatch(key) else key
        if length in figures:
            say(("expected", key), f"expected.{length} is given twice: keep one")
        lines["expected", length] = lines["expected", key]
        figures[length] = value
    return figures


def _words(text: Any, path: tuple, say: Say) -> Any:
    """`full*2 vs` as ("full", "full", "vs")."""
    if text is BAD:
        return BAD
    if type(text) is not str:
        say(path, f"{dotted(path)} is {show(text)}: give words such as full*3")
        return BAD
    matches = [(item, WORD.fullmatch(item)) for item in text.split()]
    if wrong := [item for item, match in matches if not match]:
        say(path, f"{dotted(path)} says {show(wrong[0])}: give words such as full or full*3")
        return BAD
    counts = [(match[1], int(match[2] or 1)) for _, match in matches]
    if sum(count for _, count in counts) > MAX_HEADS:
        say(path, f"{dotted(path)} has more than {MAX_HEADS} words: give one a head")
        return BAD
    return tuple(word for word, count in counts for _ in range(count))
