"""Pictures of a report: scores against what was measured, and the change in each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfsparse_eval.report.statistics import Change

MARKERS = "osD^vP"


@dataclass(frozen=True)
class Dot:
    """One arm at one length, over the tasks that the dense model can do."""

    arm: str
    length: int
    dense: float  # mean score, percent
    change: Change
    shares: Mapping[str, float | None]  # measured, by name


def scores(dots: Sequence[Dot], names: Sequence[str], arms: Sequence[str]):
    """A matplotlib Figure: score by each measured share; bars are the change's interval.

    An arm has the same colour in every picture of the same `arms`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(names), 3.6))
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    colours, lengths = _colours(arms), sorted({dot.length for dot in dots})
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
    return _with_legend(figure, keys)


def changes(rows: Mapping[str, Mapping[str, Change]], arms: Sequence[str]):
    """A matplotlib Figure: for each task and length the change under each arm, with intervals."""
    from matplotlib.figure import Figure

    colours = _colours(arms)
    figure = Figure(figsize=(8, 1.2 + (0.1 + 0.09 * len(arms)) * len(rows)))
    axes = figure.subplots()
    for at, row in enumerate(rows.values()):
        for arm, seen in row.items():
            y = at + 0.7 * ((arms.index(arm) + 0.5) / len(arms) - 0.5)
            axes.plot([seen.low, seen.high], [y, y], color=colours[arm])
            axes.plot(seen.mean, y, "o", color=colours[arm], markersize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="sparse − dense, points (95 %)")
    axes.grid(axis="x", alpha=0.3)
    return _with_legend(figure, [_key("o", colour, arm) for arm, colour in colours.items()])


def _colours(arms: Sequence[str]) -> dict[str, object]:
    """A colour of its own for each arm, up to 20."""
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(arms) <= 10 else "tab20"].colors
    return {arm: colours[i % len(colours)] for i, arm in enumerate(arms)}


def _with_legend(figure, keys: Sequence):
    """The figure with a legend below, of as many columns as its labels leave room for."""
    wide = 0.5 + 0.09 * max((len(key.get_label()) for key in keys), default=0)  # inches
    columns = min(4, max(1, int(figure.get_figwidth() / wide)))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(keys) // columns))
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False)
    figure.set_layout_engine("constrained")
    return figure


def _key(marker: str, colour, label: str):
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color=colour, linestyle="", label=label)
