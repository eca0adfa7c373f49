"""Result lines by task and length, each arm's beside the dense ones of the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from hfsparse_eval.tasks import own_questions

MIN_SCORE = 0.7  # a task that the dense model does worse is set apart
DENSE = {"arm": "dense", "plan": None, "title": "dense"}


@dataclass(frozen=True)
class Cell:
    """The lines of one row of the table; `dense` and `sparse` are in the same order."""

    task: str
    length: str
    dense: list[dict]
    sparse: list[dict]  # empty without an arm

    @property
    def counted(self) -> bool:
        """Of the user's own questions all count: their lengths are no tasks."""
        return (
            self.task == own_questions.NAME
            or mean(line["score"] for line in self.dense) >= MIN_SCORE
        )

    @property
    def scores(self) -> tuple[list[float], list[float]]:
        return tuple([line["score"] for line in arm] for arm in (self.dense, self.sparse))


@dataclass(frozen=True)
class Outcome:
    """An arm, its cells by task and length, and one over those that the dense model can do."""

    arm: Mapping  # as `Arm.facts` tells it
    cells: list[Cell]

    @property
    def counted(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.counted]

    @property
    def whole(self) -> Cell:
        return joined(self.counted)

    def at(self, length: str) -> Cell:
        return joined([cell for cell in self.counted if cell.length == length])

    @property
    def lengths(self) -> list[str]:
        return sorted({cell.length for cell in self.counted}, key=int)


def cells(lines: Sequence[dict], arm: Mapping | None = None) -> list[Cell]:
    """A cell for each task and length: of an arm, the samples that the dense model also ran."""
    groups: dict[tuple[str, int], list] = {}
    for pair in pairs(lines, arm or DENSE):
        groups.setdefault((pair[0]["task"], pair[0]["length"]), []).append(pair)
    return [
        Cell(task, f"{length}", [dense for dense, _ in row], [own for _, own in row if arm])
        for (task, length), row in sorted(groups.items())
    ]


def list_outcomes(lines: Sequence[dict], arms: Sequence[Mapping]) -> list[Outcome]:
    """Those of these arms that have samples."""
    good = [line for line in lines if "failed" not in line]
    return [Outcome(arm, found) for arm in arms if (found := cells(good, arm))]


def pairs(lines: Sequence[dict], arm: Mapping) -> list[tuple[dict, dict]]:
    """Dense lines and the arm's of the same samples, under one version of transformers."""
    dense, own = (
        {(line["id"], line.get("transformers")): line for line in lines if belongs(line, side)}
        for side in (DENSE, arm)
    )
    return [(line, own[key]) for key, line in dense.items() if key in own]


def joined(cells: Sequence[Cell]) -> Cell:
    lines = ([line for cell in cells for line in getattr(cell, a)] for a in ("dense", "sparse"))
    return Cell("all", "all", *lines)


def average(lines: Sequence[dict], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return mean(values) if values else None


def belongs(line: Mapping, arm: Mapping) -> bool:
    return (line["arm"], line["plan"]) == (arm["arm"], arm["plan"])
