"""What kinds of runs add to the report of an arm."""

from __future__ import annotations

from statistics import mean

from .cells import Outcome
from .paired import change
from .render import Part, Table


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


SECTIONS = {"turns": ("By turn", turns)}  # by the command: heading, and what stands under it
