"""`report.md` and `report.html`: what each arm costs and saves, from the result lines alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from . import charts, render
from .cells import ABLE, DENSE, Cell, Outcome, average, belongs, cells, joined
from .paired import change, mcnemar
from .render import Bullets, Heading, Part, Picture, Table
from .results import Results, Settings, write_whole
from .sections import PAGES, SECTIONS
from .tasks import TASKS, clean
from .verdict import beyond, verdict

RULERS_CAPS = "as RULER: 128, vt 30, cwe 120, fwe 50, qa 32"
EARLY = "generation stops early once every answer was said"
UNUSED = {"ppl": ("prompts", "new tokens", "prose haystack"), "custom": ("prose haystack",)}
SCORED = {  # by the command; else as RULER does
    "custom": "Scores in percent; lengths are rounded up to powers of two.",
    "decode": "Scores in percent: the share of the words wanted that came in their order.",
    "turns": "Scores in percent: the share of the answers found, the mean of the turns.",
}
AS_RULER = "Scores are RULER's, in percent: the share of the answers found; for qa, any one found."
LLAMA2_AT_4K = 85.6  # RULER's bar: the mean of Llama-2-7B-chat at 4096 tokens
NOTE = (
    " Whole: percent of samples with a score of 100, as McNemar's exact test compares them. "
    "Empty: outputs without a character. d/s: dense / this arm."
)
METRICS = {"part": "any of the right ones", "all": "all of the right ones; of some, their share"}
OTHER = ("decode", "custom")  # what no plan was verified on
FEW = 50  # samples from which on a 95 % interval is about that; of 20 it is 93 %
SHARES = {"pair density": "pair_density", "KV share": "cache_share"}


def save(results: Results) -> list[Path]:
    """Write both reports into the results' folder."""
    written = parts(results.lines, results.settings, results.sessions, results.arms)
    paths = results.folder / "report.md", results.folder / "report.html"
    for path, text in zip(paths, (render.markdown(written), render.page(written)), strict=True):
        write_whole(path, text)
    return [*paths]


def parts(lines, settings: Settings, sessions, arms: Sequence[Mapping] = ()) -> list[Part]:
    """The report: of the dense lines, and of each of these arms beside them."""
    good = [line for line in lines if "failed" not in line]
    outcomes = [Outcome(arm, found) for arm in arms if (found := cells(good, arm))]
    dense = Outcome(DENSE, cells(good))
    batches = sorted({line.get("batch", 1) for line in good})
    every = [Heading(f"{settings.kind}: {settings.model}", 1)]
    every.append(Bullets(_facts(settings, sessions, arms, batches)))
    if settings.kind in PAGES:
        return [*every, *PAGES[settings.kind](good, arms), *_missing(lines, arms)]
    if outcomes:
        every += [Heading("Verdicts"), Bullets([_verdict(o, settings.kind) for o in outcomes])]
        every += [_arms(outcomes)] if any(o.able for o in outcomes) else []
        every += _pictures(outcomes)
    few = min((len(cell.dense) for cell in dense.cells), default=FEW) < FEW
    scored = SCORED.get(settings.kind, AS_RULER)
    every.append(scored + NOTE + f" Rows of fewer than {FEW}: the true interval is wider." * few)
    for outcome in outcomes or [dense]:
        title = outcome.arm["title"]
        every += [Heading(f"Scores: {title}"), *_scores(outcome)]
        if settings.kind in SECTIONS:
            name, section = SECTIONS[settings.kind]
            every += [Heading(f"{name}: {title}"), section(outcome)]
        every += [Heading(f"Measured: {title}"), _measured(outcome.cells)]
    if settings.kind == "ruler" and len({cell.length for cell in dense.cells}) > 1:
        every += [Heading("Effective length"), *_effective(dense, outcomes)]
    return every + _missing(lines, arms)


def effective_length(means: Mapping[int, float]) -> int | None:
    """The longest length whose mean over tasks, in percent, reaches the bar; None if none does."""
    return max((length for length, mean in means.items() if mean >= LLAMA2_AT_4K), default=None)


def _facts(settings: Settings, sessions, arms, batches: Sequence[int]) -> list[str]:
    plans = [f"{arm['title']} {arm['plan'] or '(a peer)'}" for arm in arms]
    sizes = ", ".join(map(str, batches)) or "1"
    facts = {
        "model": f"{settings.model} (fingerprint {settings.fingerprint}), {settings.dtype}",
        "arms beside dense": ", ".join(plans) or "none, dense only",
        "prompts": f"chat template {settings.chat}, seed {settings.seed}, batch size {sizes}, "
        "greedy",
        "new tokens": f"at most {settings.max_new_tokens or _caps(settings.kind)}; "
        f"{'answers go on to their end' if settings.kind == 'decode' else EARLY}",
        "prose haystack": f"{settings.prose} (not RULER's essays: compare only runs with this)",
    }
    if settings.data:
        facts["data"] = settings.data
    if settings.metric:
        facts["right"] = f"an answer that holds {METRICS[settings.metric]}"
    if settings.kind == "ppl":
        apart = f"{settings.stride} tokens apart" if settings.stride else "side by side"
        facts["windows"] = f"of the text's beginning, {apart}"
    if settings.turns:
        facts["turns"] = settings.turns
    if settings.kind == "ruler":
        facts["questions"] = (
            f"qa_1 {settings.squad or 'not run'}; qa_2 {settings.hotpotqa or 'not run'}; "
            "qa_*_invented: invented facts (not SQuAD or HotpotQA)"
        )
    for name in UNUSED.get(settings.kind, ()):
        del facts[name]
    lines = [f"{name}: {value}" for name, value in facts.items()]
    for session in sessions:
        versions = [f"{k} {v}" for k, v in session.items() if k != "machine"]
        lines.append(f"machine: {session['machine']}; {', '.join(versions)}")
    return lines


def _caps(kind: str) -> str:
    return RULERS_CAPS if kind == "ruler" else "what each task asks for"


def _verdict(outcome: Outcome, kind: str) -> str:
    whole = outcome.whole
    seen = change(*whole.scores) if whole.dense else None
    lengths = [int(length) for length in outcome.lengths]
    promise = outcome.arm.get("promise", {})
    told = verdict(seen, _shares(whole), promise, lengths)
    each = {n: change(*outcome.at(n).scores) for n in outcome.lengths}
    worse = [n for n, alone in each.items() if beyond(alone, promise)]
    if worse and len(each) > 1:
        told += f"; beyond it at {', '.join(worse)} tokens alone"
    if promise and kind in OTHER:
        told += "; it was promised for retrieval trials, not for these tasks"
    return f"{outcome.arm['title']}: {told}"


def _shares(cell: Cell) -> dict[str, float | None]:
    return {name: average(cell.sparse, field) for name, field in SHARES.items()}


def _arms(outcomes: Sequence[Outcome]) -> Table:
    head = ["arm", "length", "n", "dense", "arm's", "difference, points (95 %)", "McNemar p"]
    head += ["empty d/s, %", "pair density", "expected", "KV share", "expected", "KV MiB"]
    rows = []
    for outcome in outcomes:
        expected = outcome.arm.get("expected", {})
        for length in outcome.lengths:
            cell = outcome.at(length)
            said = expected.get(length, {})
            row = [outcome.arm["title"], length, *_compared(cell)[:5], _both(cell, _empty)]
            for field in SHARES.values():
                row += [_mean(cell.sparse, field, 1, ".3f")]
                row += [f"{said[field]:.3f}" if field in said else "–"]
            rows.append([*row, _mean(_alone(cell.sparse), "kv_bytes", 2**-20, ".1f")])
    return Table(head, rows)


def _alone(lines: Sequence[dict]) -> list[dict]:
    """Lines that know the cache's bytes, with those of one sample in place of the whole batch's."""
    known = (line for line in lines if line.get("kv_bytes") is not None)
    return [line | {"kv_bytes": line["kv_bytes"] / line.get("batch", 1)} for line in known]


def _pictures(outcomes: Sequence[Outcome]) -> list[Part]:
    dots, rows, arms = [], {}, list(dict.fromkeys(o.arm["title"] for o in outcomes))
    for outcome in outcomes:
        title = outcome.arm["title"]
        for length in outcome.lengths:
            cell = outcome.at(length)
            level = 100 * mean(cell.scores[0])
            dots.append(charts.Dot(title, int(length), level, change(*cell.scores), _shares(cell)))
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


def _scores(outcome: Outcome) -> list[Part]:
    head = ["task", "length", "n", "dense", "arm's", "difference, points (95 %)", "McNemar p"]
    head += ["whole d/s", "empty d/s, %"]

    def table(cells: Sequence[Cell]) -> Table:
        rows = [
            [cell.task, cell.length, *_compared(cell), _both(cell, _whole), _both(cell, _empty)]
            for cell in cells
        ]
        return Table(head, rows)

    able = outcome.able
    apart = [cell for cell in outcome.cells if not cell.able]
    found: list[Part] = [table([*able, outcome.whole])] if able else []
    if apart:
        found.append(
            f"Set apart, and not in any sum: the dense model scores below {100 * ABLE:.0f} %."
        )
        found.append(table(apart))
    return found


def _compared(cell: Cell) -> list[str]:
    """n, both scores, their difference, McNemar's p."""
    left = [str(len(cell.dense)), _mean(cell.dense, "score", 100, ".1f")]
    if not cell.sparse:
        return [*left, "–", "–", "–"]
    p = mcnemar(*([score == 1 for score in arm] for arm in cell.scores))
    told = f"{p:.3f}" if p >= 0.001 else "< 0.001"
    return [*left, _mean(cell.sparse, "score", 100, ".1f"), str(change(*cell.scores)), told]


def _effective(dense: Outcome, outcomes: Sequence[Outcome]) -> list[Part]:
    """Means over the tasks that were run at every length, so that lengths compare."""
    rows = dense.cells
    lengths = sorted({int(cell.length) for cell in rows})
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
        f"{len(TASKS)}, with SQuAD and HotpotQA."
    )
    return [Table(["arm", *map(str, lengths), "effective length"], table), note]


def _missing(lines: Sequence[dict], arms: Sequence[Mapping]) -> list[Part]:
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


def _measured(rows: Sequence[Cell]) -> Table:
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


def _whole(lines: Sequence[dict]) -> str:
    return f"{100 * mean(line['score'] == 1 for line in lines):.1f}" if lines else "–"


def _empty(lines: Sequence[dict]) -> str:
    return f"{100 * mean(not clean(line['output']) for line in lines):.1f}" if lines else "–"
