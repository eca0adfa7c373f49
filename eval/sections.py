"""What kinds of runs add to the report of an arm."""

from __future__ import annotations

from statistics import mean

from . import ppl, recall
from .cells import Outcome
from .decode import by_position
from .paired import change
from .render import ALONE, Part, Table


def turns(outcome: Outcome) -> Part:
    """The score of each turn."""
    rows = []
    for cell in outcome.cells:
        for turn in range(len(cell.dense[0]["turns"])):
            dense, sparse = (
                [line["turns"][turn]["score"] for line in arm] for arm in (cell.dense, cell.sparse)
            )
            shown = [f"{100 * mean(scores):.1f}" if scores else "–" for scores in (dense, sparse)]
            told = str(change(dense, sparse)) if sparse else "–"
            rows.append([cell.task, cell.length, str(turn + 1), *shown, told])
    return Table(["task", "length", "turn", "dense", "arm's", "difference, points (95 %)"], rows)


def flipped(outcome: Outcome) -> Part:
    """Every sample whose score changed, with both answers."""
    if not any(cell.sparse for cell in outcome.cells):
        return ALONE
    pairs = [pair for c in outcome.cells for pair in zip(c.dense, c.sparse, strict=True)]
    rows = [
        [dense["id"], *(f"{x['score']:.2f}" for x in pair), *(_short(x["output"]) for x in pair)]
        for pair in pairs
        if (dense := pair[0])["score"] != pair[1]["score"]
    ]
    if not rows:
        return f"No score of {len(pairs)} samples changed."
    return Table(["id", "dense", "arm's", "dense answer", "arm's answer"], rows)


def _short(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} …"


PAGES = {"ppl": ppl.page, "recall": recall.page}  # by the command: what stands in place of scores
SECTIONS = {  # by the command: heading, and what stands under it
    "decode": ("Agreement with dense", by_position),
    "custom": ("Flipped", flipped),
    "turns": ("By turn", turns),
}
