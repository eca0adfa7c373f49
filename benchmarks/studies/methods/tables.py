"""The method, transfer and cost tables of the study, from its rows."""

from __future__ import annotations

from collections import defaultdict
from math import exp
from pathlib import Path

import numpy as np

from benchmarks.common.journal import read
from benchmarks.studies.methods.trials import KINDS, Kind, counted
from hfsparse.interval import interval
from hfsparse.plan import Plan

OURS = "balanced-0"  # held against the others
SHOWN = {"seen": "pair_density", "turns": "cache_share", "reads": "decode_share"}
TITLES = {
    "seen": "Prompts alone: equal pair density, full cache, dense decode; question seen",
    "turns": "Cache: equal cache share, full heads dense; text first, then up to 5 questions",
    "reads": "Decode: equal share of keys read; text first, then up to 5 questions",
}


def tables(out: Path) -> str:
    """Markdown of everything known so far."""
    (made, plans), (_, answers), (_, costs) = (
        read(out / f"{name}.jsonl") for name in ("make", "judge", "cost")
    )
    devices = {
        r["device"] for rows in (plans, answers, costs) for r in rows.values() if "device" in r
    }
    parts = [f"{made or 'nothing yet'}; {', '.join(sorted(devices))}."]
    judged = Judged(answers)
    for kind in KINDS[: len(TITLES)]:
        parts += [f"## {TITLES[kind.name]}"]
        parts += [judged.method(kind), judged.rivals(kind), judged.by_task(kind)]
    parts += ["## Transfer", judged.prose(), judged.uncalibrated(), stability(out)]
    parts += ["## Cost", cost_small(plans), cost_large(costs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(each)} |" for each in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) if rows else ""


def lost(changes: list[np.ndarray]) -> float:
    """Points of the values that these texts lost."""
    return 100 * float(np.concatenate(changes).mean())


class Judged:
    """Answers by kind, length and arm: {(task, index): row}."""

    def __init__(self, rows: dict[str, dict]):
        self.rows = rows
        self.found: dict[tuple, dict[tuple, dict]] = defaultdict(dict)
        for name, row in rows.items():
            kind, *place = name.split("/")
            if kind != "failed":
                length, task, index, arm = place
                self.found[kind, int(length), arm][task, int(index)] = row
        self.lengths = sorted({length for _, length, _ in self.found})
        for kind in KINDS:
            for n in self.lengths if kind.dense else ():
                self.found[kind.name, n, "dense"] = self.found[kind.dense, n, "dense"]
        self.arms = sorted({arm for _, _, arm in self.found} - {"dense"})

    def pairs(self, kind: str, n: int, arm: str, tasks, base="dense") -> list[tuple[dict, dict]]:
        """Rows of the dense model, or of another arm, and the arm's of the same texts."""
        first, own = self.found[kind, n, base], self.found[kind, n, arm]
        return [(first[at], own[at]) for at in own if at in first and at[0] in tasks]

    def changes(self, *which) -> list[np.ndarray]:
        """Each text's values: 1 lost against the base, 0 alike, -1 won."""
        pairs = self.pairs(*which)
        return [np.array(first["said"]) - np.array(own["said"]) for first, own in pairs]

    def drop(self, *which) -> str:
        changes = self.changes(*which)
        if not changes:
            return "–"
        low, high = interval([c.sum() for c in changes], [len(c) for c in changes], worst=1.0)
        return f"{lost(changes):.1f} [{100 * low:.1f}, {100 * high:.1f}], {len(changes)}"

    def nats(self, *which) -> str:
        """What the right answers lost against the base, in nats a token."""
        more = [np.mean(own["loss"]) - np.mean(first["loss"]) for first, own in self.pairs(*which)]
        if not more:
            return "–"
        return f"{np.mean(more):.3f} ± {1.96 * np.std(more) / len(more) ** 0.5:.3f}"

    def method(self, kind: Kind) -> str:
        tasks, shown = counted(self.rows, kind), SHOWN[kind.name]
        head, rows = ["plan"], []
        for n in self.lengths:
            head += [f"{n:,}: lost, points [95 %], texts", "nats", shown.replace("_", " ")]
        for arm in self.arms:
            row = [arm]
            for n in self.lengths:
                known = [r[shown] for r in self.found[kind.name, n, arm].values() if r.get(shown)]
                share = f"{np.mean(known):.3f}" if known else "–"
                row += [f(kind.name, n, arm, tasks) for f in (self.drop, self.nats)] + [share]
            if any(cell != "–" for cell in row[1:]):
                rows.append(row)
        apart = [task for task in kind.tasks if task not in tasks]
        note = f"Counted: {', '.join(tasks)}. Set apart, dense below 70 %: {', '.join(apart)}."
        return f"{table(head, rows)}\n\n{note}" if rows else ""

    def rivals(self, kind: Kind) -> str:
        """What OURS loses beyond each other method, on the texts that both were asked.

        Its other seed and budgets (`balanced-*`) are left out.
        """
        tasks, rows = counted(self.rows, kind), []
        for arm in (arm for arm in self.arms if not arm.startswith("balanced")):
            each = [(kind.name, n, OURS, tasks, arm) for n in self.lengths]
            row = [cell for at in each for cell in (self.drop(*at), self.nats(*at))]
            if any(cell != "–" for cell in row):
                rows.append([arm, *row])
        cells = [f"{n:,}: {words}" for n in self.lengths for words in ("points, texts", "nats")]
        told = f"What `{OURS}` loses beyond the others, on the same texts (below 0: they lose more)"
        return f"{told}:\n\n{table(['beyond', *cells], rows)}" if rows else ""

    def by_task(self, kind: Kind) -> str:
        """Where the loss comes from, at the longest length that was asked in full."""
        sizes = {n: len(self.found[kind.name, n, "dense"]) for n in self.lengths}
        if not any(sizes.values()):
            return ""
        at = max(sizes, key=lambda n: (sizes[n] >= max(sizes.values()) * 0.8, n))
        tasks = counted(self.rows, kind)
        head, rows = [f"{at:,}: points lost", *tasks], []
        for arm in self.arms:
            row = [arm]
            for task in tasks:
                changes = self.changes(kind.name, at, arm, {task})
                row.append(f"{lost(changes):.1f}" if changes else "–")
            if any(cell != "–" for cell in row[1:]):
                rows.append(row)
        return table(head, rows)

    def prose(self) -> str:
        """Perplexity of the last 512 tokens, over the dense model's."""
        head, rows = ["plan"], []
        kinds = [kind for kind in KINDS if kind.name.startswith("prose")]
        head += [f"{kind.family}, {n:,}" for kind in kinds for n in self.lengths]
        dense = ["dense: perplexity"]
        for kind in kinds:
            for n in self.lengths:
                own = [row["loss"] for row in self.found[kind.name, n, "dense"].values()]
                dense.append(f"{exp(np.mean(own)):.2f}" if own else "–")
        rows.append(dense)
        for arm in self.arms:
            row = [f"{arm}: × dense"]
            for kind in kinds:
                for n in self.lengths:
                    base, own = self.found[kind.name, n, "dense"], self.found[kind.name, n, arm]
                    more = [own[at]["loss"] - base[at]["loss"] for at in own if at in base]
                    row.append(f"{exp(np.mean(more)):.3f} ({len(more)})" if more else "–")
            if any(cell != "–" for cell in row[1:]):
                rows.append(row)
        return "Perplexity of prose (texts):\n\n" + table(head, rows)

    def uncalibrated(self) -> str:
        """Drops on conversations that no method was calibrated on, and on those that it was."""
        kind = KINDS[1]
        tasks = counted(self.rows, kind)
        new = {task for task in tasks if task.startswith(("numbers", "needles"))}
        head = ["plan", *(f"{n:,}: {w}" for n in self.lengths for w in ("new tasks", "seen kinds"))]
        rows = []
        for arm in self.arms:
            row = [arm]
            for n in self.lengths:
                row += [self.drop(kind.name, n, arm, some) for some in (new, set(tasks) - new)]
            if any(cell != "–" for cell in row[1:]):
                rows.append(row)
        told = "Conversations: tasks that no plan was calibrated on, beside kinds that plans were."
        return f"{told}\n\n{table(head, rows)}" if rows else ""


def stability(out: Path) -> str:
    """How well the heads kept full agree between two seeds."""
    lines = []
    for first in sorted((out / "plans").glob("cache-*-0.yaml")):
        second = first.with_name(first.name.replace("-0.yaml", "-1.yaml"))
        if second.exists():
            one, other = (_full(Plan.load(path)) for path in (first, second))
            method = first.stem.removeprefix("cache-").removesuffix("-0")
            lines.append([method, f"{len(one & other)} of {len(one)}"])
    told = "Kv heads kept full by seeds 0 and 1 (cache):\n\n"
    return told + table(["method", "same full heads"], lines) if lines else ""


def _full(plan: Plan) -> set[tuple[int, int]]:
    return {
        (at, g)
        for at, layer in enumerate(plan.layers)
        for g, word in enumerate(layer.cache)
        if word == "full"
    }


def cost_small(rows: dict[str, dict]) -> str:
    """Seconds and memory of profiles of the judged model, the first of each method and seed."""
    first: dict[str, dict] = {}
    for name, row in rows.items():
        if "seconds" in row:
            first.setdefault(name.split("-", 1)[1], row)
    lines = [
        [name, f"{row['seconds']:.0f}", f"{row['gib']:.1f}", row["device"]]
        for name, row in first.items()
    ]
    told = "The judged model, a profile without verification:"
    return f"{told}\n\n{table(['method-seed', 'seconds', 'peak GiB', 'device'], lines)}"


def cost_large(rows: dict[str, dict]) -> str:
    """Seconds and memory at the size of 8B, over all calls that an arm took."""
    tries: dict[str, list[dict]] = defaultdict(list)
    for name, row in rows.items():
        tries[name.split("/")[0]].append(row)
    lines = []
    for method, each in tries.items():
        last, stopped = each[-1], each[:-1]
        seconds = last.get("profile_s")
        if seconds is None:
            told = last.get("failed", f"not done after {sum(r['seconds'] for r in each):.0f} s")
            lines.append([method, told, "–", "–", "–"])
            continue
        told = f"{seconds:.0f}"
        if stopped:
            told += f", and {sum(r['seconds'] for r in stopped):.0f} before it was stopped"
        if "steps" in last:
            step = last["train_s"] / last["steps"]
            told += f" with {last['steps']} steps; a step {step:.1f}, so 400 take {400 * step:.0f}"
        prompts = f"{last['samples']} each of {', '.join(map(str, last['lengths']))}"
        gib = f"{last['peak_gib']:.1f} ({last['weights_gib']:.1f})"
        lines.append([method, told, gib, prompts, last["device"]])
    head = ["method", "seconds", "peak GiB (weights)", "prompts", "device"]
    return f"8B shape, random weights:\n\n{table(head, lines)}" if lines else ""
