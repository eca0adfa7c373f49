"""The integer programme of rules against trying every choice."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from hfsparse.profiler.solve import elastic
from hfsparse.profiler.solve.allocation import Budget, Infeasible
from hfsparse.profiler.solve.elastic import Programme, pareto

# alpha, beta; the last is everything. Rules 1 and 2 cross.
LINES = [(128, 0.0), (512, 0.0), (128, 0.5), (512, 0.5), (np.inf, 1.0)]
LENGTHS = (1024, 4096)
LAYERS, HEADS, KV = 2, 4, 2


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(elastic, "GAP", 1e-7)


def shares(lines) -> np.ndarray:
    """Cache shares `[lengths, rules]` of spans."""
    return np.array([[min(1.0, (64 + a + b * n) / n) for a, b in lines] for n in LENGTHS])


def programme(seed: int, pairs: float, cache: float) -> Programme:
    rng = np.random.default_rng(seed)
    order = np.sort(rng.exponential(size=(2, LAYERS, HEADS, len(LINES))))[..., ::-1].copy()
    order[..., -1] = 0  # everything kept, nothing lost
    alpha, beta = np.array(LINES).T
    wider = (alpha[:, None] > alpha) & (beta[:, None] < beta)
    held = shares(LINES)
    return Programme(order, held**0.8, held, wider | wider.T, KV, Budget(pairs, cache, 1.0))


def every(it: Programme) -> tuple[np.ndarray, np.ndarray]:
    """All choices `[n, layers, heads]` within rules and budgets, and losses `[n, lengths]`."""
    crossing = {(1, 2), (2, 1)}
    layers = [
        layer
        for layer in product(range(len(LINES)), repeat=HEADS)
        if len(set(layer)) <= 2 and not crossing & set(product(layer, layer))
    ]
    choices = np.array(list(product(layers, repeat=LAYERS)))
    pairs = it.pairs[:, choices].mean((2, 3))
    groups = np.array(LINES)[choices].reshape(len(choices), LAYERS, KV, HEADS // KV, 2).max(3)
    sizes = [(64 + groups[..., 0] + groups[..., 1] * n) / n for n in LENGTHS]
    cache = np.array([np.minimum(1.0, size).mean((1, 2)) for size in sizes])
    fits = ((pairs <= it.budget.pairs) & (cache <= it.budget.cache)).all(0)
    choices = choices[fits]
    loss = np.take_along_axis(it.scaled[:, None], choices[None, ..., None], 4).sum((2, 3, 4))
    return choices, loss.T


@pytest.mark.parametrize(("seed", "pairs", "cache"), [(0, 0.6, 1.0), (1, 0.9, 0.5), (2, 0.5, 0.6)])
def test_the_choice_is_the_best_of_all(seed, pairs, cache):
    it = programme(seed, pairs, cache)
    choices, loss = every(it)
    seen = {choice.tobytes() for choice in choices.astype(np.int64)}
    for at in range(2):
        found = it.solve(at)
        assert found.astype(np.int64).tobytes() in seen
        assert it.loss(found)[at] == pytest.approx(loss[:, at].min(), rel=1e-5)
    middle = loss[loss[:, 0].argmin(), 1] * 0.5 + loss[:, 1].min() * 0.5
    bounded = it.solve(0, np.array([np.inf, middle]))
    assert it.loss(bounded)[1] <= middle * 1.001
    assert it.loss(bounded)[0] == pytest.approx(loss[loss[:, 1] <= middle, 0].min(), rel=1e-5)


def test_no_plan_of_the_set_beats_another_and_both_ends_are_in_it():
    it = programme(2, 0.5, 0.6)
    loss = np.array([it.loss(choice) for choice in pareto(it)])
    assert len(loss) > 1
    for one, other in product(loss, loss):
        assert (one == other).all() or (one > other).any()
    assert loss.min(0) == pytest.approx(every(it)[1].min(0), rel=1e-5)


def test_budgets_that_no_rule_meets_are_refused_with_the_budgets():
    with pytest.raises(Infeasible, match=r"pair density 0\.01, cache share 0\.6"):
        pareto(programme(0, 0.01, 0.6))
