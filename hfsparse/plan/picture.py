"""The head map of a plan as a picture: three panels, prefill, cache and decode, above a legend.

png(plan, "heads.png")
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from textwrap import shorten
from typing import TYPE_CHECKING

from hfsparse.plan.colours import FULL, KEPT, RING, Look, looks, share_kept
from hfsparse.plan.parts import describe
from hfsparse.plan.plan import Plan
from hfsparse.reading import local
from hfsparse.writing import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches: a head; a row and a column of the legend, and what is free round it; a picture, at least.
CELL, ROW, COLUMN, MARGIN, WIDE = 0.14, 0.17, 2.9, 0.2, 9
PARTS = {"prefill": "q heads", "cache": "kv heads", "decode": "kv heads"}
READS = {"prefill": "a prompt reads", "cache": "is kept", "decode": "a new token reads"}
LENGTH = 4096  # tokens of the prompts by which a picture orders patterns, at most


def png(plan: Plan, file: str | os.PathLike) -> None:
    """Draw the map as a picture; `file` is written whole or not at all.

    Hue and mark tell a word's kind, darkness the share that it keeps. In decode a cache that drops
    keys looks as the pattern or eviction that it follows.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    heads = [len(getattr(plan.layers[0], part)) for part in PARTS]
    shown = [max(n, 9) for n in heads]
    width, height = max(2 + CELL * sum(shown), WIDE), 1.1 + CELL * len(plan.layers)
    columns = _columns(_kinds(plan), int((width - MARGIN) // COLUMN))
    below = MARGIN + ROW * max(sum(len(words) + 1.5 for words in each.values()) for each in columns)
    figure = Figure(figsize=(width, height + below), layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=[height, below])
    axes = top.subplots(1, len(PARTS), sharey=True, width_ratios=shown)
    looks = looks_of(plan)
    for axis, (part, unit) in zip(axes, PARTS.items(), strict=True):
        _draw_part(axis, plan, part, looks)
        axis.set_title(f"{part}:\n{READS[part]}", fontsize=8)
        axis.set_xlabel(unit, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("layer", fontsize=8)
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    top.suptitle(f"{plan.model.class_name}: the darker, the more is kept", fontsize=10)
    axis = bottom.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(below, 0))
    axis.set_axis_off()
    _draw_legend(axis, plan, columns, looks)
    write_png(figure, file)


def write_png(figure: Figure, file: str | os.PathLike) -> None:
    """Save a figure whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_whole(os.path.realpath(local(file)), drawn.getvalue())


def _kinds(plan: Plan) -> dict[str, list[str]]:
    """The words of each kind, `full` first."""
    kinds = {FULL: [FULL]}
    for word, pattern in plan.patterns.items():
        kinds.setdefault(pattern.kind, []).append(word)
    return kinds


def looks_of(plan: Plan) -> dict[str, Look]:
    """The look of each word but `ring` and `kept`."""
    length = min(max(plan.expected, default=LENGTH), LENGTH)
    kept = {word: share_kept(pattern, length) for word, pattern in plan.patterns.items()}
    kinds = _kinds(plan).items()
    return looks({kind: {word: kept.get(word, 1.0) for word in words} for kind, words in kinds})


def _draw_part(axis: Axes, plan: Plan, part: str, looks: dict[str, Look]) -> None:
    """A part of the plan, a row a layer and a cell a head; groups of q heads stand apart."""
    rows = [getattr(layer, part) for layer in plan.layers]
    if part == "decode":
        rows = [
            [
                kept if word in (RING, KEPT) else word
                for word, kept in zip(row, layer.cache, strict=True)
            ]
            for row, layer in zip(rows, plan.layers, strict=True)
        ]
    blank = plan.without_attention
    colours = [
        [(1, 1, 1) if y in blank else looks[word].colour for word in row]
        for y, row in enumerate(rows)
    ]
    axis.imshow(colours, aspect="auto", interpolation="nearest")
    for word in dict.fromkeys(chain.from_iterable(rows)):
        y, x = zip(*_places(rows, word), strict=True)
        _draw_mark(axis, x, y, looks[word])
    group = plan.model.q_heads // plan.model.kv_heads if part == "prefill" else 1
    for x in range(group, len(rows[0]), group):
        axis.axvline(x - 0.5, color="white", linewidth=1)


def _places(rows: Sequence[Sequence[str]], word: str) -> Iterator[tuple[int, int]]:
    """Row and column of each cell that holds a word."""
    return ((y, x) for y, row in enumerate(rows) for x, each in enumerate(row) if each == word)


def _draw_mark(axis: Axes, x: Sequence[float], y: Sequence[float], look: Look) -> None:
    if look.mark is not None:
        axis.scatter(x, y, s=12, marker=look.mark, c=look.ink, linewidths=1)


def _columns(kinds: dict[str, list[str]], most: int) -> list[dict[str, list[str]]]:
    """The legend's columns, at most so many: whole kinds in their order, as low as can be."""
    tall = max(map(len, kinds.values()))
    while True:
        columns: list[dict[str, list[str]]] = [{}]
        for kind, words in kinds.items():
            if sum(len(each) + 1.5 for each in columns[-1].values()) + len(words) > tall:
                columns.append({})
            columns[-1][kind] = words
        if len(columns) <= most:
            return columns
        tall += 1


def _draw_legend(
    axis: Axes, plan: Plan, columns: list[dict[str, list[str]]], looks: dict[str, Look]
) -> None:
    """The kinds, and below each its words, dark to light; in inches from the upper left."""
    from matplotlib.patches import Rectangle

    for number, kinds in enumerate(columns):
        x, y = MARGIN + number * COLUMN, ROW / 2
        for kind, words in kinds.items():
            axis.text(x, y, kind, weight="bold", fontsize=8, va="center")
            y += ROW
            for word in sorted(words, key=lambda word: looks[word].lightness):
                axis.add_patch(Rectangle((x, y - CELL / 2), CELL, CELL, color=looks[word].colour))
                _draw_mark(axis, [x + CELL / 2], [y], looks[word])
                held = plan.patterns.get(word)
                text = shorten(f"{word}: {describe(held) if held else 'every key'}", 52)
                axis.text(x + 1.4 * CELL, y, text, fontsize=7, va="center")
                y += ROW
            y += ROW / 2
