"""What some commands add to the report of an arm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, median

from hfsparse_eval.report.pairs import Outcome
from hfsparse_eval.report.render import ALONE, Part, Table
from hfsparse_eval.report.statistics import change

BINS = (0, 16, 64, 256, 1024, 4096)  # positions in the answer, tokens
LONGEST = 160  # characters of an answer in a table


def agreement(dense: Sequence[int], sparse: Sequence[int]) -> list[bool]:
    """By position of the longer answer: whether both say the same token there."""
    longer = max(len(dense), len(sparse))
    return [dense[i : i + 1] == sparse[i : i + 1] for i in range(longer)]


def first_difference(same: Sequence[bool]) -> int | None:
    return same.index(False) if False in same else None


def by_position(outcome: Outcome) -> Part:
    """Where answers first differ from the dense ones, and the share of equal tokens by position."""
    if not any(cell.sparse for cell in outcome.cells):
        return ALONE
    spans = list(pairwise(BINS))
    rows = []
    for cell in outcome.cells:
        pairs = zip(cell.dense, cell.sparse, strict=True)
        same = [agreement(d["output_ids"], s["output_ids"]) for d, s in pairs]
        firsts = [at for one in same if (at := first_difference(one)) is not None]
        row = [cell.task, cell.length, f"{len(same) - len(firsts)} of {len(same)}"]
        row.append(f"{median(firsts):g}" if firsts else "–")
        for low, high in spans:
            seen = [equal for one in same for equal in one[low:high]]
            row.append(f"{100 * mean(seen):.0f}" if seen else "–")
        rows.append(row)
    shares = [f"{low} to {high - 1}, %" for low, high in spans]
    return Table(["task", "length", "whole answers equal", "first difference", *shares], rows)


def by_turn(outcome: Outcome) -> Part:
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


def list_flipped(outcome: Outcome) -> Part:
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


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"
