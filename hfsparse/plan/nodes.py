"""YAML nodes of a plan, read strictly: no duplicate keys, no surprises of YAML 1.1."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from hfsparse import reading
from hfsparse.errors import PlanError
from hfsparse.plan.parts import BAD, MAX_BYTES, MAX_DEPTH
from hfsparse.plan.words import dotted, show

# Numbers of YAML 1.2 that PyYAML, a reader of 1.1, takes for text: 4e0, 1.5e3, -.5, 0o17.
FLOAT = re.compile(r"[-+]?(\d+\.?|\d*\.\d+)[eE][-+]?\d+|[-+]\.\d+")
OCTAL = re.compile(r"0o[0-7]+")
TAG = "tag:yaml.org,2002:"
BOOLS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
Say = Callable[[Any, str], None]  # (a path of keys or a line, a sentence)


def plain(text: str | bytes, say: Say, lines: dict[tuple, int]) -> Any:
    """YAML as plain data, BAD if it is none; `lines` gets the line of every path of keys."""
    try:
        decoded = _decode(text)
        return _plain(_compose(decoded, say), (), lines, say)
    except PlanError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        tab = any("\t" in each for each in decoded.split("\n")[line - 1 : line])
        hint = " (this line has a tab: indent with spaces)" if tab else ""
        say(line, f"not YAML: {error.problem or error.context}{hint}")
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        say(1, f"not a text that YAML can hold: {' '.join(str(error).split())[:200]}")
    return BAD


class _Strict:
    """Composer mixin: aliases, anchors and deep nesting are reported, so no file can blow up."""

    depth = 0
    say: Say

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None):
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            self.say(line, f"{sign}{event.anchor}: plans have no anchors and aliases, write it out")
            event.anchor = None
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            return yaml.ScalarNode(None, "", event.start_mark, event.end_mark)
        if self.depth > MAX_DEPTH:
            text = f"nested deeper than {MAX_DEPTH}: give flatter data"
            raise yaml.composer.ComposerError(None, None, text, event.start_mark)
        self.depth += 1
        node = yaml.composer.Composer.compose_node(self, parent, index)
        self.depth -= 1
        return node


class PythonLoader(_Strict, yaml.SafeLoader):
    """PyYAML's own."""


def _know_numbers(loader: type[yaml.resolver.Resolver]) -> None:
    loader.add_implicit_resolver(TAG + "float", FLOAT, [*"+-.0123456789"])
    loader.add_implicit_resolver(TAG + "int", OCTAL, ["0"])


Loader = PythonLoader
_know_numbers(PythonLoader)


if hasattr(yaml, "CSafeLoader"):

    class FastLoader(_Strict, yaml.composer.Composer, yaml.CSafeLoader):
        """libyaml's events under PyYAML's composer: the same nodes and lines, ten times faster."""

        def __init__(self, stream: str):
            yaml.CSafeLoader.__init__(self, stream)
            yaml.composer.Composer.__init__(self)

    _know_numbers(FastLoader)
    Loader = FastLoader


def _decode(text: str | bytes) -> str:
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES} bytes")
    return reading.decode(text) if isinstance(text, bytes) else text


def _compose(text: str, say: Say) -> yaml.Node | None:
    loader = Loader(text)
    loader.say = say
    return loader.get_single_node()


def _plain(node: yaml.Node | None, path: tuple, lines: dict[tuple, int], say: Say) -> Any:
    """A node as plain data; `lines` gets the line of every path of keys."""
    if node is None:
        return None
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, say)
    if node.tag not in (TAG + "map", TAG + "seq"):
        say(line, f"tag {show(node.tag)}: plans hold no tagged values, write it plainly")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), lines, say) for i, item in enumerate(node.value)]
    mapping = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _scalar(key_node, say) if isinstance(key_node, yaml.ScalarNode) else None
        if key is BAD:
            continue
        if type(key) not in (str, int):
            place = dotted(path) or "the plan"
            say(line, f"{place} has the key {show(key)}: give text (in quotes) or a whole number")
        elif key in mapping:
            say(line, f"{dotted((*path, key))} is given twice: keep one")
        else:
            lines[(*path, key)] = line
            mapping[key] = _plain(value_node, (*path, key), lines, say)
    return mapping


def _scalar(node: yaml.ScalarNode, say: Say) -> Any:
    """Text, bool, null or number; dates, 010, 1:30 and the like stay the text they are."""
    if node.tag is None:  # an alias
        return BAD
    kind, text = node.tag.removeprefix(TAG), node.value
    if kind == "null":
        return None
    if kind == "bool":
        return BOOLS.get(text.lower(), text)
    if kind in ("int", "float") and len(text) <= 64:
        try:
            return (
                int(text, 0) if kind == "int" else float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
            )
        except ValueError:
            return text
    if kind not in ("str", "int", "float", "timestamp", "merge", "value"):
        say(node.start_mark.line + 1, f"tag {show(node.tag)}: plans hold no tagged values")
    return text
