"""The allocation against every possible choice, and its budgets on larger ones."""

from itertools import product

import numpy as np
import pytest

from hfsparse.profiler.allocate import Budget, Infeasible, Options, allocate


def options(rng, layers=1, q_heads=2, kv_heads=1):
    return Options(
        prefill=np.full((layers, 2, q_heads), [["cheap"], ["fair"]], dtype=object),
        prefill_error=rng.random((layers, 2, q_heads)) * [[0.5], [0.2]],
        prefill_cost=np.broadcast_to([[0.2], [0.5]], (layers, 2, q_heads)),
        rings=["ring"],
        ring_error=rng.random((layers, 1, kv_heads)),
        ring_cost=np.full((layers, 1, kv_heads), 0.1),
        selectors=["pages"],
        page_error=rng.random((layers, 1, kv_heads)) * 0.1,
        page_share=np.full((layers, 1, kv_heads), 0.3),
    )


def price(o, choices, ring_share=0.15, ring_read=0.12):
    """(error, pairs, cache, decode) of a list of choices, in plain words."""
    error, pairs, cache, decode = 0.0, [], [], []
    for layer, choice in enumerate(choices):
        group = len(choice.prefill) // len(choice.cache)
        for g, (kept, read) in enumerate(zip(choice.cache, choice.decode, strict=True)):
            heads = range(g * group, (g + 1) * group)
            if kept == "ring":
                assert read == "ring"
                assert {choice.prefill[h] for h in heads} == {"ring"}
                error += o.ring_error[layer, 0, g]
                pairs += [0.1] * group
                cache.append(ring_share)
                decode.append(ring_read)
                continue
            cache.append(1.0)
            error += o.page_error[layer, 0, g] if read == "pages" else 0
            decode.append({"pages": 0.3, "full": 1.0}[read])
            for h in heads:
                i = {"cheap": 0, "fair": 1}.get(choice.prefill[h])
                error += 0 if i is None else o.prefill_error[layer, i, h]
                pairs.append(1.0 if i is None else o.prefill_cost[layer, i, h])
    return error, np.mean(pairs), np.mean(cache), np.mean(decode)


def every_choice():
    """All that one layer of two q heads and a kv head can do."""
    from hfsparse.plan import Layer

    yield Layer(("ring", "ring"), ("ring",), ("ring",))
    for *prefill, read in product(*[("cheap", "fair", "full")] * 2, ("pages", "full")):
        yield Layer(tuple(prefill), ("full",), (read,))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [Budget(1, 1, 1), Budget(0.6, 1, 0.5), Budget(0.4, 0.6, 1)])
def test_the_choice_is_the_best_of_all_choices(seed, budget):
    o = options(np.random.default_rng(seed), layers=2)
    chosen = allocate(o, budget, [0.15], [0.12])
    limits = (budget.pairs, budget.cache, budget.decode)
    best = min(
        error
        for both in product(every_choice(), repeat=2)
        for error, *costs in [price(o, both)]
        if all(c <= limit + 1e-9 for c, limit in zip(costs, limits, strict=True))
    )
    error, *costs = price(o, chosen)
    assert error == pytest.approx(best, rel=2e-3, abs=1e-9)
    assert all(c <= limit + 1e-6 for c, limit in zip(costs, limits, strict=True))


def test_budgets_hold_on_a_whole_model():
    o = options(np.random.default_rng(0), layers=30, q_heads=9, kv_heads=3)
    _, pairs, cache, decode = price(o, allocate(o, Budget(0.35, 0.45, 0.3), [0.15], [0.12]))
    assert pairs <= 0.35 + 1e-6
    assert cache <= 0.45 + 1e-6
    assert decode <= 0.3 + 1e-6
    assert cache > 0.4  # and are used: whatever is kept lowers the error


def test_budgets_that_cannot_be_met_are_refused():
    with pytest.raises(Infeasible, match=r"pairs 0\.05, cache 1, decode 1"):
        allocate(options(np.random.default_rng(0)), Budget(0.05, 1, 1), [0.15], [0.12])
