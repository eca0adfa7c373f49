"""Every selector in a patched model: padding, turns, beams, crops, refresh, bytes, graphs."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import hfsparse
from hfsparse.lists import PAGE
from hfsparse.patcher import figures, memory
from hfsparse.selectors.centroids import Centroids
from tests.patcher import families
from tests.patcher.families import fresh, left_padded, tiny, tokens
from tests.patcher.runs import both, close, continue_with, forward, generate, same_generation
from tests.patterns.matrix import SELECTOR_ROWS
from tests.runtime.test_graphs import interpreted, same  # noqa: F401
from tests.selectors.plans import labelled, means_of_labelled, plan_of, refreshed, segmented

# All of quest's; of the others the first, since what they choose `test_selectors` tries.
SETTINGS = {
    name: setting
    for kind, row in SELECTOR_ROWS.items()
    for name, setting in [*row.settings.items()][: None if kind == "quest" else 1]
}
CHOSEN = [name for name in SETTINGS if SETTINGS[name].budget.share < 1]
# A last bit of a key may change what many rounds of k-means make of it, and no oracle and no other
# batch has the same bits: these are tried where both runs have.
SEGMENTS = "centroids_segments"
SETTINGS[SEGMENTS] = SELECTOR_ROWS["centroids"].settings[SEGMENTS]
PADS, LENGTH = (0, 7, 70), 460  # rows of 8, 8 and 7 pages

every_setting = pytest.mark.parametrize("name", [name for name in SETTINGS if name != SEGMENTS])
every_choice = pytest.mark.parametrize("name", CHOSEN)
same_bits = pytest.mark.parametrize("name", [*CHOSEN, SEGMENTS])


@every_setting
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_a_padded_batch_generates_what_the_oracle_does(name, family):
    """GQA of 2, 3, 1, 4 and, beside windows of the model's own, 4 over one kv head."""
    model = tiny(family)
    ids, mask = left_padded(LENGTH, PADS)
    got, want, stats = both(
        model, plan_of(model, SETTINGS[name]), lambda m, c: generate(m, ids, mask, new=8, **c)
    )
    same_generation(got, want)
    assert (stats.decode_share < 1) == (SETTINGS[name].budget.share < 1)


@every_setting
def test_a_padded_row_is_the_row_alone(name):
    model = tiny("qwen2")
    ids, mask = left_padded(LENGTH, PADS)
    with hfsparse.patch(model, plan_of(model, SETTINGS[name])):
        together = generate(model, ids, mask)
        for b, pad in enumerate(PADS):
            alone = generate(model, ids[b : b + 1, pad:])
            assert alone.sequences[0].tolist() == together.sequences[b, pad:].tolist()
            close(torch.stack(alone.logits, 1), torch.stack(together.logits, 1)[b : b + 1])


@every_choice
@pytest.mark.parametrize("below", [0, 455, 9999])
def test_rows_below_the_threshold_read_every_page(name, below):
    model = tiny("llama")
    ids, mask = left_padded(LENGTH, PADS)
    plan = plan_of(model, SETTINGS[name], below)
    got, want, stats = both(model, plan, lambda m, cache: generate(m, ids, mask, **cache))
    same_generation(got, want)
    assert (stats.decode_share == 1) == (below == 9999)


@every_choice
def test_beams_equal_the_oracles(name):
    model = tiny("qwen2")
    ids, mask = left_padded(LENGTH, PADS)
    plan = plan_of(model, SETTINGS[name])
    more = dict(num_beams=3, new=8, output_logits=False, return_dict_in_generate=False)
    got, want, _ = both(model, plan, lambda m, cache: generate(m, ids, mask, **more, **cache))
    assert got.tolist() == want.tolist()


@every_choice
@pytest.mark.parametrize("new", [3, 16, 40], ids=["few", "decode", "chunk"])
def test_turns_and_crops_equal_the_oracles(name, new):
    """More tokens at a time, taken back with all but the first of their steps, and others."""
    model = tiny("llama")
    ids, mask = left_padded(LENGTH, PADS)

    def turns(m, cache):
        first = forward(m, ids, mask, **cache)
        held, found = first.past_key_values, []
        for seed, drop in ((1, new - 1), (2, 20), (3, 0)):
            past = held.get_seq_length()
            longer = continue_with(ids, mask, 200)[:, : past + new]
            more = tokens(3, new, seed=seed)
            found.append(forward(m, more, longer, cache=held).logits)
            if drop:
                held.crop(-drop)
        return torch.cat(found, 1)

    got, want, _ = both(model, plan_of(model, SETTINGS[name]), turns)
    close(got, want)


@same_bits
def test_a_choice_that_is_read_again_is_one_that_was_made(name):
    model, found = tiny("qwen2"), []
    ids, mask = left_padded(LENGTH, PADS)
    for refresh in (0, 1, 1000):
        setting = replace(SETTINGS[name], refresh=refresh)
        with hfsparse.patch(model, plan_of(model, setting)) as handle:
            logits = torch.stack(generate(model, ids, mask, new=6).logits, 1)
            found.append((logits, handle.stats().decode_share))
    (each, share), (one, _), (first, again) = found
    assert torch.equal(each, one)
    assert torch.equal(each[:, :2], first[:, :2])  # the prompt's, and the first step's
    assert 0 < again < 1.1 * share


@same_bits
def test_after_a_crop_or_a_reorder_the_next_step_chooses_anew(name):
    model = tiny("qwen2")
    ids, mask = left_padded(LENGTH, PADS)
    for change in (
        lambda cache: cache.crop(-1),
        lambda cache: cache.reorder_cache(torch.arange(3)),
    ):
        found = []
        for refresh in (0, 1000):
            setting = replace(SETTINGS[name], refresh=refresh)
            with hfsparse.patch(model, plan_of(model, setting)):
                cache = DynamicCache(config=model.config)
                forward(model, ids, mask, cache=cache)
                for seed in (1, 2):
                    past = cache.get_seq_length()
                    longer = continue_with(ids, mask, past - LENGTH + 1)
                    out = forward(model, tokens(3, 1, seed=seed), longer, cache=cache)
                    change(cache)
                found.append(out.logits)
        assert torch.equal(*found)


@same_bits
def test_a_copied_cache_goes_on_alike_and_by_itself(name):
    model = tiny("llama")
    ids = tokens(1, 300)
    with hfsparse.patch(model, plan_of(model, SETTINGS[name])):
        cache = DynamicCache(config=model.config)
        forward(model, ids, cache=cache)
        copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        wanted = [forward(model, tokens(1, 1, seed=s), cache=cache).logits for s in range(3)]
        for other in copies:
            found = [forward(model, tokens(1, 1, seed=s), cache=other).logits for s in range(3)]
            assert torch.equal(torch.stack(found), torch.stack(wanted))


@every_setting
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bytes_are_those_of_the_tensors_and_are_foretold(name, family):
    model = tiny(family)
    plan = plan_of(model, SETTINGS[name])
    ids = tokens(1, 5 * PAGE)
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        cache = model(ids).past_key_values
        stats = handle.stats()
    stores = [store for layer in cache.layers for store in layer.stores]
    indexes = [t for store in stores for t in getattr(store, "index", {}).values()]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for store in stores
        for t in store.tensors()
    }
    assert indexes
    assert stats.kv_bytes == sum(held.values())
    told = figures.predict(model.config, plan, 5 * PAGE)
    assert told.kv_bytes == stats.kv_bytes
    assert told.cache_share == pytest.approx(stats.cache_share, rel=0.01)


@same_bits
def test_bytes_of_half_precision_are_foretold(name):
    """Not all that a cache holds is half as large: which pages were chosen last is not."""
    model = fresh("llama").bfloat16()
    plan = plan_of(model, replace(SETTINGS[name], refresh=4))
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        cache = model(tokens(2, 5 * PAGE)).past_key_values
        stats = handle.stats()
    assert {t.dtype for s in cache.layers[0].stores for t in s.tensors()} >= {torch.int64}
    assert memory.predict(model.config, plan, 5 * PAGE, batch=2).cache == stats.kv_bytes


@every_choice
def test_a_plan_saved_and_read_again_is_followed_alike(name, tmp_path):
    model = tiny("llama")
    plan, ids = plan_of(model, SETTINGS[name]), tokens(1, 300)
    plan.save(tmp_path / "plan.yaml")
    found = []
    for each in (plan, tmp_path / "plan.yaml"):
        with hfsparse.patch(model, each):
            found.append(torch.stack(generate(model, ids).logits))
    assert torch.equal(*found)
    assert hfsparse.Plan.load(tmp_path / "plan.yaml").hash() == plan.hash()


def test_segments_of_a_prompt_and_of_a_chunk_are_made_as_they_are_stored(monkeypatch):
    model, ids = tiny("llama"), tokens(1, 300)
    with hfsparse.patch(model, segmented(model)):
        cache = forward(model, ids[:, :200]).past_key_values
        assert [store.built for layer in cache.layers for store in layer.stores] == [[192]] * 3
        forward(model, ids[:, 200:270], cache=cache)
        monkeypatch.setattr(Centroids, "build", None)  # none is left for a step
        forward(model, ids[:, 270:271], cache=cache)
        assert [store.built for layer in cache.layers for store in layer.stores] == [[256]] * 3


@pytest.mark.parametrize("plan", [labelled, refreshed, segmented])
@pytest.mark.parametrize(("family", "pads"), [("llama", (0,)), ("qwen2", (30, 0, 150))])
def test_replayed_steps_are_eager_steps_bit_for_bit(interpreted, plan, family, pads):  # noqa: F811
    """Whether kernels write an index or PyTorch does, it follows on the device."""
    more = dict(length=250, pads=pads, new=8)
    eager, replayed = interpreted(family, plan, **more)
    assert (replayed["graphs"], replayed["recorded"]) == ("yes", 1)
    assert (
        eager["launched"]
        == replayed["launched"]
        == {"triton.append.append", "triton.choose.pages", "triton.decode.decode"}
    )
    same(eager, replayed)


@pytest.mark.parametrize("plan", ["corrected", means_of_labelled])
def test_means_follow_where_kernels_store_keys_and_steps_are_replayed(interpreted, plan):  # noqa: F811
    more = dict(length=250, pads=(30, 0), new=6)
    eager, replayed = interpreted("llama", plan, **more)
    assert "triton.append.append" in eager["launched"]
    assert replayed["graphs"] == "yes"
    same(eager, replayed)
    model = tiny("llama")
    made = plan(model) if callable(plan) else getattr(families, plan)(model)
    with hfsparse.patch(model, made):
        found = generate(model, *left_padded(more["length"], more["pads"]), new=more["new"])
    assert found.sequences.tolist() == eager["tokens"]
    close(eager["logits"], torch.stack(found.logits, 1))
