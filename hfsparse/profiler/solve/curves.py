"""Curves of what was measured: recall against density, a panel a layer, and loss against budget.

Densities and recalls are means over heads and calibration prompts of the longest length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from hfsparse.profiler.measure.effects import Candidates
from hfsparse.profiler.solve.allocation import Budget, Infeasible, Options, find_least_loss

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
NAMES = {"pairs": "pair density", "cache": "cache share", "decode": "decode share"}
COLUMNS = 6


def draw_figure(
    layers: Sequence[int],
    candidates: Candidates,
    found: dict[str, np.ndarray],
    options: Options,
    budget: Budget,
) -> Figure:
    """One panel for each of `layers`, then loss against budget.

    `found` holds arrays `[layers, candidates, heads]` of the longest length, by the names of
    `measure_layer`.
    """
    rows = -(-len(layers) // COLUMNS)
    drawn = Figure(figsize=(2 * COLUMNS + 4, 1.7 * rows + 1.5), layout="constrained")
    left, right = drawn.subfigures(1, 2, width_ratios=[2 * COLUMNS, 4])
    grid = left.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    lines = trace_recalls(candidates, found)
    for at, (axis, layer) in enumerate(zip(grid, layers, strict=False)):
        for kind, (density, recall) in lines.items():
            axis.plot(density[at], recall[at], marker=".", label=kind)
        axis.set_title(f"layer {layer}", fontsize="small")
    for axis in grid[len(layers) :]:
        axis.remove()
    left.supxlabel("pair density")
    left.supylabel("recall, mean over heads")
    left.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(lines))
    axis = right.subplots()
    for name, (shares, losses) in trace_budgets(options).items():
        (line,) = axis.plot(shares, losses, marker=".", label=NAMES[name])
        axis.axvline(getattr(budget, name), color=line.get_color(), linestyle=":", linewidth=1)
    axis.set(title="one budget at a time", xlabel="budget (dotted: as given)", ylabel="loss")
    axis.legend()
    return drawn


def trace_recalls(
    candidates: Candidates, found: dict[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Density and recall `[layers, candidates]` of each kind, means over heads, by density."""
    kinds = [("pattern", i, p.kind) for i, p in enumerate(candidates.patterns.values())]
    rings = enumerate(candidates.rings.values())
    kinds += [("ring", i, "ring, a whole kv head") for i, ring in rings if ring.bits == 16]
    lines = {}
    for kind in dict.fromkeys(kind for _, _, kind in kinds):
        at = [(table, i) for table, i, each in kinds if each == kind]
        both = [
            np.stack([found[f"{table}_{name}"][:, i].mean(-1) for table, i in at], 1)
            for name in ("pairs", "recall")
        ]
        order = both[0].argsort(1)
        lines[kind] = tuple(np.take_along_axis(each, order, 1) for each in both)
    return lines


def trace_budgets(options: Options) -> dict[str, tuple[list[float], list[float]]]:
    """Least loss with each budget at SHARES and no limit on the others, by name: shares and losses.

    Losses are sums over heads in the method's own unit. Shares that can't be met are left out.
    """
    lines = {}
    for name in NAMES:
        points = []
        for share in SHARES:
            try:
                loss = find_least_loss(
                    options, Budget(**{**dict.fromkeys(NAMES, 1.0), name: share})
                )
            except Infeasible:
                continue
            points.append((share, loss))
        lines[name] = tuple(list(each) for each in zip(*points, strict=True))
    return lines
