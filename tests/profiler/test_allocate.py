"""The allocation against every possible choice, and its budgets on larger ones."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from hfsparse.plan import Layer
from hfsparse.profiler.solve.allocation import Budget, Infeasible, Options, allocate, sum_losses

KEPT, READ = 0.15, 0.12  # of a row, by a ring
HELD, LEFT = 0.4, 0.35  # kept and read where keys are evicted
PAGED, CHOSEN, WHOLE = 1.03, 0.3, 1.01  # kept and read where pages are chosen, kept by full heads
FEW, FEW_PAGED = 0.3, 0.31  # kept in fewer bits, and where pages are chosen


def options(rng, layers=1, q_heads=2, kv_heads=1) -> Options:
    """Two patterns, a ring, a selector; what each loses is drawn, cheaper ones mostly more."""
    return Options(
        prefill=np.full((layers, 2, q_heads), [["cheap"], ["fair"]], dtype=object),
        prefill_effect=rng.random((layers, 2, q_heads)) * [[0.5], [0.2]],
        prefill_cost=rng.uniform(0.8, 1.2, (layers, 2, q_heads)) * [[0.2], [0.5]],
        rings=["ring"],
        ring_effect=rng.random((layers, 1, kv_heads)),
        ring_cost=rng.uniform(0.08, 0.12, (layers, 1, kv_heads)),
        ring_kept=[KEPT],
        ring_read=[READ],
        selectors=["pages"],
        page_effect=rng.random((layers, 1, kv_heads)) * 0.1,
        page_kept=[PAGED],
        page_read=[CHOSEN],
        full_kept=WHOLE,
        evictions=["snap"],
        evict_effect=rng.random((layers, 1, kv_heads)) * 0.4,
        evict_kept=[HELD],
        evict_read=[LEFT],
        packed=["int4"],
        packed_effect=rng.random((layers, 1, kv_heads)) * 0.3,
        packed_kept=[[FEW, FEW_PAGED]],
    )


def price(o: Options, choices: list[Layer]):
    """(effect, pairs, cache, decode) of a list of choices, in plain words."""
    effect, pairs, cache, decode = 0.0, [], [], []
    for layer, choice in enumerate(choices):
        group = len(choice.prefill) // len(choice.cache)
        for g, (kept, read) in enumerate(zip(choice.cache, choice.decode, strict=True)):
            heads = range(g * group, (g + 1) * group)
            if kept == "ring":
                assert read == "ring"
                assert {choice.prefill[h] for h in heads} == {"ring"}
                effect += o.ring_effect[layer, 0, g]
                pairs += [o.ring_cost[layer, 0, g]] * group
                cache.append(KEPT)
                decode.append(READ)
                continue
            assert (kept == "snap") == (read == "kept")
            whole = {"pages": PAGED, "full": WHOLE, "kept": HELD}
            cache.append({"pages": FEW_PAGED, "full": FEW}[read] if kept == "int4" else whole[read])
            effect += o.packed_effect[layer, 0, g] if kept == "int4" else 0
            effect += o.page_effect[layer, 0, g] if read == "pages" else 0
            effect += o.evict_effect[layer, 0, g] if read == "kept" else 0
            decode.append({"pages": CHOSEN, "full": 1.0, "kept": LEFT}[read])
            for h in heads:
                i = {"cheap": 0, "fair": 1, "full": None}[choice.prefill[h]]
                effect += 0 if i is None else o.prefill_effect[layer, i, h]
                pairs.append(1.0 if i is None else o.prefill_cost[layer, i, h])
    kv = len(choices[0].cache)
    cache = [share for i, share in enumerate(cache) if i // kv in o.members]
    return effect, np.mean(pairs), np.mean(cache), np.mean(decode)


def every_choice():
    """All that one layer of two q heads and a kv head can do."""
    yield Layer(("ring", "ring"), ("ring",), ("ring",))
    for *prefill, read in product(*[("cheap", "fair", "full")] * 2, ("pages", "full", "kept")):
        for kept in ("snap",) if read == "kept" else ("full", "int4"):
            yield Layer(tuple(prefill), (kept,), (read,))


BUDGETS = [(1, 1, 1), (0.6, 1, 1), (1, 0.6, 1), (1, 1, 0.5), (0.6, 1, 0.5), (0.4, 0.6, 1)]


def every_pair(o: Options):
    """All that two layers can do; where they share keys, these are kept and read alike, and no
    eviction ranks them."""
    for one, other in product(every_choice(), repeat=2):
        same = (one.cache, one.decode) == (other.cache, other.decode)
        if len(o.members) == 2 or (same and one.decode != ("kept",)):
            yield one, other


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("limits", BUDGETS, ids=str)
def test_the_choice_is_the_best_of_all_choices(seed, limits, shared):
    o = options(np.random.default_rng(seed), layers=2)
    o = replace(o, producers=[0, 0] if shared else [])
    best = min(
        effect
        for both in every_pair(o)
        for effect, *costs in [price(o, both)]
        if all(c <= limit + 1e-9 or limit == 1 for c, limit in zip(costs, limits, strict=True))
    )
    chosen = allocate(o, Budget(*limits))
    effect, *costs = price(o, chosen)
    assert sum_losses(o, chosen).sum() == pytest.approx(effect)
    assert effect == pytest.approx(best, rel=2e-3, abs=1e-9)
    assert all(c <= limit + 1e-6 or limit == 1 for c, limit in zip(costs, limits, strict=True))
    assert (best > 0) == (limits != (1, 1, 1))  # a budget that binds costs something


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("share", "cache"), [(0.1, 1), (0.3, 1), (0.6, 0.8)])
def test_a_budget_of_loss_gives_the_smallest_shares_within_it(seed, share, cache):
    o = options(np.random.default_rng(seed), layers=2)
    most = share * o.ring_effect.max(1).sum()
    best = min(
        sum(costs)
        for both in product(every_choice(), repeat=2)
        for effect, *costs in [price(o, both)]
        if effect <= most and (costs[1] <= cache or cache == 1)
    )
    effect, *costs = price(o, allocate(o, Budget(1, cache, 1, share)))
    assert costs[1] <= cache or cache == 1
    assert effect <= most * (1 + 1e-6)
    assert sum(costs) == pytest.approx(best, rel=2e-3)


def test_a_budget_of_everything_keeps_everything():
    o = options(np.random.default_rng(0), layers=3, q_heads=4, kv_heads=2)
    assert allocate(o, Budget(1, 1, 1)) == [Layer(("full",) * 4, ("full",) * 2, ("full",) * 2)] * 3


def test_rings_are_the_heads_that_lose_least_by_it():
    o = options(np.random.default_rng(0), layers=4, q_heads=6, kv_heads=3)
    o.ring_effect[:] = 10.0
    o.ring_effect[1, 0, 2] = o.ring_effect[3, 0, 0] = 0.01
    chosen = allocate(o, Budget(1, WHOLE - 2 * (WHOLE - KEPT) / 12, 1))
    rings = [
        (i, g) for i, c in enumerate(chosen) for g, word in enumerate(c.cache) if word != "full"
    ]
    assert rings == [(1, 2), (3, 0)]


def test_the_better_of_two_rings_and_of_two_selectors_is_taken():
    o = Options(
        prefill=np.full((2, 1, 2), "pattern", dtype=object),
        prefill_effect=np.zeros((2, 1, 2)),
        prefill_cost=np.full((2, 1, 2), 0.2),
        rings=["long", "short"],
        ring_effect=np.array([[[0.1], [0.3]], [[5.0], [9.0]]]),
        ring_cost=np.array([[[0.3], [0.1]]] * 2),
        ring_kept=[0.4, 0.2],
        ring_read=[0.4, 0.2],
        selectors=["few", "many"],
        page_effect=np.array([[[0.4], [0.1]]] * 2),
        page_kept=[1.0, 1.0],
        page_read=[0.1, 0.4],
        full_kept=1.0,
    )
    wide, narrow = allocate(o, Budget(1, 0.7, 0.4)), allocate(o, Budget(1, 0.6, 0.15))
    assert [(c.cache, c.decode) for c in wide] == [(("long",), ("ring",)), (("full",), ("many",))]
    assert [(c.cache, c.decode) for c in narrow] == [(("short",), ("ring",)), (("full",), ("few",))]


def test_budgets_hold_on_a_whole_model_and_are_used():
    o = options(np.random.default_rng(0), layers=30, q_heads=9, kv_heads=3)
    chosen = allocate(o, Budget(0.35, 0.45, 0.3))
    _, pairs, cache, decode = price(o, chosen)
    assert pairs <= 0.35 + 1e-6
    assert cache <= 0.45 + 1e-6
    assert decode <= 0.3 + 1e-6
    assert cache > 0.43  # whatever is kept lowers the effect
    assert {len(c.prefill) for c in chosen} == {9}


def test_budgets_that_cannot_be_met_are_refused_by_name():
    o = options(np.random.default_rng(0))
    sentence = r"pair density 0\.05, cache share 1, decode share 0\.5"
    least = rf"pair density {o.ring_cost[0, 0, 0]:.3f}, cache share {KEPT}\d*, decode share {READ}"
    with pytest.raises(Infeasible, match=rf"{sentence}.*The smallest .*: {least}"):
        allocate(o, Budget(0.05, 1, 0.5))


def test_a_loss_that_budgets_forbid_is_refused_with_the_shares_that_it_takes():
    o = options(np.random.default_rng(0))
    with pytest.raises(Infeasible) as refused:
        allocate(o, Budget(0.9, 1, 1, loss=0.0))
    said = str(refused.value)
    assert "loss 0.0). The smallest that each can be by itself: pair density 1.000, " in said
    assert "HiGHS" not in said


def test_wider_budgets_lie_on_the_way_to_all_of_attention_and_no_loss():
    budget = Budget(0.2, 1.0, 0.5, loss=0.1)
    assert budget.wider(0) == budget
    assert budget.wider(0.5) == Budget(0.6, 1.0, 0.75, loss=0.05)
    assert budget.wider(1) == Budget(1.0, 1.0, 1.0, loss=0.0)
