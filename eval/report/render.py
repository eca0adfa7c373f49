"""A report's parts as Markdown, and as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 2rem auto;
  padding: 0 1rem; max-width: 90rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #888; } td.words, th.words { text-align: left; }
td.long { white-space: normal; min-width: 14rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; } p.note { color: #555; max-width: 50rem; }
svg { max-width: 100%; height: auto; }
"""
ALONE = "No arm was run beside the dense model."
LONG = 32  # characters of a cell that may take more than one line


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Bullets:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # columns from the left that hold words, not numbers


@dataclass(frozen=True)
class Picture:
    """Of the page only."""

    figure: object  # of matplotlib
    told: str  # what it shows


Part = str | Heading | Bullets | Table | Picture


def markdown(parts: Sequence[Part]) -> str:
    return "\n\n".join(text for part in parts if (text := _markdown(part))) + "\n"


def page(parts: Sequence[Part]) -> str:
    title = next(part.text for part in parts if isinstance(part, Heading))
    body = "\n".join(map(_html, parts))
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return f"{'#' * part.level} {part.text}"
    if isinstance(part, Bullets):
        return "\n".join(f"- {line}" for line in part.lines)
    if isinstance(part, Table):
        ruled = [part.head, ["---"] * len(part.head), *part.rows]
        return "\n".join(f"| {' | '.join(_cell(c) for c in row)} |" for row in ruled)
    return part if isinstance(part, str) else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h{part.level}>{escape(part.text)}</h{part.level}>"
    if isinstance(part, Bullets):
        return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in part.lines)}</ul>"
    if isinstance(part, Table):
        head = _row("th", part.head, part.words)
        rows = "\n".join(_row("td", row, part.words) for row in part.rows)
        return f"<table><thead>{head}</thead>\n<tbody>{rows}</tbody></table>"
    if isinstance(part, Picture):
        return f'<figure role="img" aria-label="{escape(part.told)}">{_svg(part.figure)}</figure>'
    return f'<p class="note">{escape(part)}</p>'


def _row(kind: str, cells: Sequence[str], words: int) -> str:
    def marked(at: int, cell: str) -> str:
        marks = ["words"] * (at < words) + ["long"] * (len(cell) > LONG)
        named = f' class="{" ".join(marks)}"' if marks else ""
        return f"<{kind}{named}>{escape(cell)}</{kind}>"

    return f"<tr>{''.join(marked(at, cell) for at, cell in enumerate(cells))}</tr>"


def _svg(figure) -> str:
    """The figure's <svg> element; the same figure gives the same text."""
    import matplotlib

    out = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "hfsparse", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
