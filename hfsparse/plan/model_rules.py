"""The rules for the layers of a plan beside those of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hfsparse.lists.packed import said
from hfsparse.models.layers import LayerShape
from hfsparse.plan.parts import Layer, ModelId, Placed
from hfsparse.plan.shared_keys import reader_rules
from hfsparse.plan.words import runs, span


def model_rules(
    layers: tuple[Layer, ...],
    model: ModelId,
    patterns: dict[str, Any],
    shapes: Sequence[LayerShape],
    line_of: Callable[..., int | None],
) -> Iterator[Placed]:
    """What a plan asks of layers of these shapes that they can't do, said once for layers that
    follow one another on one line of a file. The plan is of this model, and breaks no other rule.
    """
    wrong: dict[tuple, list[int]] = {}
    for index in range(len(layers)):
        for part, text in _layer_rules(layers, model, patterns, shapes, index):
            wrong.setdefault((line_of("layers", index, part), part, text), []).append(index)
    for (_, part, text), alike in wrong.items():
        for numbers in runs(alike):
            yield ("layers", numbers[0], part), f"layer {span(numbers)} {text}"


def _layer_rules(
    layers: tuple[Layer, ...],
    model: ModelId,
    patterns: dict[str, Any],
    shapes: Sequence[LayerShape],
    index: int,
) -> Iterator[tuple[str, str]]:
    """Part of a layer's words, and what is wrong with them."""
    words, shape = layers[index], shapes[index]
    full = {*words.prefill, *words.cache, *words.decode} == {"full"}
    if not full and (why := _wordless(model, shape)):
        yield "prefill", f"{why}: write full for all its heads"
        return
    windowed = shape.window is not None and not shape.chunked
    if windowed and {*words.cache, *words.decode} != {"full"}:
        yield (
            "cache",
            f"has the model's own window of {shape.window} tokens and keeps no more than that: "
            "write full for its cache and decode",
        )
        return
    if shape.producer is not None:
        yield from reader_rules(layers, patterns, index, shape.producer)
    shared = shape.producer is not None or shape.shared
    for word in dict.fromkeys(words.cache):
        for text in _kept_rules(word, patterns.get(word), shape, shared):
            yield "cache", text


def _wordless(model: ModelId, shape: LayerShape) -> str | None:
    """Why a layer can have no words but full."""
    if shape.chunked:
        return f"attends in chunks of {shape.window} tokens, as the model has them"
    if not shape.attends:
        return "has no attention"
    if shape.heads != model.heads:
        return (
            f"has a window of its own, and {shape.q_heads} q and {shape.kv_heads} kv heads, which "
            "a plan has no words for"
        )
    return None


def _kept_rules(word: str, kept: Any, shape: LayerShape, shared: bool) -> Iterator[str]:
    """A layer keeps keys in bits that they can have, and in host memory none that others read."""
    if (bits := getattr(kept, "bits", 16)) != 16 and shape.rank:
        yield (
            f"keeps latents (MLA), which serve as keys and as values, and {word} has {said(bits)}: "
            "write a word of 16 bits, such as full, for its cache"
        )
    elif odd := [d for d in (shape.head_dim, shape.value_dim) if bits == 4 and d % 2]:
        yield (
            f"has heads of {odd[0]} channels, and two numbers of 4 bits share a byte: give {word} "
            "8 bits"
        )
    if getattr(kept, "host", False) and shape.rank:
        yield (
            f"keeps latents (MLA), and {word} is in host memory, where none are read: write "
            "another word, such as full, for its cache"
        )
    elif getattr(kept, "host", False) and shared:
        yield (
            f"shares its keys with other layers, and {word} is in host memory, of which one layer "
            "reads: write another word, such as full, for its cache"
        )
