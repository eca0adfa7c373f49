"""Each way in which a patch could quietly not apply is seen: by an error or by other numbers.

Every test here breaks one link of the patch on purpose. `holds` is what all equivalence tests
rest on; it must fail, or the model must refuse to run.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import hfsparse
from hfsparse import attention, patcher
from hfsparse.cache import CacheError
from tests.patcher.families import left_padded, mixed, tiny
from tests.patcher.oracle import oracle, whole_cache
from tests.patcher.runs import close, forward, generate, same_generation

IDS, MASK = left_padded(260)


@pytest.fixture
def model():
    return tiny("llama")


def holds(model, plan) -> None:
    """The patched model, as it is, equals the oracle of the plan."""
    state = model.get_decoder().__dict__.pop("_hfsparse")
    name = model.config._attn_implementation
    hooks = [(d, dict(d)) for d in (model.model._forward_hooks, model.model._forward_pre_hooks)]
    shadowed = model.__dict__.pop("_prepare_cache_for_generation")
    for hook, _ in hooks:
        hook.clear()
    with oracle(model, plan):
        want = generate(model, IDS, MASK, new=4, **whole_cache())
    for hook, content in hooks:
        hook.update(content)
    model.config._attn_implementation_internal = name
    model.get_decoder()._hfsparse = state
    model._prepare_cache_for_generation = shadowed
    same_generation(generate(model, IDS, MASK, new=4), want)


def test_the_check_holds_when_nothing_is_broken(model):
    with hfsparse.patch(model, mixed(model)):
        holds(model, mixed(model))


def test_a_dense_answer_does_not_pass(model):
    with hfsparse.patch(model), pytest.raises(AssertionError):
        holds(model, mixed(model))


def test_an_attention_name_that_is_not_used_is_noticed(model):
    with (
        hfsparse.patch(model, mixed(model)),
        pytest.MonkeyPatch.context() as broken,
    ):
        broken.setattr(model.config, "_attn_implementation_internal", "sdpa")
        with pytest.raises(patcher.PatchError, match="set to sdpa under an hfsparse patch"):
            forward(model, IDS, MASK)


def test_one_layer_switched_back_is_noticed(model):
    """A layer with a config of its own, set to sdpa behind the patch's back."""
    import copy

    layer = model.model.layers[1].self_attn
    with hfsparse.patch(model, mixed(model)), pytest.MonkeyPatch.context() as broken:
        other = copy.copy(model.config)
        other._attn_implementation_internal = "sdpa"
        broken.setattr(layer, "config", other)
        with pytest.raises(CacheError, match="another attention function reads it"):
            forward(model, IDS, MASK)


def test_a_layer_with_a_config_of_its_own_is_refused_by_patch(model):
    import copy

    with pytest.MonkeyPatch.context() as odd:
        odd.setattr(model.model.layers[1].self_attn, "config", copy.deepcopy(model.config))
        with pytest.raises(patcher.PatchError, match=r"layers \[1\] .* kept their own attention"):
            hfsparse.patch(model, mixed(model))
    assert not patcher.is_patched(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_missing_hook_is_noticed(model):
    """Without the hook the model makes a stock cache."""
    handle = hfsparse.patch(model, mixed(model))
    handle._patch.hooks[0].remove()
    cache = forward(model, IDS, MASK).past_key_values
    with pytest.raises(ValueError, match="got more keys than queries: this cache does not belong"):
        forward(model, IDS[:, :1], torch.cat([MASK, MASK[:, :1]], 1), cache=cache)
    handle.undo()


def test_a_missing_generate_wrapper_is_no_silent_loss(model):
    """`_prepare_cache_for_generation` only reserves room; the hook alone gives the same answer."""
    with hfsparse.patch(model, mixed(model)):
        want = generate(model, IDS, MASK)
        own = model.__dict__.pop("_prepare_cache_for_generation")
        same_generation(generate(model, IDS, MASK), want)
        model._prepare_cache_for_generation = own


def test_another_attention_function_under_our_name_is_noticed(model):
    with hfsparse.patch(model, mixed(model)):
        AttentionInterface.register(attention.NAME, AttentionInterface()["sdpa"])
        try:
            with pytest.raises(CacheError, match="another attention function reads it"):
                forward(model, IDS, MASK)
        finally:
            AttentionInterface.register(attention.NAME, attention.attend)


def test_an_ignored_padding_mask_is_noticed(model, monkeypatch):
    with hfsparse.patch(model, mixed(model)):
        monkeypatch.setitem(
            AttentionMaskInterface._global_mapping, attention.NAME, lambda *a, **kw: None
        )
        with pytest.raises(AssertionError):
            holds(model, mixed(model))


def swapped(plan, **changes):
    return dataclasses.replace(
        plan, layers=tuple(dataclasses.replace(each, **changes) for each in plan.layers)
    )


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_layer_with_another_layers_words_is_noticed(model, index):
    plan = mixed(model)
    layers = list(plan.layers)
    layers[index] = layers[(index + 1) % 3]
    with (
        hfsparse.patch(model, dataclasses.replace(plan, layers=tuple(layers))),
        pytest.raises(AssertionError),
    ):
        holds(model, plan)


def test_prefill_words_swapped_between_heads_are_noticed(model):
    plan = mixed(model)
    first = plan.layers[0]
    free = [h for h in range(4) if first.cache[h // 2] == "full"]
    words = list(first.prefill)
    words[free[0]], words[free[1]] = words[free[1]], words[free[0]]
    assert words != list(first.prefill)
    other = (dataclasses.replace(first, prefill=tuple(words)), *plan.layers[1:])
    with (
        hfsparse.patch(model, dataclasses.replace(plan, layers=other)),
        pytest.raises(AssertionError),
    ):
        holds(model, plan)


@pytest.mark.parametrize("name", ["s", "vs", "blocks", "quest"])
def test_a_pattern_ignored_is_noticed(model, name):
    """The pattern keeps everything instead: each of the four is seen by itself."""
    plan = mixed(model)
    everything = {
        "s": dict(recent=10_000),
        "vs": dict(columns=10_000, diagonals=10_000),
        "blocks": dict(share=1.0),
        "quest": dict(share=1.0),
    }[name]
    patterns = {**plan.patterns, name: dataclasses.replace(plan.patterns[name], **everything)}
    with (
        hfsparse.patch(model, dataclasses.replace(plan, patterns=patterns)),
        pytest.raises(AssertionError),
    ):
        holds(model, plan)


@pytest.mark.parametrize("which", ["prefill", "decode", "cache"])
def test_a_threshold_ignored_is_noticed(model, which):
    limits = {"prefill": 0, "decode": 0, "cache": 0, which: 9999}
    plan = mixed(model, below=tuple(limits[key] for key in ("prefill", "decode", "cache")))
    with hfsparse.patch(model, mixed(model)), pytest.raises(AssertionError):
        holds(model, plan)


def test_a_ring_that_keeps_everything_is_noticed(model):
    """A cache that ignores the plan gives the right tokens and the wrong bytes."""
    with hfsparse.patch(model, mixed(model)) as handle:
        forward(model, IDS, MASK)
        share = handle.stats().cache_share
    with hfsparse.patch(model) as handle:
        forward(model, IDS, MASK)
        assert share < 0.75 * handle.stats().cache_share


def test_our_name_without_a_plan_is_refused(model):
    hfsparse.patch(model).undo()
    model.set_attn_implementation(attention.NAME)
    try:
        with pytest.raises(ValueError, match="set to hfsparse without a plan: choose another"):
            forward(model, IDS, MASK)
    finally:
        model.set_attn_implementation("sdpa")


def test_close_fails_on_a_difference_and_on_nan():
    a = torch.zeros(1, 2, 3)
    close(a, a)
    for wrong in (a + 2e-5, a / 0):
        with pytest.raises(AssertionError):
            close(wrong, a)
