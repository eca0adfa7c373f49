"""The needle grid as a picture: depth by length, one panel an arm and one for their difference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hfsparse_eval.report.pairs import cells, joined
from hfsparse_eval.run.results import Results


def draw(lines: Sequence[dict], arm: Mapping | None, title: str):
    """A matplotlib Figure: dense alone, or dense, an arm, and the arm - dense; lines of one task.

    None where an arm has no pairs.
    """
    from matplotlib.figure import Figure

    pairs = joined(cells([line for line in lines if "failed" not in line], arm))
    if not pairs.dense:
        return None
    depths = sorted({line["depth"] for line in pairs.dense})
    lengths = sorted({line["length"] for line in pairs.dense})
    panels = {"dense": _grid(pairs.dense, depths, lengths)}
    if arm:
        panels[arm["title"]] = _grid(pairs.sparse, depths, lengths)
        panels[f"{arm['title']} − dense"] = panels[arm["title"]] - panels["dense"]
    figure = Figure(figsize=(1.2 + len(panels) * (1 + 0.8 * len(lengths)), 1.6 + 0.5 * len(depths)))
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, scores) in zip(row, panels.items(), strict=True):
        _panel(axes, name, scores, depths, lengths)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def save(results: Results, task: str) -> list[Path]:
    """`heatmap.png` of a task under the first arm, and one more for each other."""
    lines = [line for line in results.lines if line["task"] == task]
    paths = []
    for arm in results.arms or [None]:
        figure = draw(lines, arm, f"{results.settings.model}, {task}")
        if figure is None:
            continue
        other = re.sub(r"[^\w.+-]+", "-", arm["title"]) if paths else ""
        path = results.folder / f"heatmap{'-' * bool(other)}{other}.png"
        figure.savefig(path, dpi=120)
        paths.append(path)
    return paths


def _grid(lines: Sequence[dict], depths: list[float], lengths: list[int]) -> np.ndarray:
    """Mean score in percent, `[depth, length]`; NaN where nothing was run."""
    total = np.zeros((len(depths), len(lengths)))
    count = np.zeros_like(total)
    for line in lines:
        at = depths.index(line["depth"]), lengths.index(line["length"])
        total[at] += 100 * line["score"]
        count[at] += 1
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _panel(axes, name: str, scores: np.ndarray, depths: list[float], lengths: list[int]) -> None:
    change = name.endswith("− dense")
    low, colours = (-100, "RdBu") if change else (0, "viridis")
    image = axes.imshow(scores, vmin=low, vmax=100, cmap=colours, aspect="auto")
    for row, column in np.argwhere(~np.isnan(scores)):
        value = scores[row, column]
        light = sum(image.cmap(image.norm(value))[:3]) > 1.5
        axes.text(
            column,
            row,
            f"{value:+.0f}" if change else f"{value:.0f}",
            ha="center",
            va="center",
            color="black" if light else "white",
        )
    axes.set_title(name)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
