"""Each way in which a patch could quietly not apply is seen: by an error or by other numbers.

Every test here breaks one link of the patch on purpose: then the model refuses to run, or
`holds`, the comparison that all equivalence tests rest on, fails.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import hfsparse
from hfsparse import kernels, patcher
from hfsparse.errors import CacheError, UsageError
from hfsparse.plan.kept import Full
from hfsparse.runtime import masks
from hfsparse.runtime.cache import host
from hfsparse.runtime.call import use_tables
from tests.patcher.families import left_padded, mixed, tiny
from tests.patcher.oracle import oracle, whole_cache
from tests.patcher.runs import close, forward, generate, same_generation

IDS, MASK = left_padded(260)


@pytest.fixture
def model():
    """A model of this test's own: it will be broken."""
    return copy.deepcopy(tiny("llama"))


@pytest.fixture
def sparse(model):
    """Its mixed plan, patched in."""
    handle = hfsparse.patch(model, mixed(model))
    yield handle
    handle.undo()


@pytest.fixture
def hosting(model, monkeypatch):
    """The same with the keys of chosen pages in host memory: its steps ask all tables."""
    monkeypatch.setattr(host, "why_not", lambda device: None)
    plan = mixed(model)
    layers = tuple(
        dataclasses.replace(
            layer,
            cache=tuple(
                "host" if read == "quest" else kept
                for kept, read in zip(layer.cache, layer.decode, strict=True)
            ),
        )
        for layer in plan.layers
    )
    patterns = {**plan.patterns, "host": Full(host=True)}
    handle = hfsparse.patch(model, dataclasses.replace(plan, patterns=patterns, layers=layers))
    yield handle
    handle.undo()


@cache
def truth(below=(0, 0, 0)):
    model = tiny("llama")
    with oracle(model, mixed(model, below)):
        return generate(model, IDS, MASK, new=4, **whole_cache())


def holds(model, below=(0, 0, 0)) -> None:
    """The patched model, as it is, equals the oracle of the mixed plan."""
    same_generation(generate(model, IDS, MASK, new=4), truth(below))


def fails(model, plan, below=(0, 0, 0)) -> None:
    """Another plan patched in is told from the mixed one."""
    with hfsparse.patch(model, plan), pytest.raises(AssertionError):
        holds(model, below)


def test_the_check_holds_when_nothing_is_broken(model, sparse):
    holds(model)


def test_a_dense_answer_does_not_pass(model):
    fails(model, None)


def test_an_attention_name_that_is_not_used_is_noticed(model, sparse):
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(patcher.PatchError, match="set to sdpa under an hfsparse patch"):
        forward(model, IDS, MASK)


@pytest.mark.parametrize("index", [0, 1])
def test_one_layer_switched_back_is_noticed(model, sparse, index):
    """A layer given a config of its own, behind the patch's back."""
    other = copy.deepcopy(model.config)
    other._attn_implementation_internal = "sdpa"
    model.model.layers[index].self_attn.config = other
    with pytest.raises(CacheError, match="another attention function reads it"):
        forward(model, IDS)


def test_the_last_layer_switched_back_is_noticed(model, sparse):
    """No later layer is there to see it: the next call finds the cache broken."""
    other = copy.deepcopy(model.config)
    other._attn_implementation_internal = "sdpa"
    model.model.layers[-1].self_attn.config = other
    cache = forward(model, IDS).past_key_values
    with pytest.raises(CacheError, match="this cache is broken"):
        forward(model, IDS[:, :1], cache=cache)


def test_a_layer_with_a_config_of_its_own_is_refused_by_patch(model):
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    with pytest.raises(patcher.PatchError, match=r"layers \[1\] .* kept their own attention"):
        hfsparse.patch(model, mixed(model))
    assert not patcher.state.is_patched(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_missing_hook_is_noticed(model, sparse):
    """Without the hook the model makes a stock cache, and nobody says whose forward it is."""
    model.model._forward_pre_hooks.clear()
    with pytest.raises(CacheError, match="no longer on the model"):
        forward(model, IDS)


def test_a_missing_hook_on_attention_is_noticed(model, sparse):
    """Without it a model in training keeps its stock cache, and the second call is refused."""
    model.train()
    model.model.layers[0].self_attn._forward_pre_hooks.clear()
    cache = forward(model, IDS).past_key_values
    with pytest.raises(CacheError, match="holds 260 tokens of the unpatched"):
        forward(model, IDS[:, :1], cache=cache)


def test_a_missing_generate_wrapper_is_no_loss(model, sparse):
    """`_prepare_cache_for_generation` only reserves room; the hook alone gives the same answer."""
    wrapper = model.__dict__.pop("_prepare_cache_for_generation")
    holds(model)
    model._prepare_cache_for_generation = wrapper


def test_another_attention_function_under_our_name_is_noticed(model, sparse):
    own = AttentionInterface()[masks.NAME]
    AttentionInterface.register(masks.NAME, AttentionInterface()["sdpa"])
    try:
        with pytest.raises(CacheError, match="another attention function reads it"):
            forward(model, IDS)
    finally:
        AttentionInterface.register(masks.NAME, own)


def test_an_ignored_padding_mask_is_noticed(model, sparse):
    AttentionMaskInterface.register(masks.NAME, lambda *args, **kwargs: None)
    try:
        with pytest.raises(AssertionError):
            holds(model)
    finally:
        AttentionMaskInterface.register(masks.NAME, masks.mask_start)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_layer_with_another_layers_words_is_noticed(model, index):
    plan = mixed(model)
    layers = list(plan.layers)
    layers[index] = layers[(index + 1) % 3]
    assert layers[index] != plan.layers[index]
    fails(model, dataclasses.replace(plan, layers=tuple(layers)))


def test_prefill_words_swapped_between_heads_are_noticed(model):
    plan = mixed(model)
    first = plan.layers[0]
    free = [h for h in range(4) if first.cache[h // 2] == "full"]
    words = list(first.prefill)
    words[free[0]], words[free[1]] = words[free[1]], words[free[0]]
    assert words != list(first.prefill)
    other = (dataclasses.replace(first, prefill=tuple(words)), *plan.layers[1:])
    fails(model, dataclasses.replace(plan, layers=other))


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
    fails(model, dataclasses.replace(plan, patterns=patterns))


@pytest.mark.parametrize("which", ["prefill", "decode", "cache"])
def test_a_threshold_ignored_is_noticed(model, which):
    below = tuple(9999 if each == which else 0 for each in ("prefill", "decode", "cache"))
    fails(model, mixed(model), below)
    with hfsparse.patch(model, mixed(model, below)):
        holds(model, below)


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
    model.set_attn_implementation(masks.NAME)
    with pytest.raises(ValueError, match="set to hfsparse without a plan: choose another"):
        forward(model, IDS, MASK)


def test_close_fails_on_a_difference_and_on_nan():
    a = torch.zeros(1, 2, 3)
    close(a, a)
    for wrong in (a + 2e-5, a / 0):
        with pytest.raises(AssertionError):
            close(wrong, a)


@pytest.mark.parametrize("name", kernels.Tables._fields)
def test_a_table_in_which_no_kernel_can_serve_is_an_error(model, hosting, name):
    """Nothing else is taken in the place of what was chosen, in any of the seven tables."""
    lame = kernels.Kernel("lame", None, lambda need: "needs a leg")
    with (
        use_tables(kernels.TABLES._replace(**{name: (lame,)})),
        pytest.raises(UsageError, match="lame: needs a leg"),
    ):
        generate(model, IDS, MASK, new=4)
    holds(model)


@pytest.mark.parametrize("name", kernels.Tables._fields)
def test_the_first_kernel_that_can_is_the_one_that_runs(model, hosting, name):
    ran = []
    table = getattr(kernels.TABLES, name)

    def run(*args, **more):
        ran.append(name)
        return table[-1].run(*args, **more)

    first = kernels.Kernel("first", run, lambda need: None)
    with use_tables(kernels.TABLES._replace(**{name: (first, *table)})):
        holds(model)
    assert ran
    ran.clear()
    holds(model)
    assert not ran
