"""What kv heads keep, in other bits or elsewhere: their words become others of the same keys.

plan.with_bits(4, model)    # or the model's config
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from hfsparse.lists import PAGE
from hfsparse.lists.packed import Bits
from hfsparse.models.layers import LayerShape
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan.kept import HOT, Full
from hfsparse.plan.layer_rules import why_not_hosted
from hfsparse.plan.parts import Layer
from hfsparse.selectors import segment_of

Unit = tuple[int, int]  # layer, kv head
# Tokens of a ring: in fewer the newest two pages, held in both forms, take what 8 bits save.
SMALLEST = 5 * PAGE
FULL = "full"  # the word of a cache that keeps every key in 16 bits


def name_in(word: str, bits: Bits) -> str:
    """What plans of ours call the word in so many bits."""
    return word if bits == 16 else f"{word}-{'' if bits == 'fp8' else 'int'}{bits}"


def find_units(
    layers: Sequence[Layer], patterns: dict[str, Any], shapes: Sequence[LayerShape]
) -> Iterator[Unit]:
    """The kv heads that may keep their keys in fewer bits.

    Not those of layers with a window of their own or latents (MLA), nor those that evict, are
    rings of fewer than SMALLEST tokens, or are read by means or segments of whole keys, or by parts
    of pages that lie in host memory; layers that read another's keys do as that one.
    """
    for index, shape in enumerate(shapes):
        if not shape.free or shape.rank:
            continue
        source = layers[index if shape.producer is None else shape.producer]
        for head, (cache, decode) in enumerate(zip(source.cache, source.decode, strict=True)):
            selector = patterns.get(decode)
            kept = _kept(patterns, cache)
            whole = getattr(selector, "means", False) or segment_of(selector) > PAGE
            apart = getattr(kept, "host", False) and selector.budget.unit < PAGE
            if _is_worth(kept) and not whole and not apart:
                yield index, head


def in_bits(
    layers: Sequence[Layer], patterns: dict[str, Any], bits: Bits, units: Collection[Unit]
) -> tuple[tuple[Layer, ...], dict[str, Any]]:
    """The layers in which these kv heads keep their keys in so many bits, and the patterns of all
    words."""

    def changed(word: str) -> tuple[str, Any]:
        return _plain(patterns, word, bits), replace(_kept(patterns, word), bits=bits)

    return _reworded(layers, patterns, dict.fromkeys(units, changed))


def in_host(
    layers: Sequence[Layer], patterns: dict[str, Any], shapes: Sequence[LayerShape]
) -> tuple[tuple[Layer, ...], dict[str, Any]]:
    """The same with keys in host memory, where steps choose which of them they read."""
    changes = {}
    for at, shape in enumerate(shapes):
        if not shape.alone or shape.rank:
            continue
        for head, (cache, decode) in enumerate(
            zip(layers[at].cache, layers[at].decode, strict=True)
        ):
            selector, kept = patterns.get(decode), _kept(patterns, cache)
            if not isinstance(kept, Full) or kept.host or selector is None:
                continue
            budget = getattr(selector, "budget", None)
            kept = replace(kept, host=True, hot=max(HOT, budget.share if budget else 0))
            if next(why_not_hosted(kept, selector), None) is None:
                changes[at, head] = lambda word, kept=kept: (f"{word}-host", kept)
    return _reworded(layers, patterns, changes)


def _reworded(
    layers: Sequence[Layer],
    patterns: dict[str, Any],
    changes: dict[Unit, Callable[[str], tuple[str, Any]]],
) -> tuple[tuple[Layer, ...], dict[str, Any]]:
    """The layers in which some kv heads keep their keys otherwise, and the patterns of all words.

    changes: makes of a head's word a name, and what that is to stand for.
    """
    patterns, found = {**patterns}, []

    def word_of(word: str, unit: Unit) -> str:
        if unit not in changes:
            return word
        plain, kept = changes[unit](word)
        if kept == Full():
            return FULL
        same = (name for name, each in patterns.items() if each == kept)
        if (known := next(same, None)) is not None:
            return known
        names = (f"{plain}{'' if not i else f'-{i}'}" for i in count())
        name = next(name for name in names if name not in patterns)
        patterns[name] = kept
        return name

    for at, layer in enumerate(layers):
        cache = tuple(word_of(word, (at, head)) for head, word in enumerate(layer.cache))
        found.append(replace(layer, cache=cache))
    return tuple(found), patterns


def _is_worth(kept: Any) -> bool:
    """Whether fewer bits take fewer bytes."""
    if isinstance(kept, Streaming):
        return kept.recent_per_token > 0 or kept.sink + kept.recent >= SMALLEST
    return isinstance(kept, Full)


def _plain(patterns: dict[str, Any], word: str, bits: Bits) -> str:
    """A name for the word in so many bits."""
    own = _kept(patterns, word).bits
    return name_in(word if own == 16 else word.removesuffix(name_in("", own)), bits)


def _kept(patterns: dict[str, Any], word: str) -> Any:
    return Full() if word == FULL else patterns.get(word)
