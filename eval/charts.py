"""Pictures of a report: scores against what was measured, and the change in each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .paired import Change

MARKERS = "osD^vP"


@dataclass(frozen=True)
class Dot:
    """One arm at one length, over the tasks that the dense model can do."""

    arm: str
    length: int
    dense: float  # mean score, percent
    change: Change
    shares: Mapping[str, float | None]  # measured, by name


def scores(dots: Sequence[Dot], names: Sequence[str]):
    """A matplotlib Figure: score by each measured share; bars are the change's interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(names), 4.2))
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    colours, lengths = _colours(dots), sorted({dot.length for dot in dots})
    for axes, name in zip(panels, names, strict=True):
        for dot in (dot for dot in dots if dot.shares.get(name) is not None):
            bars = [[dot.change.mean - dot.change.low], [dot.change.high - dot.change.mean]]
            axes.errorbar(
                dot.shares[name],
                dot.dense + dot.change.mean,
                yerr=bars,
                fmt=MARKERS[lengths.index(dot.length) % len(MARKERS)],
                color=colours[dot.arm],
                capsize=3,
            )
        for length in lengths:
            dense = [dot.dense for dot in dots if dot.length == length]
            marker = MARKERS[lengths.index(length) % len(MARKERS)]
            axes.plot(1, sum(dense) / len(dense), marker, color="black")
        most = max((dot.shares.get(name) or 0 for dot in dots), default=1)
        axes.set(
            xlim=(0, max(1.05, most + 0.05)),
            ylim=(-5, 105),
            xlabel=f"{name}, measured",
            ylabel="score, %",
        )
        axes.grid(alpha=0.3)
    keys = [_key("s", colour, arm) for arm, colour in {**colours, "dense": "black"}.items()]
    keys += [_key(MARKERS[i % len(MARKERS)], "grey", f"{n} tokens") for i, n in enumerate(lengths)]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False)
    figure.set_layout_engine("constrained")
    return figure


def changes(rows: Mapping[str, Mapping[str, Change]]):
    """A matplotlib Figure: for each task and length the change under each arm, with intervals."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(arm for row in rows.values() for arm in row))
    figure = Figure(figsize=(8, 1.4 + (0.1 + 0.09 * len(arms)) * len(rows)))
    axes = figure.subplots()
    colours = {arm: f"C{i}" for i, arm in enumerate(arms)}
    for at, row in enumerate(rows.values()):
        for arm, seen in row.items():
            y = at + 0.7 * ((arms.index(arm) + 0.5) / len(arms) - 0.5)
            axes.plot([seen.low, seen.high], [y, y], color=colours[arm])
            axes.plot(seen.mean, y, "o", color=colours[arm], markersize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="sparse − dense, points (95 %)")
    axes.grid(axis="x", alpha=0.3)
    keys = [_key("o", colours[arm], arm) for arm in arms]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False)
    figure.set_layout_engine("constrained")
    return figure


def _colours(dots: Sequence[Dot]) -> dict[str, str]:
    return {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys(dot.arm for dot in dots))}


def _key(marker: str, colour: str, label: str):
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color=colour, linestyle="", label=label)
