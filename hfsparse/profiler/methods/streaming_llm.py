"""The `streaming-llm` method: every head streams, and nothing is measured (arXiv 2309.17453).

The first 4 tokens and the latest ones: as many as every budget allows at the longest length.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from hfsparse.errors import UsageError
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import ModelId
from hfsparse.profiler.job import Found, Job
from hfsparse.profiler.methods import duo
from hfsparse.profiler.solve.allocation import Budget
from hfsparse.runtime.cache.ring import SLACK

SINK = 4  # tokens


def plan(job: Job) -> Found:
    """Rings in all layers that have no window of their own."""
    longest = max(job.prompts)
    recent = fit_window(longest, job.budget, job.cache_length) - SINK
    if recent < 1:
        raise UsageError(
            f"no window fits the budgets at {longest} tokens. Give larger budgets, or longer "
            "--lengths"
        )
    full = np.zeros((int(job.free.sum()), ModelId.of(job.model).kv_heads), bool)
    return duo.plan_rings(job, full, Streaming(SINK, recent), {})


def fit_window(length: int, budget: Budget, at: int) -> int:
    """Most tokens, sink and window, that a ring may read to be within every budget: that of cache
    at `at` tokens in the row, the others at `length`."""
    pairs = budget.pairs * length * (length + 1) / 2
    by_pairs = bisect_right(range(1, length + 1), pairs, key=lambda w: w * (2 * length - w + 1) / 2)
    by_cache = length if budget.cache >= 1 else int(budget.cache * at) - SLACK
    return min(by_pairs, by_cache, int(budget.decode * length))
