"""The parts of a plan and the rules that hold for any plan, built in code or read from a file."""

from __future__ import annotations

import difflib
import functools
import re
import reprlib
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import chain, groupby, islice
from typing import Any

from hfsparse.fingerprint import ShapeError, fingerprint, shape, text_config
from hfsparse.patterns import PATTERNS
from hfsparse.patterns.streaming import Streaming
from hfsparse.reading import SURROGATE
from hfsparse.selectors import SELECTORS
from hfsparse.selectors.reuse import Reuse

MAX_BYTES, MAX_DEPTH, MAX_PROBLEMS = 1 << 20, 16, 100
MAX_LAYERS = MAX_HEADS = 1024
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60
BUILT_IN = {"prefill": ("full",), "cache": ("full",), "decode": ("full", "ring")}
TAKES = {
    "prefill": "full or the name of a prefill pattern",
    "cache": "full or the name of a streaming pattern",
    "decode": "full, ring or the name of a selector",
}
BAD: Any = object()  # stands for a part whose problem has been reported already

Problem = tuple[int | None, str]  # line, sentence
Placed = tuple[tuple, str]  # path of keys, sentence


class PlanError(ValueError):
    """A plan that can't be used; `problems` holds (line or None, sentence) for each thing wrong."""

    def __init__(self, message: str, problems: Iterable[Problem] = ()):
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, name: str, problems: Collection[Problem]) -> PlanError:
        """One error for all problems of the plan called `name`, in the order of its lines."""
        problems = sorted(problems, key=lambda problem: problem[0] or 0)
        lines = [f"line {line}: {text}" if line else text for line, text in problems]
        if len(lines) == 1:
            return cls(f"{name}: {lines[0]}", problems)
        many = f"the first {len(lines)}" if len(lines) >= MAX_PROBLEMS else str(len(lines))
        return cls("\n  ".join([f"{name}: {many} problems", *lines]), problems)


class PlanMismatch(PlanError):
    """A plan that was made for another model."""


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

    @classmethod
    def of(cls, model_or_config: Any) -> ModelId:
        """Read a transformers model or config; of a multimodal one, its text decoder."""
        whole = getattr(model_or_config, "config", model_or_config)
        name = type(model_or_config).__name__
        if whole is model_or_config:
            name = (getattr(whole, "architectures", None) or [name])[0]
        try:
            config = text_config(whole)
            return cls(class_name=name, fingerprint=fingerprint(config), **shape(config))
        except ShapeError as error:
            raise PlanError(
                f"{name} is not a model that a plan can describe: {error}. "
                "Give a decoder of transformers whose layers have equal heads, or its config"
            ) from error


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


def rules(plan: Any, line_of: Callable[..., int | None] = lambda *path: None) -> Iterator[Problem]:
    """Every rule that `plan` breaks, one after the other; parts that are BAD are passed over."""
    model_problems = _model_rules(plan.model)
    model = None if model_problems else plan.model
    patterns = plan.patterns if type(plan.patterns) is dict else {}
    for path, text in chain(
        model_problems,
        _pattern_rules(plan.patterns),
        _field_rules(plan.below, Below, ("below",)),
        _skip_rules(plan.skip),
        _layers_rules(plan.layers, model, patterns, line_of),
        _expected_rules(plan.expected),
        _mapping_rules(plan.measured, ("measured",)),
        _mapping_rules(plan.made, ("made",)),
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
            rule = "a letter, then up to 63 letters, digits, _ . - (and not full or ring)"
            yield path, f"pattern name {show(name)}: give {rule}"
        if type(pattern) in kinds().values():
            yield from _field_rules(pattern, type(pattern), path)
        elif pattern is not BAD:
            yield path, f"{dotted(path)} is {show(pattern)}: give one of {', '.join(kinds())}"


def _field_rules(value: Any, cls: type, path: tuple) -> Iterator[Placed]:
    if type(value) is not cls:
        yield path, f"{dotted(path)} is {show(value)}: give a {cls.__name__}"
        return
    for each in fields(cls):
        place = (*path, key_of(each.name))
        if wrong := wrong_value(cls, each.name, getattr(value, each.name)):
            yield place, f"{dotted(place)} {wrong}"


def _skip_rules(skip: float | None) -> Iterator[Placed]:
    if skip is None or skip is BAD:
        return
    if type(skip) not in (int, float) or not (_plain_scalar(skip) and skip > 0):
        rule = "give a number of nats above 0 (BLASST's threshold is e^-skip), or leave it away"
        yield ("skip",), f"skip is {show(skip)}: {rule}"


def _layers_rules(
    layers: tuple[Layer, ...], model: ModelId | None, patterns: dict, line_of: Callable
) -> Iterator[Placed]:
    """The rules of each run of equal layers that stand on one line."""
    if type(layers) is not tuple:
        yield ("layers",), f"layers is {show(layers)}: give a tuple of Layer"
        return
    if model and model.layers not in (len(layers), BAD):
        yield ("layers",), f"{len(layers)} layers: the model has {model.layers}, give each once"
    before = None  # the last layer that chooses pages
    runs = groupby(enumerate(layers), key=lambda pair: (line_of("layers", pair[0]), pair[1]))
    for (_, layer), run in runs:
        numbers = [number for number, _ in run]
        for path, text in _layer_rules(layer, model, patterns):
            yield ("layers", numbers[0], *path), f"layer {span(numbers)}: {text}"
        chooses = any(not _reuses(patterns[word]) for _, word in _selected(layer, patterns))
        inside = [(numbers[0], layer)] if chooses and len(numbers) > 1 else []  # of the run
        for source in (before, *inside):
            for text in _reuse_rules(layer, source, patterns):
                yield ("layers", numbers[0], "decode"), f"layer {span(numbers)}: {text}"
        before = (numbers[-1], layer) if chooses else before


def _layer_rules(layer: Layer, model: ModelId | None, patterns: dict) -> Iterator[Placed]:
    if layer is BAD:
        return
    if type(layer) is not Layer:
        yield (), f"it is {show(layer)}: give a Layer"
        return
    sound = True
    for part in TAKES:
        words = getattr(layer, part)
        sound = sound and words is not BAD
        for text in _word_rules(part, words, model, patterns):
            sound = False
            yield (part,), text
    if sound and model and BAD not in (model.q_heads, model.kv_heads):
        yield from _ring_rules(layer, patterns)


def _word_rules(
    part: str, words: tuple[str, ...], model: ModelId | None, patterns: dict
) -> Iterator[str]:
    """What is wrong with the words of one part of a layer."""
    if words is BAD:
        return
    if type(words) is not tuple or any(type(word) is not str for word in words):
        yield f"{part} is {show(words)}: give a tuple of words"
        return
    heads = "q_heads" if part == "prefill" else "kv_heads"
    count = getattr(model, heads, BAD)
    if count not in (len(words), BAD):
        yield f"{part} has {len(words)} words: give {count}, one a head ({heads})"
    takes = {
        "prefill": tuple(PATTERNS.values()),
        "cache": (Streaming,),
        "decode": tuple(SELECTORS.values()),
    }
    for word in dict.fromkeys(words):
        pattern = patterns.get(word)
        if word in BUILT_IN[part] or pattern is BAD or isinstance(pattern, takes[part]):
            continue
        if word in patterns or word in BUILT_IN["decode"]:
            kind = f", a {pattern.kind}" if hasattr(pattern, "kind") else ""
            yield f"{part} can't be {word}{kind}: give {TAKES[part]}"
        else:
            hint = nearest(word, [*BUILT_IN[part], *patterns])
            yield f"{part} says {show(word)}, which is not under patterns: {hint}"


def _ring_rules(layer: Layer, patterns: dict) -> Iterator[Placed]:
    """A ring drops keys for good, so no head that reads it may ask for more than it holds."""
    group = len(layer.prefill) // len(layer.cache)
    for head, (cache, decode) in enumerate(zip(layer.cache, layer.decode, strict=True)):
        if (cache == "full") == (decode == "ring"):
            text = "decode is ring where the cache is streaming, and only there"
            yield ("decode",), f"kv head {head} has cache {cache} and decode {decode}: {text}"
        ring = None if cache == "full" else patterns[cache]
        if ring is None or ring is BAD:
            continue
        first = head * group
        readers = list(enumerate(layer.prefill))[first : first + group]
        if loose := [f"{q} ({word})" for q, word in readers if not _held(patterns.get(word), ring)]:
            yield (
                ("cache",),
                f"kv head {head} caches only {cache}, its q heads {', '.join(loose)} read more: "
                f"give them streaming patterns no longer than {cache}, or a full cache",
            )


def _reuse_rules(layer: Any, before: Any, patterns: dict) -> Iterator[str]:
    """Heads read again what one selector of `before`, (number, layer), chose for them."""
    reused = [head for head, word in _selected(layer, patterns) if _reuses(patterns[word])]
    if not reused:
        return
    if before is None:
        yield "decode reuses pages and no layer before it chooses any: give one a quest"
        return
    number, chooser = before
    chosen = {h: w for h, w in _selected(chooser, patterns) if not _reuses(patterns[w])}
    if len(names := dict.fromkeys(chosen.values())) > 1:
        yield (
            f"decode reuses pages of layer {number}, where {' and '.join(names)} choose: "
            "give that layer one selector"
        )
    if missing := [str(head) for head in reused if head not in chosen]:
        yield (
            f"kv heads {', '.join(missing)} reuse pages of layer {number}, the last before it that "
            "chooses any, which chooses none for them: give them its selector there, or another "
            "word here"
        )


def _selected(layer: Any, patterns: dict) -> list[tuple[int, str]]:
    """The kv heads of a layer that read chosen pages, and their words."""
    words, known = getattr(layer, "decode", BAD), tuple(SELECTORS.values())
    words = words if type(words) is tuple else ()
    return [
        (head, word)
        for head, word in enumerate(words)
        if type(word) is str
        and (patterns.get(word) is BAD or isinstance(patterns.get(word), known))
    ]


def _reuses(selector: Any) -> bool:
    return isinstance(selector, Reuse)


def _held(pattern: Any, ring: Streaming) -> bool:
    """Whether every key that `pattern` reads is still in `ring`."""
    return (pattern is BAD) or (
        isinstance(pattern, Streaming)
        and pattern.sink <= ring.sink
        and pattern.recent <= ring.recent
        and pattern.recent_per_token <= ring.recent_per_token
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


# --- shared with the reader


def kinds() -> dict[str, type]:
    """Every pattern and selector that a plan may name."""
    return {**PATTERNS, **SELECTORS}


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Type of each field of a dataclass."""
    types = typing.get_type_hints(cls)
    return {each.name: types[each.name] for each in fields(cls)}


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
    if hint is str and not (type(value) is str and value and _plain_scalar(value)):
        return f"is {show(value)}: give text"
    return None


def parameters(pattern: Any) -> dict[str, Any]:
    """A pattern or selector as plain data, `kind` first; float fields are floats, given 1 too."""
    types = hints(type(pattern))
    values = {name: getattr(pattern, name) for name in types}
    floats = {name: float(value) for name, value in values.items() if types[name] is float}
    return {"kind": pattern.kind, **values, **floats}


def key_of(name: str) -> str:
    """The plan's key for a field: `class` can't be a Python name."""
    return "class" if name == "class_name" else name


def span(numbers: list[int]) -> str:
    """Layers that follow one another, as a plan writes them: `3` or `3-7`."""
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def dotted(path: tuple) -> str:
    return ".".join(str(key)[:64] for key in path)


def show(value: Any) -> str:
    """A value for an error message: short, whatever it is."""
    if type(value) is int and abs(value) >= 2**63:
        return "a number past 64 bits"
    if value is None or isinstance(value, str | int | float):
        return SHORT.repr(value)
    return f"a {type(value).__name__}"


def nearest(word: Any, known: Iterable[str]) -> str:
    """Advice for a word that is not among the known ones."""
    known = [str(each)[:64] for each in islice(known, 200)]
    close = difflib.get_close_matches(str(word)[:64], known, 1)
    return f"did you mean {close[0]}?" if close else f"give one of {', '.join(known[:20])}"
