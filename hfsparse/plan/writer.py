"""A plan as text: one line a layer, repeats collapsed."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from itertools import groupby
from typing import Any

import yaml

from hfsparse.plan.files import DataFile
from hfsparse.plan.layer_rules import TAKES
from hfsparse.plan.nodes import TAG
from hfsparse.plan.parts import Below, Layer, ModelId, hints, key_of, parameters, version_of
from hfsparse.plan.words import span

NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|0[ox][\da-fA-F]+")


class _Row(dict):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _row(dumper: _Dumper, row: _Row) -> yaml.Node:
    return dumper.represent_mapping(TAG + "map", row, flow_style=True)


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    """On one line, and quoted where another YAML reader would see a number."""
    quote = not text.isprintable() or NUMBER.fullmatch(text)
    return dumper.represent_scalar(TAG + "str", text, style='"' if quote else None)


_Dumper.add_representer(_Row, _row)
_Dumper.add_representer(str, _text)


def write(parts: dict[str, Any]) -> str:
    """A valid plan's parts as YAML: one line a pattern or a run of equal layers, nothing empty."""
    document = {
        "hfsparse": version_of(parts["data"], parts["extend"]),
        "model": _Row({key_of(name): getattr(parts["model"], name) for name in hints(ModelId)}),
        "patterns": {name: _pattern_row(each) for name, each in parts["patterns"].items()},
        "data": _Row({name: _table_row(each) for name, each in parts["data"].items()}),
        "below": _Row(vars(parts["below"]) if parts["below"] != Below() else {}),
        "skip": None if parts["skip"] is None else float(parts["skip"]),
        "extend": None if parts["extend"] is None else _pattern_row(parts["extend"]),
        "layers": _layer_rows(parts["layers"]),
        "expected": _Row(parts["expected"]),
        "measured": _Row(parts["measured"]),
        "made": _Row(parts["made"]),
    }
    return yaml.dump(
        {key: value for key, value in document.items() if value},
        Dumper=_Dumper,
        default_flow_style=False,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
    )


def _pattern_row(pattern: Any) -> _Row:
    """Every parameter, but those that are off (zero) unless set."""
    off = {each.name for each in fields(pattern) if each.default == 0}
    return _Row({k: v for k, v in parameters(pattern).items() if k not in off or v != 0})


def _table_row(table: DataFile) -> dict[str, str]:
    return {name: getattr(table, name) for name in hints(DataFile)}


def _layer_rows(layers: tuple[Layer, ...]) -> dict[int | str, _Row]:
    rows: dict[int | str, _Row] = {}
    for layer, run in groupby(range(len(layers)), key=layers.__getitem__):
        numbers = list(run)
        key = span(numbers) if len(numbers) > 1 else numbers[0]
        rows[key] = _Row({part: joined(getattr(layer, part)) for part in TAKES})
    return rows


def joined(words: tuple[str, ...]) -> str:
    """A word a head, repeats collapsed."""
    runs = [(word, len(list(run))) for word, run in groupby(words)]
    return " ".join(f"{word}*{count}" if count > 1 else word for word, count in runs)
