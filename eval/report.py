"""`report.md`: what a plan costs and saves, every number from the result lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from .results import Settings
from .tasks import TASKS, clean

RULERS_CAPS = "as RULER: 128, vt 30, cwe 120, fwe 50, qa 32"
LLAMA2_AT_4K = 85.6  # RULER's bar: the mean of Llama-2-7B-chat at 4096 tokens


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
    if settings.kind == "ruler" and len({cell.length for cell in grid[:-1]}) > 1:
        parts.insert(3, "## Effective length\n\n" + _effective(grid[:-1]))
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


def effective_length(means: Mapping[int, float], bar: float = LLAMA2_AT_4K) -> int | None:
    """The longest length whose mean over tasks, in percent, reaches the bar; None if none does."""
    return max((length for length, mean in means.items() if mean >= bar), default=None)


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
        "new tokens": f"at most {settings.max_new_tokens or RULERS_CAPS}; "
        "generation stops early once every answer was said",
        "prose haystack": f"{settings.prose} (not RULER's essays: compare only runs with this)",
        "questions": f"qa_1 {settings.squad or 'not run'}; qa_2 {settings.hotpotqa or 'not run'}; "
        "qa_*_invented: invented facts (not SQuAD or HotpotQA)",
    }
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    for session in sessions:
        versions = [f"{k} {v}" for k, v in session.items() if k != "machine"]
        lines.append(f"- machine: {session['machine']}; {', '.join(versions)}")
    return "\n".join(lines)


def _scores(grid: Sequence[Cell]) -> str:
    head = ["task", "length", "n", "dense", "sparse", "difference, points (95 %)"]
    head += ["whole d/s", "empty d/s"]
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
            _both(cell, _whole),
            f"{_empty(cell.dense)} / {_empty(cell.sparse)}" if cell.sparse else _empty(cell.dense),
        ]
        for cell in grid
    ]
    note = (
        "Scores are RULER's, in percent: the share of the answers found; for qa, any one found. "
        "Whole: percent of samples with all that was asked for (qa: any one). "
        "Empty: outputs without a character, dense/sparse."
    )
    return f"{_table(head, rows)}\n\n{note}"


def _effective(rows: Sequence[Cell]) -> str:
    """Means over the tasks that were run at every length, so that lengths compare."""
    lengths = sorted({int(cell.length) for cell in rows})
    ran = {length: {cell.task for cell in rows if cell.length == f"{length}"} for length in lengths}
    tasks = set.intersection(*ran.values())
    table = []
    for arm in ("dense", "sparse"):
        by_length = {
            length: [
                100 * mean(line["score"] for line in getattr(cell, arm))
                for cell in rows
                if cell.length == f"{length}" and cell.task in tasks and getattr(cell, arm)
            ]
            for length in lengths
        }
        if not all(by_length.values()):
            continue
        means = {length: mean(scores) for length, scores in by_length.items()}
        shown = [f"{means[length]:.1f}" for length in lengths]
        table.append([arm, *shown, str(effective_length(means) or f"under {lengths[0]}")])
    head = ["arm", *map(str, lengths), "effective length"]
    note = (
        f"The longest length with a mean of at least {LLAMA2_AT_4K} % (Llama-2-7B-chat at 4096 "
        f"tokens). Means of {len(tasks)} tasks run at every length; RULER's are of all "
        f"{len(TASKS)}, with SQuAD and HotpotQA."
    )
    return f"{_table(head, table)}\n\n{note}"


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


def _whole(lines: Sequence[dict]) -> str:
    return f"{100 * mean(line['score'] == 1 for line in lines):.1f}" if lines else "–"


def _empty(lines: Sequence[dict]) -> str:
    return str(sum(not clean(line["output"]) for line in lines))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruled = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)
