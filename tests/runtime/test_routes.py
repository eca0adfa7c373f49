"""Heads are grouped by pattern when a plan is resolved, for each case of a row's length."""

from __future__ import annotations

from itertools import product

import pytest

import hfsparse
from hfsparse.lists import FULL
from hfsparse.runtime import routes
from hfsparse.runtime.layer_plan import layer_plans_of
from tests.patcher.families import (
    FAMILIES,
    by_content_in_windows,
    fresh,
    heads,
    left_padded,
    mixed,
    straddled,
    streaming,
    wide_window,
)
from tests.patcher.runs import forward, generate


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [streaming, mixed])
def test_each_head_has_the_route_that_the_plan_says(family, make):
    model = fresh(family)
    plan, (q_heads, kv_heads) = make(model), heads(model)
    ratio = q_heads // kv_heads
    with hfsparse.patch(model, plan):
        for layer in layer_plans_of(model):
            words = plan.layers[layer.index]
            parts = [(layer.cases, range(kv_heads), True)]
            for group, cases in zip(layer.groups, layer.store_cases, strict=True):
                parts.append((cases, group.heads, group.band == FULL))
            for cases, kv, ranked in parts:
                for short, kept in product((False, True), repeat=2):
                    found = cases[short, kept]
                    own = [h * ratio + i for h in kv for i in range(ratio)]
                    assert list(found.heads) == own
                    for i, (head, pattern, kv_head) in enumerate(followed(found, ratio)):
                        whole = short if words.cache[head // ratio] == "full" else kept
                        wanted = None if whole else plan.patterns.get(words.prefill[head])
                        if not ranked and not hasattr(wanted, "band"):
                            wanted = None
                        assert (head, pattern, kv_head) == (own[i], wanted, i // ratio)


def followed(found: routes.Routes, ratio: int) -> list[tuple]:
    """Each q head, its pattern and kv head, as kernels are given them."""
    of = {}
    for listed in (found.listed, found.every):
        if listed is None:
            continue
        flat = [(q, h, r.pattern) for r in listed.routes for q, h in zip(r.q, r.heads, strict=True)]
        flat = [flat[i] for i in listed.order]
        assert [q for q, _, _ in flat] == list(listed.q) == sorted(listed.q)
        assert [head for _, head, _ in flat] == list(listed.heads)
        of |= {q: (h, p, kv) for (q, h, p), kv in zip(flat, listed.kv, strict=True)}
    if found.dense is not None:
        assert found.dense.pattern is None
        assert [of[q][1] for q in found.dense.q] == [None] * len(found.dense.q)
        listed = () if found.listed is None else found.listed.q
        assert sorted((*found.dense.q, *listed)) == [*range(len(found.heads))]
    for route in found.every.routes:
        repeats = 1 if len(route.kv) == len(route.q) else ratio
        assert [kv for kv in route.kv for _ in range(repeats)] == [q // ratio for q in route.q]
    return [of[q] for q in sorted(of)]


@pytest.mark.parametrize("make", [straddled, by_content_in_windows])
def test_no_call_groups_heads(make, monkeypatch):
    model = wide_window() if make is by_content_in_windows else fresh("llama")
    ids, mask = left_padded(260)
    made = []
    real = routes.Route.__init__
    monkeypatch.setattr(
        routes.Route, "__init__", lambda *args: (made.append(args[1]), real(*args))[1]
    )
    routes.group_heads.cache_clear()
    with hfsparse.patch(model, make(model)):
        assert made
        made.clear()
        routes.group_heads.cache_clear()
        first = forward(model, ids[:, :200], mask[:, :200])
        forward(model, ids[:, 200:], mask, cache=first.past_key_values)
        generate(model, ids, mask, new=6)
    assert not made
