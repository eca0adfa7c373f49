"""The page of `recall`: which heads lost the needle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from hfsparse_eval.report.pairs import pairs
from hfsparse_eval.report.render import ALONE, Heading, Part, Table

SHOWN = 20  # heads of an arm


def page(lines: Sequence[Mapping], arms: Sequence[Mapping]) -> list[Part]:
    """Each sample's scores and kept mass; the heads that lost most, and their line of the plan."""
    parts: list[Part] = []
    for arm in arms:
        if not (both := pairs(lines, arm)):
            continue
        parts += [Heading(f"Samples: {arm['title']}"), _samples(both)]
        wrong = [own for dense, own in both if own["score"] < dense["score"]]
        told = f"the {len(wrong)} samples that it answers worse" if wrong else "all samples"
        heads = _heads(wrong or [own for _, own in both])
        parts += [Heading(f"Lost by heads: {arm['title']}, {told}"), heads]
    note = "Mass: attention of an answer's row to the gold tokens, as the dense model has it."
    return [*parts, note] if parts else [ALONE]


def _samples(both: Sequence[tuple[Mapping, Mapping]]) -> Table:
    head = ["id", "dense", "arm's", "mass kept, %", "arm's answer"]
    rows = [
        [
            x["id"],
            f"{dense['score']:.2f}",
            f"{x['score']:.2f}",
            f"{100 * x['kept'] / x['mass']:.1f}" if x["mass"] else "–",
            " ".join(x["output"].split())[:80],
        ]
        for dense, x in both
    ]
    return Table(head, rows)


def _heads(own: Sequence[Mapping]) -> Table:
    """Means over these samples; a head that lost nothing in a sample counts as 0 there."""
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for x in own:
        for head in x["lost"]:
            each = sums[head["layer"], head["head"], head["words"]]
            each[0] += head["mass"] - head["kept"]
            each[1] += head["mass"]
    most = sorted(sums.items(), key=lambda item: -item[1][0])[:SHOWN]
    rows = [
        [f"{layer}", f"{head}", f"{lost / len(own):.4f}", f"{100 * (1 - lost / mass):.1f}", said]
        for (layer, head, said), (lost, mass) in most
    ]
    return Table(["layer", "q head", "mass lost", "kept, %", "the plan's words"], rows, words=0)
