"""Method moa: rules, what they drop, and plans that hold their bounds, run and resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.lists import PAGE, BlockLists, Grid
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Plan
from hfsparse.profiler.methods import moa
from hfsparse.profiler.prompts.calibration import make_prompts
from tests import tiny

LENGTHS = (384, 768)
SETTINGS = dict(
    method="moa",
    lengths=LENGTHS,
    samples=1,
    prefill_density=0.8,
    cache_share=0.8,
    verify=False,
)


@pytest.fixture(autouse=True)
def few_rules(monkeypatch):
    monkeypatch.setattr(moa, "STEPS", 2)


@pytest.fixture(scope="module")
def model():
    return tiny.llama(window=2048)


def test_rules_are_shorter_than_the_longest_prompt_and_in_order():
    each = moa.make_rules(768)
    assert each[0] == Streaming(64, 128)
    assert each[-1] is None
    assert Streaming(64, 128, 0.5) in each
    assert all(r.recent + r.recent_per_token * 768 < 768 for r in each[:-1])
    lines = [(r.recent, r.recent_per_token) for r in each[:-1]]
    assert lines == sorted(set(lines))
    cross = moa.find_crossing(each)
    assert not cross[-1].any()
    for i, (a, b) in enumerate(lines):
        for j, (c, d) in enumerate(lines):
            assert cross[i, j] == ((a - c) * (b - d) < 0)


@pytest.mark.parametrize(
    "rule", [Streaming(64, 130), Streaming(10, 3, 0.25), Streaming(0, 70, 0.5)]
)
def test_what_a_rule_drops_is_what_its_mask_drops(rule):
    L, block = 300, moa.BLOCK
    mask = BlockLists.of(Grid.causal(1, L), 1, band=rule.band).mask()[0, 0].numpy()
    causal = np.tri(L, dtype=bool)
    share = moa.share_dropped(rule, L)
    assert share.shape == (5, 5)
    for i in range(5):
        for j in range(i + 1):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            lost = (causal[at] & ~mask[at]).sum() / causal[at].sum()
            assert share[i, j] == pytest.approx(lost, abs=1e-6)
    assert not moa.share_dropped(None, L).any()


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["mha", "gqa3", "gqa4"])
def test_a_plan_holds_its_bounds_at_every_length_and_runs_as_it_says(heads):
    q_heads, kv_heads = heads
    shape = dict(
        num_attention_heads=q_heads, num_key_value_heads=kv_heads, hidden_size=16 * q_heads
    )
    model = tiny.llama(window=2048, **shape)
    plan = hfsparse.profile(model, tiny.tokenizer(), **SETTINGS)
    plan.check(model)
    assert plan.made["chosen"]["length"] == 1536
    assert set(plan.expected) == {384, 768, 1536}
    for layer in plan.layers:
        assert len({*layer.prefill}) <= 2
        assert {*layer.cache} <= {*layer.prefill}
    ids = make_prompts(tiny.tokenizer(), 1536, 1, 3)[0].ids
    for length, expected in plan.expected.items():
        assert expected["pair_density"] <= SETTINGS["prefill_density"] + 1e-3
        assert expected["cache_share"] <= SETTINGS["cache_share"] + 1e-3
        with hfsparse.patch(model, plan) as handle, torch.no_grad():
            cache = model(ids[:, :length]).past_key_values
            held = handle.stats().cache_share
            model(ids[:, -1:], past_key_values=cache)
            stats = handle.stats()
        assert stats.pair_density == pytest.approx(expected["pair_density"], abs=1e-3)
        assert stats.block_density == pytest.approx(expected["block_density"], abs=1e-3)
        assert held == pytest.approx(expected["cache_share"], abs=PAGE / length)
        assert stats.decode_share == pytest.approx(expected["decode_share"], abs=2e-3)


def test_a_run_killed_at_each_stage_goes_on_and_ends_in_the_same_plan(model, tmp_path, monkeypatch):
    out, left = tmp_path / "plan.yaml", {}

    def metered(name: str, works) -> None:
        def call(*args):
            if left[name] == 0:
                raise KeyboardInterrupt
            left[name] -= 1
            return works(*args)

        monkeypatch.setattr(moa, name, call)

    for name in ("measure_costs", "pareto", "measure_losses"):
        metered(name, getattr(moa, name))
    stages = [(1, 0, 0), (1, 0, 0), (0, 1, 0)]  # a prompt each, then the solver's answer
    for calls in stages:
        left.update(zip(("measure_costs", "pareto", "measure_losses"), calls, strict=True))
        with pytest.raises(KeyboardInterrupt):
            hfsparse.profile(model, tiny.tokenizer(), out=out, **SETTINGS)
        assert not out.exists()
        assert not any(left.values())
    left.update(measure_losses=1)
    resumed = hfsparse.profile(model, tiny.tokenizer(), out=out, **SETTINGS)
    left.update(measure_costs=2, pareto=1, measure_losses=1)
    whole = hfsparse.profile(model, tiny.tokenizer(), **SETTINGS)
    assert resumed.hash() == whole.hash() == Plan.load(out).hash()
    assert resumed.made["chosen"] == whole.made["chosen"]


def test_without_room_in_the_window_other_prompts_of_the_longest_length_decide():
    model = tiny.llama(window=1024)
    chosen = hfsparse.profile(model, tiny.tokenizer(), **SETTINGS).made["chosen"]
    assert (chosen["length"], chosen["unseen_length"]) == (768, False)


def test_budgets_that_can_not_be_met_say_what_to_give(model):
    with pytest.raises(UsageError, match=r"pair density 0\.1.*Give larger budgets, or longer"):
        hfsparse.profile(model, tiny.tokenizer(), **{**SETTINGS, "prefill_density": 0.1})
