"""The rules for the words of each layer and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from hfsparse.evictions import EVICTIONS
from hfsparse.lists import PAGE
from hfsparse.patterns import PATTERNS
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan.kept import Full
from hfsparse.plan.parts import BAD, Layer, ModelId, Placed
from hfsparse.plan.words import nearest, show, span
from hfsparse.selectors import SELECTORS, segment_of
from hfsparse.selectors.reuse import Reuse

DROPPED = "ring", "kept"  # a step reads what is held, where the cache drops keys
BUILT_IN = {"prefill": ("full",), "cache": ("full",), "decode": ("full", *DROPPED)}
TAKES = {
    "prefill": "full or the name of a prefill pattern",
    "cache": "full or the name of a streaming pattern, an eviction or a full of another kind",
    "decode": "full, ring, kept or the name of a selector",
}


def layers_rules(
    layers: tuple[Layer, ...], model: ModelId | None, patterns: dict, line_of: Callable
) -> Iterator[Placed]:
    """What is wrong with the layers, said once for equal layers on one line of a file."""
    if type(layers) is not tuple:
        yield ("layers",), f"layers is {show(layers)}: give a tuple of Layer"
        return
    if model and model.layers not in (len(layers), BAD):
        yield ("layers",), f"{len(layers)} layers: the model has {model.layers}, give each once"
    before = None  # number and words of the last layer that chooses pages
    runs = groupby(enumerate(layers), key=lambda pair: (line_of("layers", pair[0]), pair[1]))
    for (_, layer), run in runs:
        numbers = [number for number, _ in run]
        for path, text in _layer_rules(layer, model, patterns):
            yield ("layers", numbers[0], *path), f"layer {span(numbers)}: {text}"
        chooses = any(not _reuses(patterns[word]) for _, word in _find_selecting(layer, patterns))
        # In a run of layers that choose, each but the first reuses what the one before it chose.
        inside = [(numbers[0], layer)] if chooses and len(numbers) > 1 else []
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
        yield from _bits_rules(layer, patterns)
        yield from _host_rules(layer, patterns)


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
        yield (
            f"{part} has {len(words)} words: give {count}, one a head (the model line's {heads}, "
            "in every layer)"
        )
    takes = {
        "prefill": tuple(PATTERNS.values()),
        "cache": (Streaming, *EVICTIONS.values(), Full),
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
    for head, cache, kept, decode in _kv_heads(layer, patterns):
        if _reads(kept) not in (decode if decode in DROPPED else "full", BAD):
            text = "decode is ring where the cache is streaming, kept where it evicts, nowhere else"
            yield ("decode",), f"kv head {head} has cache {cache} and decode {decode}: {text}"
        if not isinstance(kept, Streaming):
            continue
        first = head * group
        readers = list(enumerate(layer.prefill))[first : first + group]
        if loose := [f"{q} ({word})" for q, word in readers if not _fits(patterns.get(word), kept)]:
            yield (
                ("cache",),
                f"kv head {head} caches only {cache}, its q heads {', '.join(loose)} read more: "
                f"give them streaming patterns no longer than {cache}, or a full cache",
            )


def _bits_rules(layer: Layer, patterns: dict) -> Iterator[Placed]:
    """A cache in fewer bits has no whole keys for an index to be made of again."""
    for head, cache, kept, decode in _kv_heads(layer, patterns):
        if getattr(kept, "bits", 16) == 16:
            continue
        selector = patterns.get(decode)
        given = f"kv head {head} has cache {cache}, in fewer bits, and decode {decode}"
        if getattr(selector, "means", False):
            yield ("decode",), f"{given}, with means of whole keys: leave out one of the two"
        if segment_of(selector) > PAGE:
            yield ("decode",), f"{given}, which clusters whole keys: give a segment of {PAGE}"


def _host_rules(layer: Layer, patterns: dict) -> Iterator[Placed]:
    for head, cache, kept, decode in _kv_heads(layer, patterns):
        if getattr(kept, "host", False):
            for text in why_not_hosted(kept, patterns.get(decode)):
                given = f"kv head {head} has cache {cache}, in host memory, and decode {decode}"
                yield ("decode",), f"{given}, {text}"


def _kv_heads(layer: Layer, patterns: dict) -> Iterator[tuple[int, str, Any, str]]:
    """Of each kv head its number, what it keeps (the word, and what that stands for; None: all)
    and the word by which it is read."""
    for head, (cache, decode) in enumerate(zip(layer.cache, layer.decode, strict=True)):
        yield head, cache, None if cache == "full" else patterns[cache], decode


def why_not_hosted(kept: Full, selector: Any) -> Iterator[str]:
    """What is wrong with steps that read keys in host memory so: of these pages they read few,
    which the GPU has room for."""
    if selector is BAD:
        return
    if selector is None:
        yield "which reads every page at each step: give a selector, or a cache of full"
        return
    if _reuses(selector):
        yield "which reads what another layer chose: give another selector, or a cache of full"
        return
    if kept.bits != 16 and selector.budget.unit != PAGE:
        yield (
            f"which reads units of {selector.budget.unit} tokens, where pages in fewer bits come "
            f"whole: give a unit of {PAGE}, or bits: 16"
        )
    if selector.budget.means:
        yield "with means of whole rows: leave out one of the two"
    if segment_of(selector) > PAGE:
        yield f"which clusters keys anew that the host holds: give a segment of {PAGE}"
    if (share := selector.budget.share) > kept.hot:
        yield (
            f"which reads a share of {share:g} where the GPU keeps {kept.hot:g}: give hot "
            f"{share:g} or more, or a smaller share"
        )


def _reuse_rules(layer: Any, before: Any, patterns: dict) -> Iterator[str]:
    """Heads read again what one selector of `before`, (number, layer), chose for them."""
    reused = [head for head, word in _find_selecting(layer, patterns) if _reuses(patterns[word])]
    if not reused:
        return
    if before is None:
        yield "decode reuses pages and no layer before it chooses any: give one a selector"
        return
    number, chooser = before
    chosen = {h: w for h, w in _find_selecting(chooser, patterns) if not _reuses(patterns[w])}
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


def _find_selecting(layer: Any, patterns: dict) -> list[tuple[int, str]]:
    """The kv heads of a layer whose words are selectors, and these words."""
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


def _reads(kept: Any) -> Any:
    """The word by which a step reads a cache; of a full one it stands for selectors, too."""
    if kept is BAD:
        return BAD
    if kept is None or isinstance(kept, Full):
        return "full"
    return "ring" if isinstance(kept, Streaming) else "kept"


def _fits(pattern: Any, ring: Streaming) -> bool:
    """Whether every key that `pattern` reads is still in `ring`."""
    return (pattern is BAD) or (
        isinstance(pattern, Streaming)
        and pattern.sink <= ring.sink
        and pattern.recent <= ring.recent
        and pattern.recent_per_token <= ring.recent_per_token
    )
