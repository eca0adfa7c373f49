"""The `minference` method: a q head's best pattern at equal cost (arXiv 2407.02490), and rings.

At each cost level, every q head takes the pattern of highest recall among those that cost no more
(measured pair density). Kv heads become rings where the key tokens feel it least. `allocate` then
picks rings, levels and page shares under the budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.profiler.job import Found, Job
from hfsparse.profiler.measure.effects import Candidates
from hfsparse.profiler.methods import one_pass
from hfsparse.profiler.solve.allocation import Options
from hfsparse.selectors.quest import Quest

LEVELS = (0.15, 0.25, 0.4, 0.6)  # pair densities compared at equal cost
OVER = 1.05  # a pattern may cost so much more than its level
SHARES = (0.1, 0.2, 0.35, 0.5)  # of a row's pages
SINK = 64
RINGS = (32, 16, 8)  # parts of the longest prompt that a ring's window may be


def plan(job: Job, score: str = "recall") -> Found:
    """Measure, compare at equal cost by recall or by (output) error, and allocate."""
    names = one_pass.drop_slow(job, candidates(max(job.prompts)))
    names = one_pass.calibrate_tables(job, names)
    means = one_pass.measure_prompts(job, names)
    return one_pass.choose_plan(job, names, means, partial(options, score=score))


def plan_by_error(job: Job) -> Found:
    """The variant that compares patterns by output error instead of recall."""
    return plan(job, score="error")


def candidates(longest: int) -> Candidates:
    """Patterns sized for prompts of `longest` tokens."""
    patterns = {}
    for level in LEVELS:
        # streaming keeps about recent * (2 - recent / L) / L of the pairs
        recent = _round(longest * (1 - (1 - level) ** 0.5) - SINK)
        patterns[f"stream{recent}"] = Streaming(SINK, recent)
        share = round(level * 0.9, 3)
        patterns[f"blocks{round(share * 100)}"] = BlockTopK(share, min_blocks=2)
        columns, diagonals = _round(longest * level * 0.6), _round(longest * level * 0.1)
        patterns[f"vs{columns}x{diagonals}"] = VerticalSlash(columns, diagonals)
    rings = {f"ring{r}": Streaming(SINK, r) for r in windows(longest)}
    selectors = {f"quest{round(s * 100)}": Quest(s, min_pages=4) for s in SHARES}
    return Candidates(patterns, rings, selectors)


def windows(longest: int) -> list[int]:
    """Tokens of the rings that heads may become, for prompts of up to `longest` tokens."""
    return [_round(longest / part) for part in RINGS]


def options(
    means: Mapping[int, dict[str, np.ndarray]],
    names: Candidates,
    costs: Mapping[str, Any],
    score: str = "recall",
) -> Options:
    """What each head may choose, from measurements `[layers, candidates, heads]` by length.

    Losses are means over lengths; costs, also those of `one_pass.price_candidates`, are of the
    longest.
    """
    found = one_pass.average(list(means.values()))
    found |= {name: means[max(means)][name] for name in ("pattern_pairs", "ring_pairs")}
    effect, pairs = found["pattern_effect"], found["pattern_pairs"]
    good = found["pattern_recall"] if score == "recall" else 1 / (1 + found["pattern_error"])
    best = np.zeros((len(LEVELS), effect.shape[0], effect.shape[2]), dtype=int)
    for i, level in enumerate(LEVELS):
        fits = np.where(pairs <= level * OVER, good, -1.0 - pairs)  # none fits: the cheapest
        best[i] = fits.argmax(1)
    at = best.transpose(1, 0, 2)  # [layers, levels, q heads]
    return Options(
        prefill=np.array([*names.patterns, "full"], dtype=object)[at],
        prefill_effect=np.take_along_axis(effect, at, 1),
        prefill_cost=np.take_along_axis(pairs, at, 1),
        rings=list(names.rings),
        ring_effect=found["ring_effect"],
        ring_cost=found["ring_pairs"],
        selectors=list(names.selectors),
        page_effect=found["page_effect"],
        **costs,
    )


def _round(tokens: float) -> int:
    """To whole blocks of 32 tokens, at least one."""
    return max(32, round(tokens / 32) * 32)
