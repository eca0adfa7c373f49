"""The words of a layer that reads another's keys: what is kept is its producer's to say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfsparse.plan.parts import Layer
from hfsparse.plan.writer import joined
from hfsparse.selectors.reuse import Reuse


def reader_rules(
    layers: tuple[Layer, ...], patterns: dict[str, Any], index: int, producer: int
) -> Iterator[tuple[str, str]]:
    """Where layer `index` asks for what the cache of its producer hasn't: the part, and why.

    Its cache words are the producer's, so the rules for rings bind it, too. So are its decode
    words, since a selector reads the index that the producer's keeps; or it reads the pages that an
    earlier layer chose, at all heads where the producer's words choose any. Nor may the producer's
    steps evict keys, which it would do before this layer reads them.
    """
    own, kept = layers[index], layers[producer]
    if own.cache != kept.cache:
        yield (
            "cache",
            f"reads the keys of layer {producer}, whose cache is {joined(kept.cache)}: write that "
            f"for layer {index}, too",
        )
    choosing = [head for head, word in enumerate(kept.decode) if word in patterns]
    again = [head for head in choosing if isinstance(patterns.get(own.decode[head]), Reuse)]
    asked = {head: own.decode[head] for head in range(len(own.decode)) if head not in again}
    fits = again in ([], choosing) and all(word == kept.decode[h] for h, word in asked.items())
    if not fits:
        yield (
            "decode",
            f"reads the keys of layer {producer}, whose decode is {joined(kept.decode)}: write "
            f"that for layer {index}, too, or a reuse at every head where that chooses pages",
        )
    for word in dict.fromkeys(kept.cache):
        if getattr(patterns.get(word), "adds_up", False):
            yield (
                "cache",
                f"reads the keys of layer {producer}, whose steps evict some by {word}: give "
                f"layer {producer} a cache that steps leave as it is, such as snapkv",
            )
    for word in dict.fromkeys(asked.values()):
        if word in patterns and getattr(getattr(patterns[word], "budget", None), "refresh", 0):
            yield (
                "decode",
                f"reads the keys of layer {producer}, whose cache holds one choice of {word} for "
                f"steps to read again: write a reuse for layer {index}, or give {word} no refresh",
            )
