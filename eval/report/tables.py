"""The tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from hfsparse_eval.report.pairs import DENSE, MIN_SCORE, Cell, Outcome, average, belongs, joined
from hfsparse_eval.report.render import Heading, Part, Table
from hfsparse_eval.report.statistics import change, mcnemar
from hfsparse_eval.tasks import TASKS, is_rulers
from hfsparse_eval.tasks.scores import clean

LLAMA2_AT_4K = 85.6  # RULER's bar: the mean of Llama-2-7B-chat at 4096 tokens
SHARES = {"pair density": "pair_density", "KV share": "cache_share"}


def effective_length(means: Mapping[int, float]) -> int | None:
    """The longest length whose mean over tasks, in percent, reaches the bar; None if none does."""
    return max((length for length, mean in means.items() if mean >= LLAMA2_AT_4K), default=None)


def measured_shares(cell: Cell) -> dict[str, float | None]:
    return {name: average(cell.sparse, field) for name, field in SHARES.items()}


def table_of_arms(outcomes: Sequence[Outcome]) -> Table:
    head = ["arm", "length", "n", "dense", "arm's", "difference, points (95 %)", "McNemar p"]
    head += ["empty d/s, %", "pair density", "expected", "KV share", "expected", "KV MiB"]
    rows = []
    for outcome in outcomes:
        expected = outcome.arm.get("expected", {})
        for length in outcome.lengths:
            cell = outcome.at(length)
            said = expected.get(length, {})
            row = [outcome.arm["title"], length, *_compare(cell)[:5], _both(cell, _empty)]
            for field in SHARES.values():
                row += [_mean(cell.sparse, field, 1, ".3f")]
                row += [f"{said[field]:.3f}" if field in said else "–"]
            rows.append([*row, _mean(_of_one_sample(cell.sparse), "kv_bytes", 2**-20, ".1f")])
    return Table(head, rows)


def _of_one_sample(lines: Sequence[dict]) -> list[dict]:
    """Lines that know the cache's bytes, with those of one sample in place of the whole batch's."""
    known = (line for line in lines if line.get("kv_bytes") is not None)
    return [line | {"kv_bytes": line["kv_bytes"] / line.get("batch", 1)} for line in known]


def score_tables(outcome: Outcome) -> list[Part]:
    head = ["task", "length", "n", "dense", "arm's", "difference, points (95 %)", "McNemar p"]
    head += ["whole d/s", "empty d/s, %"]

    def table(cells: Sequence[Cell]) -> Table:
        rows = [
            [cell.task, cell.length, *_compare(cell), _both(cell, _solved), _both(cell, _empty)]
            for cell in cells
        ]
        return Table(head, rows)

    counted = outcome.counted
    apart = [cell for cell in outcome.cells if not cell.counted]
    found: list[Part] = [table([*counted, outcome.whole])] if counted else []
    if apart:
        found.append(
            f"Set apart, and not in any sum: the dense model scores below {100 * MIN_SCORE:.0f} %."
        )
        found.append(table(apart))
    return found


def _compare(cell: Cell) -> list[str]:
    """n, both scores, their difference, McNemar's p."""
    left = [str(len(cell.dense)), _mean(cell.dense, "score", 100, ".1f")]
    if not cell.sparse:
        return [*left, "–", "–", "–"]
    p = mcnemar(*([score == 1 for score in arm] for arm in cell.scores))
    told = f"{p:.3f}" if p >= 0.001 else "< 0.001"
    return [*left, _mean(cell.sparse, "score", 100, ".1f"), str(change(*cell.scores)), told]


def effective_lengths(dense: Outcome, outcomes: Sequence[Outcome]) -> list[Part]:
    """Means over RULER's tasks that were run at every length, so that lengths compare."""
    rows = [cell for cell in dense.cells if is_rulers(cell.task)]
    lengths = sorted({int(cell.length) for cell in rows})
    if len(lengths) < 2:
        return []
    ran = [{cell.task for cell in rows if cell.length == f"{length}"} for length in lengths]
    tasks = set.intersection(*ran)
    table = []
    sides = [("dense", rows, "dense"), *((o.arm["title"], o.cells, "sparse") for o in outcomes)]
    for title, found, side in sides:
        by_length = {
            length: [
                100 * mean(line["score"] for line in getattr(cell, side))
                for cell in found
                if cell.length == f"{length}" and cell.task in tasks
            ]
            for length in lengths
        }
        if any(len(scores) < len(tasks) or not scores for scores in by_length.values()):
            continue
        means = {length: mean(scores) for length, scores in by_length.items()}
        shown = [f"{means[length]:.1f}" for length in lengths]
        table.append([title, *shown, str(effective_length(means) or f"under {lengths[0]}")])
    note = (
        f"The longest length with a mean of at least {LLAMA2_AT_4K} % (Llama-2-7B-chat at 4096 "
        f"tokens). Means of {len(tasks)} tasks run at every length; RULER's are of all "
        f"{sum(task.ruler for task in TASKS.values())}, with SQuAD and HotpotQA."
    )
    head = ["arm", *map(str, lengths), "effective length"]
    return [Heading("Effective length"), Table(head, table), note]


def list_missing(lines: Sequence[dict], arms: Sequence[Mapping]) -> list[Part]:
    """Samples that some arm has and another lacks, and why, by arm and length."""
    asked = {line["id"]: line["length"] for line in lines}
    rows = []
    for arm in (DENSE, *arms):
        mine = [line for line in lines if belongs(line, arm)]
        lacking = asked.keys() - {line["id"] for line in mine if "failed" not in line}
        for length in sorted({asked[i] for i in lacking}):
            of = [i for i in asked if asked[i] == length]
            gone = [i for i in of if i in lacking]
            why = [x["failed"] for x in mine if x["id"] in gone and "failed" in x]
            told = why[-1] if why else "not run"
            rows.append([arm["title"], f"{length}", f"{len(gone)} of {len(of)}", told])
    return [Heading("Missing"), Table(["arm", "length", "samples", "why"], rows)] if rows else []


def table_of_measures(rows: Sequence[Cell]) -> Table:
    head = ["task", "length", "tokens", "pair density", "block density", "KV share"]
    head += ["decode share", "batch d/s", "first token, s d/s", "next token, ms d/s"]
    head += ["whole, s d/s"]
    names = "pair_density", "block_density", "cache_share", "decode_share"
    table = [
        [
            cell.task,
            cell.length,
            _mean(cell.dense, "prompt_tokens", 1, ".0f"),
            *(_mean(cell.sparse, name, 1, ".3f") for name in names),
            _both(cell, _batch),
            _both(cell, lambda arm: _mean(arm, "first_token_seconds", 1, ".2f")),
            _both(cell, _next_token),
            _both(cell, lambda arm: _mean(arm, "seconds", 1, ".2f")),
        ]
        for cell in [*rows, joined(rows)]
    ]
    return Table(head, table)


def _batch(lines: Sequence[dict]) -> str:
    """A batch shares its time alike among its samples: times compare between equal ones."""
    sizes = {line.get("batch", 1) for line in lines} or {"–"}
    return "–".join(f"{size}" for size in sorted({min(sizes), max(sizes)}))


def _next_token(lines: Sequence[dict]) -> str:
    """Milliseconds a token after the first; answers differ in length, so whole times don't tell.

    Those of conversations hold the reading of later questions.
    """
    lines = [line for line in lines if "turns" not in line]
    tokens = sum(line["new_tokens"] - 1 for line in lines)
    seconds = sum(line["seconds"] - line["first_token_seconds"] for line in lines)
    return f"{1000 * seconds / tokens:.0f}" if tokens else "–"


def _both(cell: Cell, show) -> str:
    return f"{show(cell.dense)} / {show(cell.sparse)}" if cell.sparse else show(cell.dense)


def _mean(lines: Sequence[dict], name: str, scale: float, form: str) -> str:
    value = average(lines, name)
    return "–" if value is None else format(scale * value, form)


def _solved(lines: Sequence[dict]) -> str:
    return f"{100 * mean(line['score'] == 1 for line in lines):.1f}" if lines else "–"


def _empty(lines: Sequence[dict]) -> str:
    return f"{100 * mean(not clean(line['output']) for line in lines):.1f}" if lines else "–"
