"""`report.md` and `report.html`: what each arm costs and saves, from the result lines alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from hfsparse.writing import write_whole
from hfsparse_eval.report import charts, render
from hfsparse_eval.report.decided import compare, find_other, list_hopeless, look
from hfsparse_eval.report.facts import list_facts
from hfsparse_eval.report.kinds import KINDS, Kind
from hfsparse_eval.report.pairs import DENSE, MIN_SCORE, Cell, Outcome, cells, list_outcomes
from hfsparse_eval.report.render import Bullets, Heading, Part, Picture
from hfsparse_eval.report.statistics import Change, change
from hfsparse_eval.report.tables import (
    SHARES,
    effective_lengths,
    list_missing,
    measured_shares,
    score_tables,
    table_of_arms,
    table_of_measures,
)
from hfsparse_eval.report.verdict import beyond, comparison, verdict
from hfsparse_eval.run.results import Results, Settings

NOTE = (
    " Whole: percent of samples with a score of 100, as McNemar's exact test compares them. "
    "Empty: outputs without a character. d/s: dense / this arm."
)
ROUNDS = (
    " Samples were asked in rounds, until verdicts were certain: the intervals of these verdicts "
    "hold after any round, those of tables and pictures after a number of samples set beforehand."
)
MIN_SAMPLES = 50  # samples from which on a 95 % interval is about that; of 20 it is 93 %


def save(results: Results) -> list[Path]:
    """Write both reports into the results' folder."""
    written = parts(results.lines, results.settings, results.sessions, results.arms)
    paths = results.folder / "report.md", results.folder / "report.html"
    for path, text in zip(paths, (render.markdown(written), render.page(written)), strict=True):
        write_whole(path, text.encode())
    return [*paths]


def parts(lines, settings: Settings, sessions, arms: Sequence[Mapping] = ()) -> list[Part]:
    """The report: of the dense lines, and of each of these arms beside them."""
    good = [line for line in lines if "failed" not in line]
    outcomes = list_outcomes(good, arms)
    dense = Outcome(DENSE, cells(good))
    batches = sorted({line.get("batch", 1) for line in good})
    kind = KINDS[settings.kind]
    every = [Heading(f"{settings.kind}: {settings.model}", 1)]
    every.append(Bullets(list_facts(settings, kind, sessions, arms, batches)))
    if kind.page:
        return [*every, *kind.page(good, arms), *list_missing(lines, arms)]
    if outcomes:
        every += [Heading("Verdicts"), Bullets([_verdict(o, outcomes, kind) for o in outcomes])]
        every += [table_of_arms(outcomes)] if any(o.counted for o in outcomes) else []
        every += _pictures(outcomes)
    few = min((len(cell.dense) for cell in dense.cells), default=MIN_SAMPLES) < MIN_SAMPLES
    every.append(
        kind.scored
        + NOTE
        + f" Rows of fewer than {MIN_SAMPLES}: the true interval is wider." * few
        + (ROUNDS + _name_hopeless(good)) * any("until" in arm for arm in arms)
    )
    for outcome in outcomes or [dense]:
        title = outcome.arm["title"]
        every += [Heading(f"Scores: {title}"), *score_tables(outcome)]
        if kind.section:
            name, section = kind.section
            every += [Heading(f"{name}: {title}"), section(outcome)]
        every += [Heading(f"Measured: {title}"), table_of_measures(outcome.cells)]
    if settings.kind == "ruler":
        every += effective_lengths(dense, outcomes)
    return every + list_missing(lines, arms)


def _name_hopeless(lines: Sequence[dict]) -> str:
    """A sentence of what was asked no more, with the dense scores; empty where that is nothing."""
    named = [f"{x.task} {x.length} ({100 * mean(x.scores[0]):.1f})" for x in list_hopeless(lines)]
    if not named:
        return ""
    return (
        f" The dense model is certain to score below {100 * MIN_SCORE:.0f} %, so that no more was "
        f"asked, at {', '.join(named)}."
    )


def _verdict(outcome: Outcome, outcomes: Sequence[Outcome], kind: Kind) -> str:
    until = outcome.arm.get("until")

    def see(cell: Cell) -> Change | None:
        if until:
            return look(cell)
        return change(*cell.scores) if cell.dense else None

    whole = outcome.whole
    lengths = [int(length) for length in outcome.lengths]
    promise = outcome.arm.get("promise", {})
    most = until["samples"] if until else 0
    told = verdict(see(whole), measured_shares(whole), promise, lengths, most)
    if until and (other := find_other(outcome, outcomes)):
        told += f"; {comparison(compare(outcome, other), other.arm['title'], most)}"
    each = {n: see(outcome.at(n)) for n in outcome.lengths}
    worse = [n for n, alone in each.items() if alone and beyond(alone, promise)]
    if worse and len(each) > 1:
        told += f"; beyond it at {', '.join(worse)} tokens alone"
    if promise and not kind.promised:
        told += "; it was promised for retrieval trials, not for these tasks"
    return f"{outcome.arm['title']}: {told}"


def _pictures(outcomes: Sequence[Outcome]) -> list[Part]:
    dots, rows, arms = [], {}, list(dict.fromkeys(o.arm["title"] for o in outcomes))
    for outcome in outcomes:
        title = outcome.arm["title"]
        for length in outcome.lengths:
            cell = outcome.at(length)
            level = 100 * mean(cell.scores[0])
            dots.append(
                charts.Dot(title, int(length), level, change(*cell.scores), measured_shares(cell))
            )
        for cell in outcome.cells:
            seen = rows.setdefault((cell.task, int(cell.length)), {})
            seen[title] = change(*cell.scores)
    found = []
    if dots:
        told = "score by measured pair density and by share of the KV cache"
        found.append(Picture(charts.scores(dots, list(SHARES), arms), told))
    if rows:
        named = {f"{task} {length}": seen for (task, length), seen in sorted(rows.items())}
        found.append(
            Picture(charts.changes(named, arms), "change in each task, with 95 % intervals")
        )
    return found
