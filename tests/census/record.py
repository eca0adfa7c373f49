"""The census's record, hfsparse/families.json, and the page that is made of it, docs/families.md.

answers = load()["answers"]      # {entry's name: Answer}
write(version, {name: Answer})   # those that were asked; all else stays as it was
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path

from hfsparse import families
from hfsparse.families import OUTCOMES
from hfsparse.writing import write_whole
from tests import turns
from tests.census.entries import Entry, entries
from tests.census.questions import Answer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / families.PAGE
KEPT = ROOT / "build" / "census"  # what a census that was killed had found
TURNS = 10
ACCEPTED = "right", "wrong", "useless", "uncompared"
KINDS = {"hybrid": "hybrid", "windowed": "every layer windowed"}


def turn() -> int:
    """Which tenth is asked where none is named: another one as the code changes."""
    return turns.turn(TURNS, "census")


def tenth(number: int) -> tuple[Entry, ...]:
    """The entries of a turn; all turns are of a size, and ask each entry once."""
    return entries()[number::TURNS]


@cache
def load() -> tuple[str, dict[str, Answer]]:
    """The version of transformers that was asked about, and what was answered, by entry."""
    if not families.RECORD.exists():
        return "", {}
    found = families.record()
    return found["transformers"], {name: Answer(**said) for name, said in found["answers"].items()}


def kept(version: str, entry: Entry) -> Path:
    """Where the answer lies that was found with these sources."""
    return KEPT / f"{version}-{turns.sources('census')}" / f"{entry.name.replace('/', '.')}.json"


def forget() -> None:
    """Read the record anew when it is next asked for."""
    load.cache_clear()
    families.record.cache_clear()


def write(version: str, asked: dict[str, Answer]) -> list[str]:
    """Put answers into the record and its page; returns what changed, a line each."""
    was, before = load()
    answers = {**(before if was == version else {}), **asked}
    ordered = {entry.name: answers[entry.name] for entry in entries() if entry.name in answers}
    rows = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps({k: v for k, v in asdict(said).items() if v})}"
        for name, said in ordered.items()
    )
    variants = {entry.name: entry.model_type for entry in entries() if entry.variant}
    text = (
        f'{{\n"transformers": {json.dumps(version)},\n"answers": {{\n{rows}\n}},\n'
        f'"variants": {json.dumps(variants)}\n}}\n'
    )
    write_whole(families.RECORD, text.encode())
    forget()
    write_whole(PAGE, render().encode())
    return [
        f"{name}: {brief(before.get(name))} → {brief(said)}"
        for name, said in asked.items()
        if brief(before.get(name)) != brief(said)
    ]


def brief(said: Answer | None) -> str:
    """What the test compares."""
    if said is None:
        return "not asked yet"
    return said.outcome + (f", profile {said.profile}" if said.profile else "")


def render() -> str:
    """The page: totals first, then each family."""
    version, answers = load()
    known = [entry for entry in entries() if entry.name in answers]
    parts = {
        "causal": [e for e in known if e.mapping == "causal" and not e.variant],
        "image-text": [e for e in known if e.mapping == "image-text" and not e.variant],
        "all": [e for e in known if not e.variant],
        "variants": [e for e in known if e.variant],
    }
    return "\n".join(
        [
            "# Every family of transformers",
            "",
            f"Written by `make census` with transformers {version}: each pair of model type and "
            "class of its causal and image-text mappings, by its default config, and variants that "
            "mirror checkpoints whose configs differ from that. Tiny models of random weights "
            "(hidden 64, 4 to 7 layers, 4 q and 2 kv heads, a window of 40), float32, CPU; 70 "
            "tokens and a left-padded batch of two, 12 new tokens, no images. "
            "[What was tested](support.md) has more ways of use of fewer families.",
            "",
            "Right: `patch(model)` gives the stock model's tokens and logits (within 1e-4); with "
            "every second kv head a ring of 4 + 16 tokens it gives those of the stock model under "
            "that mask, from a smaller cache; `undo()` is bit-equal. Profile: a plan of 320 tokens "
            "with loose budgets, without verification.",
            "",
            *_totals({name: [answers[e.name] for e in part] for name, part in parts.items()}),
            "",
            *_table("Families", parts["all"], answers),
            "",
            *_table("Variants", parts["variants"], answers),
            "",
        ]
    )


def _totals(parts: dict[str, list[Answer]]) -> list[str]:
    heads = [f"{name} {len(part)}" for name, part in parts.items()]
    counts = [Counter(said.outcome for said in part) for part in parts.values()]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(parts)]
    for outcome, words in OUTCOMES.items():
        lines.append(f"| {words} | {' | '.join(str(count[outcome]) for count in counts)} |")
    for kind, words in KINDS.items():
        found = [sum(s.kind == kind and s.outcome == "right" for s in p) for p in parts.values()]
        lines.append(f"| of the right ones: {words} | {' | '.join(map(str, found))} |")
    for said in ("works", "refused", "crash"):
        found = [sum(each.profile == said for each in part) for part in parts.values()]
        lines.append(f"| profile: {said} | {' | '.join(map(str, found))} |")
    return lines


def _table(title: str, rows: list[Entry], answers: dict[str, Answer]) -> list[str]:
    lines = [f"## {title}", "", "| family, class | patch | right | profile | why |"]
    lines.append("| --- | --- | :-: | --- | --- |")
    for entry in sorted(rows, key=lambda entry: entry.name.lower()):
        said = answers[entry.name]
        accepted = said.outcome in ACCEPTED
        patch = (
            "accepted"
            if accepted
            else {"unexplained": "refused", "unbuilt": "–"}.get(said.outcome, said.outcome)
        )
        why = said.reason or said.profile_reason or KINDS.get(said.kind, "")
        why = "; ".join(filter(None, [why, _otherwise(entry, answers)]))
        right = {"right": "✓", "wrong": "**no**", "useless": "**no call**"}.get(said.outcome, "")
        cells = entry.name.replace("/", ", "), patch, right, said.profile, why.replace("|", "\\|")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _otherwise(entry: Entry, answers: dict[str, Answer]) -> str:
    """The variants that are accepted where their family isn't, or refused where it is."""
    alike = [e for e in entries() if e.variant and e.name in answers]
    alike = [e for e in alike if (e.mapping, e.model_type) == (entry.mapping, entry.model_type)]
    accepted = answers[entry.name].outcome in ACCEPTED
    others = [e.name for e in alike if (answers[e.name].outcome in ACCEPTED) != accepted]
    if entry.variant or not others:
        return ""
    return f"{'refused' if accepted else 'accepted'} as [{', '.join(others)}](#variants)"


if __name__ == "__main__":
    write_whole(PAGE, render().encode())
