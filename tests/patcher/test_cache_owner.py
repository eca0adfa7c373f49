"""A cache belongs to a plan: going on with it anywhere else is one clear error, never an answer."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import Cache, DynamicLayer, QuantoQuantizedLayer

import hfsparse
from hfsparse.errors import CacheError, PatchError
from hfsparse.runtime.cache.layer import CacheLayer
from tests.patcher.families import choosing, full, left_padded, mixed, streaming, tiny, tokens
from tests.patcher.oracle import CACHE, oracle, whole_cache
from tests.patcher.runs import close, continue_with, forward, generate, same_generation
from tests.support.models import exists
from tests.support.models import tiny as supported

GONE = "filled under an hfsparse patch that is no longer on the model.*new cache"


def go_on_is_refused(model, cache, error=CacheError, match=GONE):
    """Both ways of going on with a cache raise."""
    for new in (1, 20):
        with pytest.raises(error, match=match):
            forward(model, tokens(1, new), cache=copy.deepcopy(cache))
    with pytest.raises(error, match=match):
        generate(model, tokens(1, 90), cache=copy.deepcopy(cache), new=2)


def filled(model, length=80):
    return forward(model, tokens(1, length)).past_key_values


def test_a_cache_is_refused_after_undo():
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)):
        cache = filled(model)
    go_on_is_refused(model, cache)


def test_a_cache_is_refused_under_another_patch_even_of_the_same_plan():
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)):
        cache = filled(model)
    for plan in (streaming(model), mixed(model), None):
        with hfsparse.patch(model, plan):
            go_on_is_refused(model, cache)


def test_a_cache_is_refused_by_another_model_that_is_not_patched():
    model = tiny("llama")
    twin = copy.deepcopy(model)
    with hfsparse.patch(model, streaming(model)):
        go_on_is_refused(twin, filled(model))


def test_nothing_runs_after_the_user_set_another_attention():
    model = copy.deepcopy(tiny("llama"))
    with hfsparse.patch(model, streaming(model)):
        cache = filled(model)
        for name in ("sdpa", "eager"):
            model.set_attn_implementation(name)
            told = f"set to {name} under an hfsparse patch: call handle.undo"
            go_on_is_refused(model, cache, PatchError, told)
            with pytest.raises(PatchError, match=told):
                generate(model, tokens(1, 9))
    assert model.config._attn_implementation == "sdpa"
    go_on_is_refused(model, cache)


def test_a_cache_of_the_unpatched_model_is_refused():
    model = tiny("llama")
    cache = filled(model)
    with hfsparse.patch(model, streaming(model)):
        go_on_is_refused(
            model, cache, CacheError, "holds 80 tokens of the unpatched model.*new cache"
        )


def test_a_cache_survives_an_undone_patch_of_another_model():
    model, twin = tiny("llama"), copy.deepcopy(tiny("llama"))
    with hfsparse.patch(model, streaming(model)):
        cache = filled(model)
        want = forward(model, tokens(1, 1), cache=copy.deepcopy(cache)).logits
        hfsparse.patch(twin, mixed(twin)).undo()
        assert torch.equal(forward(model, tokens(1, 1), cache=cache).logits, want)


def generate_and(model, act):
    """A generation in the middle of which `act` is called, after its third token."""

    def processor(ids, scores):
        if ids.shape[1] == 83:
            act()
        return scores

    return generate(model, tokens(1, 80), logits_processor=[processor])


def test_a_patch_inside_a_running_generation_is_refused():
    model = copy.deepcopy(tiny("llama"))
    with pytest.raises(CacheError, match="holds 83 tokens of the unpatched model"):
        generate_and(model, lambda: hfsparse.patch(model, streaming(model)))
    hfsparse.unpatch(model)
    generate(model, tokens(1, 80))


def test_an_undo_inside_a_running_generation_is_refused():
    model = tiny("llama")
    handle = hfsparse.patch(model, streaming(model))
    with pytest.raises(CacheError, match=GONE):
        generate_and(model, handle.undo)
    generate(model, tokens(1, 80))


def test_another_attention_inside_a_running_generation_is_refused():
    model = copy.deepcopy(tiny("llama"))
    with (
        hfsparse.patch(model, streaming(model)),
        pytest.raises(PatchError, match="set to sdpa under an hfsparse patch"),
    ):
        generate_and(model, lambda: model.set_attn_implementation("sdpa"))


def stop(error):
    def hook(*args):
        raise error

    return hook


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("llama", 2), ("gemma4_shared", 3)])
def test_a_forward_interrupted_half_way_breaks_its_cache(error, family, layer):
    """Behind the last attention, too, and in a layer that reads another's keys: all are stored."""
    if not exists(family):
        pytest.skip("not in this transformers")
    model = supported(family)
    with hfsparse.patch(model, streaming(model)):
        cache = filled(model)
        hook = model.model.layers[layer].mlp.register_forward_pre_hook(stop(error))
        with pytest.raises(error):
            forward(model, tokens(1, 20), cache=cache)
        hook.remove()
        go_on_is_refused(model, cache, CacheError, "this cache is broken.*new cache")
        close(forward(model, tokens(1, 20)).logits, forward(model, tokens(1, 20)).logits)


@pytest.mark.parametrize(("new", "back"), [(1, 0), (20, 1)])
def test_an_attention_interrupted_in_the_last_layer_breaks_its_cache(monkeypatch, new, back):
    """Every layer has counted the new tokens, but the last stored none; no crop hides it."""
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)):
        cache = filled(model)
        for store in cache.layers[-1].stores:
            monkeypatch.setattr(store, "append", stop(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            forward(model, tokens(1, new), cache=cache)
        monkeypatch.undo()
        if back:
            cache.crop(-back)
        go_on_is_refused(model, cache, CacheError, "this cache is broken")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_no_owner_behind(error):
    """After undo, in the same thread: nothing may still think that the patch runs."""
    model = tiny("llama")
    handle = hfsparse.patch(model, streaming(model))
    cache = filled(model)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(stop(error))
    with pytest.raises(error):
        forward(model, tokens(1, 20))
    hook.remove()
    handle.undo()
    go_on_is_refused(model, cache)


def test_a_wrong_input_leaves_no_owner_behind():
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)):
        cache = filled(model)
        with pytest.raises(IndexError):
            forward(model, torch.full((1, 9), 12345))
    go_on_is_refused(model, cache)


def test_a_refused_mask_leaves_the_cache_usable():
    model = tiny("llama")
    ids, mask = left_padded(80)
    with hfsparse.patch(model, streaming(model)):
        cache = forward(model, ids, mask).past_key_values
        more, longer = tokens(3, 5), continue_with(ids, mask, 5)
        spare = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"covers 80 columns.*85"):
            model(more, attention_mask=mask, **{CACHE: cache})
        got = forward(model, more, longer, cache=cache).logits
        assert torch.equal(got, forward(model, more, longer, cache=spare).logits)


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_another_batch_size_is_refused_before_anything_changes(family):
    """A linear layer that comes first would take any, or fail by itself."""
    if family == "lfm2" and not hasattr(cache_utils, "LinearAttentionLayer"):
        pytest.skip("hybrids are followed from transformers 5.17 on")
    model = supported(family) if family == "lfm2" else tiny(family)
    with hfsparse.patch(model, streaming(model)):
        cache = filled(model)
        spare = copy.deepcopy(cache)
        with pytest.raises(CacheError, match="holds 1 rows and the input has 2"):
            forward(model, tokens(2, 1), cache=cache)
        got, want = (forward(model, tokens(1, 1), cache=each).logits for each in (cache, spare))
        assert torch.equal(got, want)


def test_a_tuple_as_cache_is_refused():
    model = tiny("llama")
    with (
        hfsparse.patch(model),
        pytest.raises(CacheError, match="got a tuple as cache: give a transformers Cache"),
    ):
        model.model(tokens(1, 5), **{CACHE: ((torch.zeros(1, 2, 3, 16),) * 2,) * 3})


def test_quantised_and_offloaded_caches_are_refused():
    model = tiny("llama")
    quantised = QuantizedCache.__new__(QuantizedCache)
    quantised.layers, quantised.layer_class_to_replicate = [], DynamicLayer
    quantised.offloading = False
    offloaded = DynamicCache()
    offloaded.offloading = True
    layered = Cache(layers=[QuantoQuantizedLayer.__new__(QuantoQuantizedLayer)] * 3)
    cases = (
        (quantised, "a QuantizedCache"),
        (layered, "a QuantoQuantizedLayer"),
        (offloaded, "an offloaded cache"),
    )
    with hfsparse.patch(model):
        for cache, name in cases:
            with pytest.raises(
                CacheError, match=rf"{name} is not supported.*use the default cache.*host: true"
            ):
                forward(model, tokens(1, 5), cache=cache)
        with pytest.raises(CacheError, match="an offloaded cache is not supported"):
            generate(model, tokens(1, 5), cache_implementation="offloaded")


def test_the_users_own_empty_cache_is_filled():
    model, ids = tiny("llama"), tokens(1, 60)
    for empty in (DynamicCache(), DynamicCache(config=model.config)):
        with hfsparse.patch(model, streaming(model)):
            want = generate(model, ids)
            out = generate(model, ids, cache=empty)
            assert out.past_key_values is empty
            assert all(isinstance(layer, CacheLayer) for layer in empty.layers)
            assert empty.get_seq_length() == 60 + 11
            same_generation(out, want)


def test_a_cache_given_by_position_is_filled_too():
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)):
        cache = DynamicCache()
        model.model(tokens(1, 30), None, None, cache)
        assert all(isinstance(layer, CacheLayer) for layer in cache.layers)
        assert cache.get_seq_length() == 30


def test_static_caches_hold_our_layers():
    model = tiny("llama")
    ids, mask = left_padded(260)
    with oracle(model, mixed(model)):
        want = generate(model, ids, mask, **whole_cache())
    with hfsparse.patch(model, mixed(model)):
        got = generate(model, ids, mask, cache_implementation="static")
        assert isinstance(got.past_key_values, StaticCache)
        same_generation(got, want)
        own = StaticCache(config=model.config, max_cache_len=300)
        same_generation(generate(model, ids, mask, cache=own), want)
        assert all(isinstance(layer, CacheLayer) for layer in own.layers)


def test_a_copied_cache_serves_as_a_prefix_many_times():
    model = tiny("llama")
    ids, mask = left_padded(260)
    ends = [tokens(3, new, seed=new) for new in (1, 9, 40)]

    def branches(cache):
        prefix = forward(model, ids, mask, **cache).past_key_values
        return [
            forward(
                model,
                end,
                continue_with(ids, mask, end.shape[1]),
                cache=copy.deepcopy(prefix),
            ).logits
            for end in [*ends, ends[0]]
        ]

    with oracle(model, mixed(model)):
        want = branches(whole_cache())
    with hfsparse.patch(model, mixed(model)):
        got = branches({})
    for ours, truth in zip(got, want, strict=True):
        close(ours, truth)
    assert torch.equal(got[0], got[3])


def stock_pairs(model, ids):
    return [(layer.keys, layer.values) for layer in forward(model, ids).past_key_values.layers]


@pytest.mark.parametrize("plan", [full, choosing])
def test_a_cache_that_keeps_everything_can_be_rebuilt_as_the_stock_one(plan):
    """From its pairs: no token more than were read, heads in order, though buffers have room."""
    model = tiny("qwen2")
    ids, more = tokens(2, 100), tokens(2, 1, seed=1)
    with hfsparse.patch(model, plan(model)):
        cache = forward(model, ids).past_key_values
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
    for ours, stock in zip(pairs, stock_pairs(model, ids), strict=True):
        for got, want in zip(ours, stock, strict=True):
            close(got, want)
    make = getattr(DynamicCache, "from_legacy_cache", DynamicCache)
    copied = make([(k.clone(), v.clone()) for k, v in pairs])
    assert copied.get_seq_length() == 100
    want = forward(model, torch.cat([ids, more], 1)).logits[:, -1:]
    close(forward(model, more, cache=copied).logits, want)


@pytest.mark.parametrize("why", ["rings", "padding", "window"])
def test_a_cache_that_does_not_is_never_taken_for_the_stock_one(why):
    model = tiny("mistral-window" if why == "window" else "llama")
    plan = streaming(model) if why == "rings" else None
    ids, mask = left_padded(80) if why == "padding" else (tokens(1, 80), None)
    with hfsparse.patch(model, plan):
        cache = forward(model, ids, mask).past_key_values
        for name in ("keys", "values"):
            with pytest.raises(CacheError, match=r"can't be read or rebuilt.*copy\.deepcopy"):
                [getattr(layer, name) for layer in cache.layers]
        longer = None if mask is None else continue_with(ids, mask, 1)
        forward(model, tokens(len(ids), 1), longer, cache=copy.deepcopy(cache))
    assert repr(cache)
