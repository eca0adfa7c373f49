"""Whether more samples are needed: what is to be decided of each arm, and what is known of it.

A plan that promises a limit is judged against it, any other arm against the first of the others.
What is known holds at any number of samples (`hfsparse.anytime`), over what every verdict is over:
the tasks that the dense model can do. A sample is a text: of several questions their mean counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hfsparse.anytime import anytime
from hfsparse.errors import UsageError
from hfsparse_eval.report.pairs import (
    DENSE,
    MIN_SCORE,
    Cell,
    Outcome,
    belongs,
    cells,
    list_outcomes,
)
from hfsparse_eval.report.statistics import Change
from hfsparse_eval.report.verdict import judge, order


def add_until(arms: Sequence[Mapping], most: int) -> list[dict]:
    """These arms, each with what is to be decided of it, `until`; UsageError if there is nothing.

    most: samples of each task at each length.
    """
    asked = []
    for arm in arms or [DENSE]:
        others = [DENSE] if "limit" in arm.get("promise", {}) else [x for x in arms if x is not arm]
        if not others:
            told = f"{arm['title']} states no limit" if arms else "no plan or arm is given"
            raise UsageError(
                f"--until decided: {told}, and there is nothing to compare with: give a plan that "
                "states its limit (hfsparse verify --write writes it), or two plans or arms"
            )
        against = {name: others[0][name] for name in ("arm", "plan")}
        asked.append({**arm, "until": {"samples": most, "against": against}})
    return asked


def list_open(lines: Sequence[Mapping], arms: Sequence[Mapping]) -> list[Mapping]:
    """Those of these arms that more samples are needed of, to judge them or others by them."""
    found = list_outcomes(lines, arms)
    done = [outcome.arm for outcome in found if decided(outcome, found)]
    left = [arm for arm in arms if arm not in done]
    needed = [arm["until"]["against"] for arm in left]
    return [arm for arm in arms if arm in left or any(belongs(arm, other) for other in needed)]


def decided(outcome: Outcome, outcomes: Sequence[Outcome]) -> bool:
    """Whether an arm keeps its promise, or differs from another arm, is certain."""
    if belongs(DENSE, outcome.arm["until"]["against"]):
        seen = look(outcome.whole)
        return bool(seen and judge(seen, 100 * outcome.arm["promise"]["limit"]))
    other = find_other(outcome, outcomes)
    seen = compare(outcome, other) if other else None
    return bool(seen and order(seen))


def find_other(outcome: Outcome, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The arm that this one is compared with; None where it has a limit, or that has no results."""
    against = outcome.arm["until"]["against"]
    return next((other for other in outcomes if belongs(other.arm, against)), None)


def look(cell: Cell) -> Change | None:
    """The change from dense, at any number of samples; None where there are no pairs."""
    return _look(zip(cell.dense, cell.sparse, strict=True))


def compare(outcome: Outcome, other: Outcome) -> Change | None:
    """The same from another arm, in the samples that both answered."""
    theirs = {_key(line): line for line in other.whole.sparse}
    return _look((theirs[_key(x)], x) for x in outcome.whole.sparse if _key(x) in theirs)


def list_hopeless(lines: Sequence[Mapping]) -> list[Cell]:
    """Tasks and lengths that the dense model is certain to score below what counts."""
    rows = cells([line for line in lines if "failed" not in line])
    return [row for row in rows if not row.counted and _most(row.dense) < MIN_SCORE]


def _most(lines: Sequence[Mapping]) -> float:
    """The highest that their mean score may be."""
    return anytime(np.array([[line["score"]] for line in lines]))[1]


def _look(pairs: Iterable[tuple[Mapping, Mapping]]) -> Change | None:
    """Second minus first, of blocks that have a sample of each task, length and depth."""
    strata: dict[str, dict[str, float]] = {}
    for before, after in pairs:
        stratum, _, index = before["id"].rpartition("-")
        strata.setdefault(stratum, {})[index] = 100 * (after["score"] - before["score"])
    whole = set.intersection(*map(set, strata.values())) if strata else ()
    if not whole:
        return None
    blocks = np.array([[one[i] for one in strata.values()] for i in sorted(whole, key=int)])
    low, high = anytime(blocks, worst=100)
    return Change(blocks.size, float(blocks.mean()), low, high, alike=False, each=len(blocks))


def _key(line: Mapping) -> tuple[str, str | None]:
    return line["id"], line.get("transformers")
