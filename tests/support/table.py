"""What each cell came to, docs/support.json, and what is made of it: docs/support.md."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parents[2] / "docs" / "support.json"
NAMES = Path(__file__).parents[2] / "hfsparse" / "cli" / "families.txt"  # model types
UNTESTED = "untested"
SIGNS = {"pass": "✓", "refused": "R", "stock": "–", "": " "}


@cache
def load() -> dict:
    """{version: {family: {way: [outcome, reason]}}}"""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def known(version: str, family: str, way: str) -> str | None:
    """What a cell came to, if this version is in the table at all."""
    if version not in load():
        return None
    return load()[version].get(family, {}).get(way, [UNTESTED])[0]


def write(version: str, cells: list) -> None:
    """Put cells (family, way, outcome, reason) of one version into the table and its page.

    What was not run stays as it was, unless its row or its way is gone; UNTESTED takes a cell out.
    The families that `hfsparse doctor` names are written, too.
    """
    from tests.support.models import FAMILIES, REFUSED, exists, tiny
    from tests.support.ways import WAYS

    families = [*FAMILIES, *REFUSED]
    table = load()
    found = table.get(version, {})
    for family, way, outcome, reason in cells:
        found.setdefault(family, {})[way] = [outcome, reason]
    table[version] = {
        family: {
            way: found[family][way]
            for way in (*WAYS, "patch")
            if (way != "patch" or family in REFUSED)
            and found[family].get(way, [UNTESTED])[0] != UNTESTED
        }
        for family in families
        if family in found
    }
    ordered = dict(sorted(table.items(), key=lambda item: [int(n) for n in item[0].split(".")]))
    TABLE.parent.mkdir(exist_ok=True)
    rows = ",\n".join(
        f"{json.dumps(version)}: {{\n"
        + ",\n".join(f"  {json.dumps(f)}: {json.dumps(ways)}" for f, ways in families.items())
        + "\n}"
        for version, families in ordered.items()
    )
    TABLE.write_text(f"{{\n{rows}\n}}\n")
    load.cache_clear()
    TABLE.with_suffix(".md").write_text(render())
    if all(map(exists, FAMILIES)):  # else another version names them
        kinds = dict.fromkeys(tiny(family).config.model_type for family in FAMILIES)
        NAMES.write_text("".join(f"{kind}\n" for kind in kinds))


def render() -> str:
    table = load()
    versions = list(table)
    families = list(dict.fromkeys(f for cells in table.values() for f in cells))
    supported = [f for f in families if all("patch" not in table[v].get(f, {}) for v in versions)]
    ways = list(dict.fromkeys(w for v in versions for f in supported for w in table[v].get(f, {})))
    reasons: dict[str, list[str]] = {}

    def sign(family: str, way: str) -> str:
        found = [table[v].get(family, {}).get(way, ["", ""]) for v in versions]
        for version, (outcome, reason) in zip(versions, found, strict=True):
            if reason:
                kind = {"refused": "refused", "stock": "transformers itself can't"}[outcome]
                reasons.setdefault(f"{kind}: {reason}", []).append(f"{family}, {way}, {version}")
        signs = [SIGNS[outcome] for outcome, _ in found]
        return signs[0] if len(set(signs)) == 1 else "".join(signs)

    lines = [
        "# What was tested",
        "",
        "Written by the tests (`make test-matrix`); tiny models of random weights, float32, CPU, "
        "each cell for a plan that drops much, and for one that drops nothing where a cache is "
        "filled, copied, cropped or reordered, or gradients flow. transformers "
        f"{', '.join(versions)}, in this order where a cell has a sign for each.",
        "",
        "✓ patched equals the dense model under the plan's boolean mask (same tokens, logits "
        "within 1e-5), or what the way is for holds; R refused before anything changes; "
        "– transformers itself, unpatched, can't; blank: not run. "
        "[Every family of transformers](families.md) is asked fewer questions.",
        "",
        "| way | " + " | ".join(supported) + " |",
        "| --- |" + " :-: |" * len(supported),
    ]
    for way in ways:
        lines.append(f"| {way} | " + " | ".join(sign(f, way) for f in supported) + " |")
    lines += ["", "## Refused by `hfsparse.patch`", "", "| model | versions | why |"]
    lines.append("| --- | --- | --- |")
    for family in [f for f in families if f not in supported]:
        by_reason: dict[str, list[str]] = {}
        for v in versions:
            outcome, reason = table[v].get(family, {}).get("patch", ["", ""])
            if outcome == "refused":
                why = reason.split("patched: ")[-1]
                by_reason.setdefault(why, []).append(v)
        for why, at in by_reason.items():
            lines.append(f"| {family} | {', '.join(at)} | {why} |")
    lines += ["", "## Why a cell is not ✓", ""]
    for reason, cells in reasons.items():
        few = "; ".join(cells[:4]) + (f"; and {len(cells) - 4} more" if len(cells) > 4 else "")
        lines.append(f"- {reason} ({few})")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.with_suffix(".md").write_text(render())
