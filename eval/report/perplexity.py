"""The page of `ppl`: perplexities and divergences from the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, isfinite
from statistics import mean

from hfsparse.interval import interval
from hfsparse_eval.report.pairs import DENSE, average, pairs
from hfsparse_eval.report.render import Heading, Part, Table


def page(lines: Sequence[Mapping], arms: Sequence[Mapping]) -> list[Part]:
    """Perplexities and divergences, over all positions and by position."""
    rows, places = [], []
    for arm in (DENSE, *arms):
        own = pairs(lines, arm)
        for length in sorted({found["length"] for _, found in own}):
            of = [pair for pair in own if pair[0]["length"] == length]
            rows.append([arm["title"], str(length), *_over_windows(of)])
            for low in dict.fromkeys(b["from"] for _, found in of for b in found["bins"]):
                places.append([arm["title"], str(length), f"{low} on", *_at(of, low)])
    shares = ["pair density", "KV share"]
    head = ["arm", "length", "windows", "perplexity", "change, % (95 %)", "KL, nats", "same, %"]
    return [
        Heading("Perplexity"),
        Table([*head, *shares], rows),
        "Change: of the perplexity against dense, with Student's interval over windows. KL: of the "
        "next token, dense to this arm. Same: tokens whose first choice is the dense one's.",
        Heading("By position"),
        Table(["arm", "length", "position", "tokens", *head[3:4], *head[5:]], places, words=1),
    ]


def _over_windows(pairs: Sequence[tuple[Mapping, Mapping]]) -> list[str]:
    found = [line for _, line in pairs]
    changes = [_loss(line) - _loss(dense) for dense, line in pairs]
    told = f"{100 * (exp(mean(changes)) - 1):+.2f}"
    if len(set(changes)) > 1:
        low, high = (100 * (exp(x) - 1) for x in interval(changes))
        told += f" [{low:+.2f}, {high:+.2f}]"
    shares = (average(found, name) for name in ("pair_density", "cache_share"))
    _, *figures = _figures([b for line in found for b in line["bins"]])
    return [
        str(len(pairs)),
        figures[0],
        told,
        *figures[1:],
        *("–" if share is None else f"{share:.3f}" for share in shares),
    ]


def _at(pairs: Sequence[tuple[Mapping, Mapping]], low: int) -> list[str]:
    return _figures([b for _, line in pairs for b in line["bins"] if b["from"] == low])


def _figures(bins: Sequence[Mapping]) -> list[str]:
    """Tokens, perplexity, KL and equal first choices."""
    tokens, loss, kl, same = (sum(b[x] for b in bins) for x in ("tokens", "loss", "kl", "same"))
    power = loss / tokens
    shown = f"{exp(power):.3f}" if isfinite(power) and power < 20 else f"e^{power:.1f}"
    return [f"{tokens:.0f}", shown, f"{max(kl, 0.0) / tokens:.5f}", f"{100 * same / tokens:.2f}"]


def _loss(line: Mapping) -> float:
    return sum(b["loss"] for b in line["bins"]) / sum(b["tokens"] for b in line["bins"])
