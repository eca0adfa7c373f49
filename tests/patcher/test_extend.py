"""Rows longer than a model was trained on: a plan's `extend`, against its definition."""

from __future__ import annotations

from dataclasses import replace
from math import isnan

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, PhiConfig, PhiForCausalLM

import hfsparse
from hfsparse.errors import PatchError, PlanError
from hfsparse.plan.extend import DualChunk
from tests.patcher.families import (
    FAMILIES,
    GROW,
    VS,
    fresh,
    full,
    left_padded,
    plan_of,
    rotated,
    tiny,
    tokens,
)
from tests.patcher.runs import both, close, continue_with, far, forward, generate, same_generation

PARTIAL = PhiForCausalLM, PhiConfig, 4, 2, dict(partial_rotary_factor=0.5)
COHERE = CohereForCausalLM, CohereConfig, 4, 2, {}
RULE = DualChunk(256)  # chunks of 128 keys, queries at most 192 tokens from the first


def whole(model):
    return full(model)


def dropping(model):
    """Rings beside full heads that stream, stride or read all."""

    def layer(index, windowed):
        q, kv = model.config.num_attention_heads, model.config.num_key_value_heads
        if windowed:
            return ["full"] * q, ["full"] * kv, ["full"] * kv
        prefill = [*["near"] * (q // kv), *["far", "steps", "full"] * q][:q]
        return prefill, ["near", *["full"] * (kv - 1)], ["ring", *["full"] * (kv - 1)]

    strided = ("strided", dict(sink=8, recent=20, stride=3, random=2))
    near = ("streaming", dict(sink=5, recent=200))
    return plan_of(model, layer, near=near, far=GROW, steps=strided)


PLANS = {plan.__name__: plan for plan in (whole, dropping)}
every_plan = pytest.mark.parametrize("plan", PLANS)


def extended(model, plan, rule=RULE):
    return replace(PLANS[plan](model), extend=rule)


@pytest.mark.parametrize(
    ("family", "plan"), [("llama", "whole"), ("llama", "dropping"), ("gemma3", "dropping")]
)
def test_prompt_and_steps_equal_the_definition(family, plan):
    """Rows of 800 and 787 tokens, 3 times what was trained, and what is said behind them.

    Layers with a window of the model's own are as they are.
    """
    model = tiny(family)
    ids, mask = left_padded(800, (0, 13))
    got, want, _ = both(
        model, extended(model, plan), lambda m, cache: generate(m, ids, mask, new=3, **cache)
    )
    same_generation(got, want)
    plain = generate(model, ids, mask, new=1)
    far(got.logits[0], plain.logits[0])


@every_plan
def test_a_prompt_in_chunks_and_later_turns_equal_the_definition(plan):
    model = tiny("llama")
    ids, mask = left_padded(470, (0, 7))

    def talk(m, cache):
        first = generate(m, ids, mask, new=2, prefill_chunk_size=200, **cache)
        cache = first.past_key_values
        mask_, outs = continue_with(ids, mask, 1), [*first.logits]
        for turn, new in enumerate((9, 40)):  # a step, a chunk
            mask_ = continue_with(mask_, mask_, new) if turn else continue_with(ids, mask, new + 1)
            more = forward(m, tokens(2, new, seed=turn), mask_, cache=cache)
            outs += more.logits.unbind(1)
        return torch.stack(outs, 1)

    got, want, _ = both(model, extended(model, plan), talk)
    close(got, want)


@pytest.mark.parametrize(
    "rule",
    [DualChunk(400, chunk=384, local=256), DualChunk(300, chunk=288, local=32, mscale=0.1)],
    ids=["overlap", "mscale"],
)
def test_other_chunks_and_sharper_logits_equal_the_definition(rule):
    """Of chunks that overlap by more than half, no query stands beyond the one before its own."""
    model = tiny("qwen2")
    ids, mask = left_padded(600, (3,))
    got, want, _ = both(
        model,
        extended(model, "whole", rule),
        lambda m, cache: generate(m, ids, mask, new=2, **cache),
    )
    same_generation(got, want)


@every_plan
def test_rows_that_a_model_knows_change_no_bit(plan):
    model = tiny("llama")
    ids, mask = left_padded(RULE.reach - 3, (0, 7))
    found = []
    for rule in (RULE, None):
        with hfsparse.patch(model, extended(model, plan, rule)):
            found.append(generate(model, ids, mask, new=5))
    assert all(map(torch.equal, found[0].logits, found[1].logits))


def test_a_short_row_beside_a_long_one_is_as_it_is_alone():
    model = tiny("llama")
    ids, mask = tokens(2, 500), torch.ones(2, 500, dtype=torch.long)
    mask[1, :350] = 0
    with hfsparse.patch(model, extended(model, "dropping")):
        together = generate(model, ids, mask, new=3)
        alone = generate(model, ids[1:, 350:], new=3)
    close(torch.stack(together.logits, 1)[1:], torch.stack(alone.logits, 1))


def test_the_patch_says_how_rows_are_extended_and_is_undone():
    model = tiny("llama")
    ids = tokens(1, 300)
    before = forward(model, ids).logits
    with hfsparse.patch(model, extended(model, "whole")) as handle:
        assert "rows of more than 193 tokens, 256 trained: dca" in handle.explain()
        assert isnan(handle.stats().pair_density)
        far(forward(model, ids).logits, before)
    assert torch.equal(forward(model, ids).logits, before)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: rotated("dynamic"), "rope dynamic turns by a call's length"),
        (lambda: fresh("partial"), "rope turns 8 of a head's 16 dims"),
        (lambda: fresh("cohere"), "layer 0 turns queries in another way than Llama's rope"),
    ],
    ids=["dynamic", "partial", "interleaved"],
)
def test_rope_that_can_t_be_turned_is_refused(monkeypatch, build, why):
    monkeypatch.setitem(FAMILIES, "partial", PARTIAL)
    monkeypatch.setitem(FAMILIES, "cohere", COHERE)
    model = build()
    with pytest.raises(PatchError, match=f"can't be extended: .*{why}"):
        hfsparse.patch(model, extended(model, "whole"))
    assert forward(model, tokens(1, 5)).logits.isfinite().all()
    hfsparse.patch(model, whole(model)).undo()


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_scaled_rope_is_turned_as_it_turns(rope):
    """A query that was turned is the query at the place where it then stands: patch looks."""
    model = rotated(rope)
    hfsparse.patch(model, extended(model, "whole")).undo()


def test_heads_that_look_at_scores_are_refused():
    model = tiny("llama")
    q, kv = ["vs"] * 4, ["full"] * 2
    plan = plan_of(model, lambda *_: (q, kv, kv), vs=VS)
    with pytest.raises(PlanError, match="vs is vertical_slash, which looks at scores"):
        replace(plan, extend=RULE).validate()
