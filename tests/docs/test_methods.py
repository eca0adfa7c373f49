"""Every method that docs/methods.md names runs from the words it gives: a prompt and three steps.

What the words mean is held against definitions elsewhere (`tests/patterns`, `tests/selectors`,
`tests/evictions`, `tests/patcher`).
"""

from dataclasses import replace

import pytest
import torch
import yaml

import hfsparse
from hfsparse.evictions import EVICTIONS
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.plan.extend import DualChunk
from hfsparse.plan.files import DataFile
from hfsparse.plan.kept import KEPT
from hfsparse.selectors import SELECTORS
from tests.docs.pages import DOCS, code, rows
from tests.patcher.families import fresh, tokens
from tests.patcher.runs import generate
from tests.patterns.matrix import table_of

KINDS = PATTERNS, SELECTORS, EVICTIONS, KEPT
LENGTH = 1500  # of which each of the words leaves something out
WORDS = [
    word
    for _, plan, _ in rows(DOCS / "methods.md", "By name")
    for word in code(plan)
    if ":" in word
]


def plan_of(model, said: str) -> tuple[Plan, str | None]:
    """A plan in which all heads follow what is said, and the figure of `stats` that tells it."""
    full, raw = Plan.full(ModelId.of(model)), yaml.safe_load(said)
    if "skip" in raw:
        return replace(full, skip=raw["skip"]), None
    if "extend" in raw:
        trained = raw["extend"]["trained"]
        assert raw["extend"] == {"kind": "dca", "trained": trained}
        return replace(full, extend=DualChunk(trained)), None
    kind, data = raw.pop("kind"), {}
    it = next(kinds[kind] for kinds in KINDS if kind in kinds)(**raw)
    queries, keys = (("it",) * n for n in (full.model.q_heads, full.model.kv_heads))
    first = words = full.layers[0]
    if kind == "streaming":
        first = layer = Layer(queries, keys, ("ring",) * len(keys))
        figure = "cache_share"
    elif kind in PATTERNS:
        first = layer = replace(words, prefill=queries)
        figure = "pair_density"
    elif kind in SELECTORS:
        layer, figure = replace(words, decode=keys), "decode_share"
        first = replace(words, decode=("quest",) * len(keys)) if kind == "reuse" else layer
    else:
        decode = ("kept",) * len(keys) if kind in EVICTIONS else words.decode
        first = layer = Layer(words.prefill, keys, decode)
        figure = "cache_share"
    if hasattr(it, "data"):
        table = table_of(it, full.model.layers, len(keys), full.model.head_dim)
        data[it.data] = DataFile.of(f"{it.data}.safetensors", table)
    patterns = {"it": it, "quest": SELECTORS["quest"]()}
    layers = (first, *[layer] * (full.model.layers - 1))
    return replace(full, patterns=patterns, layers=layers, data=data), figure


@pytest.mark.parametrize("said", WORDS)
def test_a_method_runs_from_a_plan(said):
    model, ids = fresh("llama", head_dim=32), tokens(1, LENGTH)
    plan, figure = plan_of(model, said)
    with hfsparse.patch(model, plan) as handle:
        got = generate(model, ids, new=4)
        stats = handle.stats()
    assert torch.stack(got.logits).isfinite().all()
    if figure is not None:
        assert getattr(stats, figure) < 1


def test_every_kind_is_named():
    named = {yaml.safe_load(word).get("kind") for word in WORDS}
    assert named >= {kind for kinds in KINDS for kind in kinds}
