"""The head map of a plan: one row a layer, one mark a head, in the terminal or as a picture.

rich.print(text(plan))        text(plan).plain is the same without colour
png(plan, "heads.png")        three panels: prefill, cache, decode
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain, zip_longest

from rich.text import Text

from hfsparse.plan.colours import FULL, KEPT, RING, hue_of
from hfsparse.plan.parts import Layer, describe
from hfsparse.plan.picture import PARTS, png, write_png
from hfsparse.plan.plan import Plan
from hfsparse.stats import FREE

__all__ = ["legend", "png", "text", "write_png"]

WIDTH, LABEL, GAP = 80, 7, 2  # columns: in all, of the layer number, between parts
GREYS = "bright_black", "white"  # of full, and of ring and kept, in the terminal
NONE = "-"  # stands for the words of layers without attention; no pattern is called so
MARKS = {RING: "o", KEPT: "+", NONE: "."}  # of words that are no pattern's, where there are any


def text(plan: Plan) -> Text:
    """Map, legend and expected numbers; the map fits 80 columns whatever the number of heads."""
    shown, model = _shown(plan), plan.model
    marks = _marks(shown)
    styles = {mark: _colour(plan, word, *GREYS) for word, mark in marks.items()}
    out = Text()
    out.append(model.class_name, "bold")
    out.append(f"  {model.sizes}\n")
    out.append(f"plan hash {plan.hash()[:19]}, model fingerprint {model.fingerprint}\n")
    out.append(f"method {plan.made['method']}\n\n" if plan.made.get("method") else "\n")
    for parts in _arrange(plan):
        out.append_text(_table(shown, parts, marks, styles)).append("\n")
    return out.append_text(legend(plan))


def legend(plan: Plan) -> Text:
    """What each mark stands for and how often it's used, then the numbers that the plan states."""
    plan = _shown(plan)
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


# ---- the map


def _shown(plan: Plan) -> Plan:
    """The plan with NONE for every word of layers that have no attention."""
    layers = list(plan.layers)
    for index in plan.without_attention.intersection(range(len(layers))):
        layers[index] = Layer(*((NONE,) * len(getattr(layers[index], part)) for part in PARTS))
    return replace(plan, layers=tuple(layers))


def _marks(plan: Plan) -> dict[str, str]:
    """A mark a word: `#` full, `o` ring, `+` kept, else the first free letter of its name."""
    marks, taken = {FULL: "#"}, ["O", *MARKS.values()]
    for word in plan.patterns:
        choices = [*(c for c in word.upper() if c.isalnum()), *map(chr, range(33, 127)), "?"]
        marks[word] = next(c for c in choices if c not in (*taken, *marks.values()) or c == "?")
    used = {word for layer in plan.layers for word in (*layer.prefill, *layer.decode)}
    return marks | {word: mark for word, mark in MARKS.items() if word in used}


def _colour(plan: Plan, word: str, full: str, dropped: str) -> str:
    fixed = {FULL: full, RING: dropped, KEPT: dropped, NONE: full}
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
    """What a word stands for: every key, those that are held, or its kind and parameters."""
    if word in plan.patterns:
        return f"{plan.patterns[word].kind}: {describe(plan.patterns[word])}"
    return {
        FULL: "every key",
        RING: "the keys its ring cache holds",
        KEPT: "the keys its cache kept",
        NONE: "no attention in these layers: shares are of the others",
    }[word]


def _share(plan: Plan, part: str, word: str) -> str:
    """Percent of the heads that follow a word, where there is attention."""
    heads = [head for layer in plan.layers for head in getattr(layer, part) if head != NONE]
    percent = 100 * heads.count(word) / max(1, len(heads))
    return "-" if not percent else "<1%" if percent < 0.5 else f"{percent:.0f}%"


def _below(plan: Plan) -> Iterator[str]:
    limits = [f"{part} {limit} tokens" for part, limit in asdict(plan.below).items() if limit]
    if limits:
        yield f"\nfull below: {', '.join(limits)}"
    if plan.skip is not None:
        yield f"\nprompts: tiles {plan.skip:g} nats below the running maximum are skipped"
    if plan.extend is not None:
        yield f"\nextended by {plan.extend.kind}: {describe(plan.extend)}"


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
