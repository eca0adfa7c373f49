"""The head map of a plan: one row a layer, one mark a head, in the terminal or as a picture.

rich.print(text(plan))        text(plan).plain is the same without colour
png(plan, "heads.png")        three panels: prefill, cache, decode
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import chain, zip_longest
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rich.text import Text

from hfsparse import writing
from hfsparse.plan.colours import FULL, Look, hue_of, looks, share_kept
from hfsparse.plan.plan import Plan
from hfsparse.stats import FREE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RING = "ring"
PARTS = {"prefill": "q heads", "cache": "kv heads", "decode": "kv heads"}
WIDTH, LABEL, GAP = 80, 7, 2  # columns: in all, of the layer number, between parts
GREYS = "bright_black", "white"  # of full and ring in the terminal
# Inches: a head; a row and a column of the legend, and what is free round it; a picture, at least.
CELL, ROW, COLUMN, MARGIN, WIDE = 0.14, 0.17, 2.9, 0.2, 9
TITLES = {
    "prefill": "prefill:\na prompt reads",
    "cache": "cache:\nis kept",
    "decode": "decode:\na new token reads",
}
LENGTH = 4096  # tokens of the prompts by which a picture orders patterns, at most


def text(plan: Plan) -> Text:
    """Map, legend and expected numbers; the map fits 80 columns whatever the number of heads."""
    marks, model = _marks(plan), plan.model
    styles = {mark: _colour(plan, word, *GREYS) for word, mark in marks.items()}
    out = Text()
    out.append(model.class_name, "bold")
    out.append(f"  {model.layers} layers, {model.q_heads} q heads, {model.kv_heads} kv heads")
    out.append(f", head dim {model.head_dim}\n")
    out.append(f"plan hash {plan.hash()[:19]}, model fingerprint {model.fingerprint}\n")
    out.append(f"method {plan.made['method']}\n\n" if plan.made.get("method") else "\n")
    for parts in _arrange(plan):
        out.append_text(_table(plan, parts, marks, styles)).append("\n")
    return out.append_text(legend(plan))


def legend(plan: Plan) -> Text:
    """What each mark stands for and how often it's used, then the numbers that the plan states."""
    marks = _marks(plan)
    longest = max(map(len, marks))
    out = Text(f"{'':{longest + 6}}{'  '.join(PARTS)}\n")
    for word, mark in marks.items():
        out.append(f"{mark:>3} ", _colour(plan, word, *GREYS))
        shares = "  ".join(f"{_share(plan, part, word):>{len(part)}}" for part in PARTS)
        out.append(f"{word:<{longest}}  {shares}  {_meaning(plan, word)}\n")
    for line in chain(_below(plan), _expected(plan), _verified(plan)):
        out.append(f"{line}\n")
    out.rstrip()
    return out


def png(plan: Plan, file: str | os.PathLike) -> None:
    """Draw the map as a picture; `file` is written whole or not at all.

    Hue and mark tell a word's kind, darkness the share that it keeps. In decode a ring looks as the
    streaming pattern that its cache follows.
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
        axis.set_title(TITLES[part], fontsize=8)
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
    writing.replace(file, drawn.getvalue())


# ---- the picture


def _kinds(plan: Plan) -> dict[str, list[str]]:
    """The words of each kind, `full` first."""
    kinds = {FULL: [FULL]}
    for word, pattern in plan.patterns.items():
        kinds.setdefault(pattern.kind, []).append(word)
    return kinds


def looks_of(plan: Plan) -> dict[str, Look]:
    """The look of each word but `ring`."""
    length = min(max(plan.expected, default=LENGTH), LENGTH)
    kept = {word: share_kept(pattern, length) for word, pattern in plan.patterns.items()}
    kinds = _kinds(plan).items()
    return looks({kind: {word: kept.get(word, 1.0) for word in words} for kind, words in kinds})


def _draw_part(axis: Axes, plan: Plan, part: str, looks: dict[str, Look]) -> None:
    """A part of the plan, a row a layer and a cell a head; groups of q heads stand apart."""
    rows = [getattr(layer, part) for layer in plan.layers]
    if part == "decode":
        rows = [
            [kept if word == RING else word for word, kept in zip(row, layer.cache, strict=True)]
            for row, layer in zip(rows, plan.layers, strict=True)
        ]
    colours = [[looks[word].colour for word in row] for row in rows]
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
                text = shorten(f"{word}: {_parameters(held) if held else 'every key'}", 52)
                axis.text(x + 1.4 * CELL, y, text, fontsize=7, va="center")
                y += ROW
            y += ROW / 2


# ---- the map


def _marks(plan: Plan) -> dict[str, str]:
    """A mark a word: `#` full, `o` ring, else the first free letter of the pattern's name."""
    marks = {FULL: "#"}
    for word in plan.patterns:
        choices = [*(c for c in word.upper() if c.isalnum()), *map(chr, range(33, 127)), "?"]
        marks[word] = next(c for c in choices if c not in ("o", "O", *marks.values()) or c == "?")
    if any(RING in layer.decode for layer in plan.layers):
        marks[RING] = "o"
    return marks


def _colour(plan: Plan, word: str, full: str, ring: str) -> str:
    fixed = {FULL: full, RING: ring}
    return fixed.get(word) or hue_of(plan.patterns[word].kind)


def _arrange(plan: Plan) -> list[list[str]]:
    """The parts side by side where they fit, else prefill above cache and decode, or each alone."""
    width = {part: len(_pieces(plan, part, plan.layers[0], {})[0]) for part in PARTS}
    choices = [list(PARTS)], [["prefill"], ["cache", "decode"]], [[part] for part in PARTS]
    return next(
        tables
        for tables in choices
        if all(
            LABEL + sum(max(width[p], len(p)) + GAP for p in parts) - GAP <= WIDTH
            for parts in tables
        )
    )


def _pieces(plan: Plan, part: str, layer, marks: dict[str, str]) -> list[str]:
    """A layer's marks: groups of q heads apart if there's room, in several pieces if too wide."""
    row = "".join(marks.get(word, " ") for word in getattr(layer, part))
    group = plan.model.q_heads // plan.model.kv_heads if part == "prefill" else 1
    spaced = " ".join(row[i : i + group] for i in range(0, len(row), group))
    if group > 1 and len(spaced) <= WIDTH - LABEL:
        return [spaced]
    return [row[i : i + 64] for i in range(0, len(row), 64)]


def _table(plan: Plan, parts: list[str], marks: dict[str, str], styles: dict[str, str]) -> Text:
    rows = [[_pieces(plan, part, layer, marks) for part in parts] for layer in plan.layers]
    widths = [max(len(part), len(cell[0])) for part, cell in zip(parts, rows[0], strict=True)]
    heads = [part.ljust(width) for part, width in zip(parts, widths, strict=True)]
    out = Text("layer".ljust(LABEL) + (" " * GAP).join(heads).rstrip() + "\n")
    for number, row in enumerate(rows):
        label = f"{number:>{LABEL - GAP}}".ljust(LABEL)
        for pieces in zip_longest(*row, fillvalue=""):
            out.append(label)
            cells = [piece.ljust(width) for piece, width in zip(pieces, widths, strict=True)]
            for mark in (" " * GAP).join(cells).rstrip():
                out.append(mark, styles.get(mark))
            out.append("\n")
            label = " " * LABEL
    return out


# ---- the legend


def _meaning(plan: Plan, word: str) -> str:
    """What a word stands for: every key, a ring's, or its pattern's kind and parameters."""
    if word in plan.patterns:
        return f"{plan.patterns[word].kind}: {_parameters(plan.patterns[word])}"
    return {FULL: "every key", RING: "the keys its ring cache holds"}[word]


def _parameters(pattern: Any) -> str:
    """A pattern's parameters, less what is off by default."""
    shown = {f.name: getattr(pattern, f.name) for f in fields(pattern)}
    off = [f.name for f in fields(pattern) if not shown[f.name] and not f.default]
    told = [f"{name} {_value(value)}" for name, value in shown.items() if name not in off]
    return ", ".join(told) or "pages chosen by the last layer before that chooses"


def _value(value: Any) -> str:
    """A parameter as a legend shows it: numbers short, all else as it is."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _share(plan: Plan, part: str, word: str) -> str:
    """Percent of the heads that follow a word."""
    heads = [head for layer in plan.layers for head in getattr(layer, part)]
    percent = 100 * heads.count(word) / len(heads)
    return "-" if not percent else "<1%" if percent < 0.5 else f"{percent:.0f}%"


def _below(plan: Plan) -> Iterator[str]:
    limits = [f"{part} {limit} tokens" for part, limit in asdict(plan.below).items() if limit]
    if limits:
        yield f"\nfull below: {', '.join(limits)}"
    if plan.skip is not None:
        yield f"\nprompts: tiles {plan.skip:g} nats below the running maximum are skipped"


def _expected(plan: Plan) -> Iterator[str]:
    """The numbers stated by the plan, a row a length; those of its free part in a row below."""
    rows: list[tuple[int | str, dict[str, float]]] = []
    for length, numbers in sorted(plan.expected.items()):
        free = {n.removesuffix("_free"): x for n, x in numbers.items() if n.endswith("_free")}
        rows.append((length, {n: x for n, x in numbers.items() if not n.endswith("_free")}))
        rows += [("free", free)] if free else []
    names = list(dict.fromkeys(chain.from_iterable(numbers for _, numbers in rows)))
    if names:
        yield "\nexpected at" + "".join(f"  {name}" for name in names)
    for label, numbers in rows:
        cells = (f"{numbers[name]:.3f}" if name in numbers else "-" for name in names)
        columns = (f"  {cell:>{len(name)}}" for cell, name in zip(cells, names, strict=True))
        yield f"{label:>11}" + "".join(columns)
    if any(label == "free" for label, _ in rows):
        yield f"free: {FREE}, which a plan may change; budgets are shares of it"


def _verified(plan: Plan) -> Iterator[str]:
    """What the profiler's trials found, if it ran any."""
    found = plan.verified
    if "told" in found:
        yield f"\nverified: {found['told']}"
        given, wider = found.get("given_back"), found.get("budgets")
        if given and isinstance(given, list):
            yield f"for that, kv heads given back: {len(given)}"
        if wider and isinstance(wider, dict):
            told = ", ".join(f"{name} {share}" for name, share in wider.items())
            yield f"for that, budgets widened to: {told}"
