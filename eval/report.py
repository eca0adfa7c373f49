"""`report.md`: what a plan costs and saves, every number from the result lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from .results import Settings
from .tasks import clean


@dataclass(frozen=True)
class Cell:
    """The lines of one row of the table; `dense` and `sparse` are in the same order."""

    task: str
    length: str
    dense: list[dict]
    sparse: list[dict]  # empty without a plan


def write(lines: Sequence[dict], settings: Settings, sessions: Sequence[dict], plan: str | None):
    """The report, in Markdown, of the dense lines and those of the plan with this hash."""
    grid, alone = cells(lines, plan)
    parts = [
        f"# {settings.kind}: {settings.model}",
        _facts(settings, sessions, plan),
        "## Scores\n\n" + _scores(grid),
        "## Measured\n\n" + _measured(grid),
    ]
    if alone:
        parts.append(f"{alone} samples were run in one arm only and are left out.")
    return "\n\n".join(parts) + "\n"


def cells(lines: Sequence[dict], plan: str | None) -> tuple[list[Cell], int]:
    """A cell for each task and length, one over all of them, and how many samples lack an arm."""
    dense = {line["id"]: line for line in lines if line["arm"] == "dense"}
    sparse = {line["id"]: line for line in lines if plan and line["plan"] == plan}
    ids = [i for i in dense if not plan or i in sparse]
    groups: dict[tuple[str, int], list[str]] = {}
    for i in ids:
        groups.setdefault((dense[i]["task"], dense[i]["length"]), []).append(i)
    rows = [(task, f"{length}", groups[task, length]) for task, length in sorted(groups)]
    rows.append(("all", "all", ids))
    grid = [
        Cell(task, length, [dense[i] for i in row], [sparse[i] for i in row if plan])
        for task, length, row in rows
    ]
    return grid, len(dense.keys() | sparse.keys()) - len(ids)


def difference(dense: Sequence[float], sparse: Sequence[float]) -> str:
    """Sparse minus dense in points, with its 95 % interval by a paired bootstrap over samples."""
    changes = [100 * (s - d) for d, s in zip(dense, sparse, strict=True)]
    n = len(changes)
    if not n:
        return "–"
    if not any(changes):
        unseen = 100 * (1 - 0.05 ** (1 / n))  # exact; the rule of three, 300 / n, for large n
        return f"0.0, no difference seen; up to {unseen:.0f} % of samples could differ"
    if len(set(changes)) == 1:
        return f"{changes[0]:+.1f}, all {n} alike" if n > 1 else f"{changes[0]:+.1f}, one sample"
    low, high = interval(changes)
    return f"{mean(changes):+.1f} [{low:+.1f}, {high:+.1f}]"


def interval(changes: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean: the same numbers give the same interval."""
    import numpy as np
    from scipy.stats import bootstrap

    random = np.random.default_rng(0)
    result = bootstrap((changes,), np.mean, method="percentile", random_state=random)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _facts(settings: Settings, sessions: Sequence[dict], plan: str | None) -> str:
    facts = {
        "model": f"{settings.model} (fingerprint {settings.fingerprint}), {settings.dtype}",
        "plan": plan or "none, dense only",
        "prompts": f"chat template {settings.chat}, seed {settings.seed}, batch size 1, greedy",
        "new tokens": f"at most {settings.max_new_tokens or 'as RULER: 128, vt 30'}; "
        "generation stops early once every answer was said",
        "prose haystack": f"{settings.prose} (not RULER's essays: compare only runs with this)",
    }
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    for session in sessions:
        versions = [f"{k} {v}" for k, v in session.items() if k != "machine"]
        lines.append(f"- machine: {session['machine']}; {', '.join(versions)}")
    return "\n".join(lines)


def _scores(grid: Sequence[Cell]) -> str:
    head = ["task", "length", "n", "dense", "sparse", "difference, points (95 %)", "empty d/s"]
    rows = [
        [
            cell.task,
            cell.length,
            str(len(cell.dense)),
            _mean(cell.dense, "score", 100, ".1f"),
            _mean(cell.sparse, "score", 100, ".1f"),
            difference(*([x["score"] for x in arm] for arm in (cell.dense, cell.sparse)))
            if cell.sparse
            else "–",
            f"{_empty(cell.dense)} / {_empty(cell.sparse)}" if cell.sparse else _empty(cell.dense),
        ]
        for cell in grid
    ]
    note = "Scores are percent of answers found. Empty: outputs without a character, dense/sparse."
    return f"{_table(head, rows)}\n\n{note}"


def _measured(grid: Sequence[Cell]) -> str:
    head = ["task", "length", "tokens", "pair density", "block density", "cache share"]
    head += ["decode share", "first token, s d/s", "next token, ms d/s", "whole, s d/s"]
    rows = [
        [
            cell.task,
            cell.length,
            _mean(cell.dense, "prompt_tokens", 1, ".0f"),
            *(
                _mean(cell.sparse, name, 1, ".3f")
                for name in ("pair_density", "block_density", "cache_share", "decode_share")
            ),
            _both(cell, lambda arm: _mean(arm, "first_token_seconds", 1, ".2f")),
            _both(cell, _next_token),
            _both(cell, lambda arm: _mean(arm, "seconds", 1, ".2f")),
        ]
        for cell in grid
    ]
    return _table(head, rows)


def _next_token(lines: Sequence[dict]) -> str:
    """Milliseconds a token after the first; answers differ in length, so whole times don't tell."""
    tokens = sum(line["new_tokens"] - 1 for line in lines)
    seconds = sum(line["seconds"] - line["first_token_seconds"] for line in lines)
    return f"{1000 * seconds / tokens:.0f}" if tokens else "–"


def _both(cell: Cell, show) -> str:
    return f"{show(cell.dense)} / {show(cell.sparse)}" if cell.sparse else show(cell.dense)


def _mean(lines: Sequence[dict], name: str, scale: float, form: str) -> str:
    values = [line[name] for line in lines if line[name] is not None]
    return format(scale * mean(values), form) if values else "–"


def _empty(lines: Sequence[dict]) -> str:
    return str(sum(not clean(line["output"]) for line in lines))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruled = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)
