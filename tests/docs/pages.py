"""The pages that users read, and what stands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code: where it begins, what it says it is, and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:  # of a test's name
        return f"{self.page.name}-{self.line}"


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text(page))


def blocks(*languages: str, pages: list[Path] = PAGES) -> list[Block]:
    """Every block in these languages, page by page, from top to bottom."""
    return [
        Block(page, text(page)[: found.start()].count("\n") + 1, found[1], found[2])
        for page in pages
        for found in FENCE.finditer(text(page))
        if found[1] in languages
    ]


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table's rows under a heading, up to the next one of any level."""
    section = re.split(rf"^#+ {re.escape(heading)}$", prose(page), flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in cells[2:]]


def code(cell: str) -> list[str]:
    """What stands in a cell as code."""
    return re.findall(r"`([^`]+)`", cell)
