"""Caches in 8 and 4 bits, in whole models: what the oracle says, in chunks, batches, beams, turns.

Beside the oracle the first layer alone packs: by its rounding keys of later ones could take another
step.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hfsparse
from hfsparse.errors import PlanError, UsageError
from hfsparse.lists import PAGE
from hfsparse.lists.lengths import Lengths
from hfsparse.models.layers import layer_shapes
from hfsparse.patcher import memory
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import ModelId, Plan
from hfsparse.runtime.cache import packed as stores
from hfsparse.runtime.cache import store
from hfsparse.runtime.cache.group import Group
from tests import latents
from tests.patcher.families import heads, left_padded, packing, plan_of, tiny, tokens
from tests.patcher.oracle import oracle, whole_cache
from tests.patcher.runs import (
    both,
    close,
    continue_with,
    forward,
    generate,
    same_generation,
)
from tests.support import models
from tests.tiny import llama

LENGTH = 170


def talk(m, cache):
    """A left-padded prompt, a chunk, steps of one token and of more, and some of them again."""
    ids, mask = left_padded(LENGTH)
    out = forward(m, ids, mask, **cache)
    found = [out.logits[:, -1]]
    for seed, new in enumerate((40, 1, 16, -30, 3, 1, 50, 1)):
        if new < 0:
            out.past_key_values.crop(new)
            mask = mask[:, :new]
            continue
        mask = continue_with(ids, mask, new)
        out = forward(m, tokens(3, new, seed=seed), mask, cache=out.past_key_values)
        found.append(out.logits)
    return found


@pytest.mark.parametrize(
    ("family", "bits", "below"),
    [("llama", 8, 0), ("qwen2", 4, 200), ("qwen3", "fp8", 0), ("mistral", 8, 200)],
)
def test_what_is_packed_equals_the_oracle(family, bits, below):
    model = tiny(family)
    plan = packing(model, bits, (below,) * 3)
    got, want, stats = both(model, plan, talk)
    for ours, truth in zip(got, want, strict=True):
        close(ours, truth)
    assert stats.layers[0].cache.shares[-1] < 0.9 < stats.layers[1].cache.shares[-1]
    with hfsparse.patch(model, packing(model, 16, (below,) * 3)):
        whole = talk(model, {})
    assert not torch.equal(got[1], whole[1])  # a chunk reads the past packed


def test_a_prompt_is_read_as_it_comes_and_its_chunks_read_what_is_packed():
    model, (ids, mask) = tiny("llama"), left_padded(LENGTH)
    plan = packing(model)
    with oracle(model, plan, prompt=LENGTH):
        want = generate(model, ids, mask, prefill_chunk_size=70, **whole_cache())
    with hfsparse.patch(model, plan):
        same_generation(generate(model, ids, mask, prefill_chunk_size=70), want)
        at_once = forward(model, ids, mask).logits
    with hfsparse.patch(model, packing(model, 16)):
        assert torch.equal(forward(model, ids, mask).logits, at_once)


class Largest(TorchDispatchMode):
    """Notes the numbers of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made._is_view():
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("bits", [8, 4])
def test_a_chunk_finds_a_few_heads_unpacked_at_a_time(monkeypatch, bits):
    """As many as there is room for, a few pages at a time; the same comes out."""
    model, ids = tiny("mistral"), tokens(2, 900)  # heads of whole rows are what is large
    with hfsparse.patch(model, packing(model, bits, every=True, kinds=("full",))):
        cache = forward(model, ids).past_key_values
        same, new = copy.deepcopy(cache), tokens(2, 40, seed=1)
        whole = forward(model, new, cache=cache).logits
        head = 2 * 940 * 16  # a head's keys in both rows
        monkeypatch.setattr(store, "TOGETHER", 2 * head)
        monkeypatch.setattr(stores, "UNPACKED", 4 * PAGE * 16)
        read = stores.PackedFull.with_chunk

        def bounded(part, *given):
            with Largest() as largest:
                found = read(part, *given)
            assert all(t.shape[:3] == (2, 1, 940) for t in found[:2])
            assert largest.numbers == head
            return found

        monkeypatch.setattr(stores.PackedFull, "with_chunk", bounded)
        close(forward(model, new, cache=same).logits, whole)


@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_that_read_pages_are_handed_no_unpacked_past(bits):
    """The newest page and the chunk are copied, and nothing that is as long as the past."""
    held, k = stores.PackedFull(Group((0, 1), bits=bits), 0), torch.randn(2, 2, 900, 16)
    held.create(k, k)
    held.append(k, k, Lengths([0, 0], [900, 900], 900))
    new = k[:, :, :40]
    own, _, past = held.with_pages(new, new, Lengths([900, 900], [40, 40], 40))
    assert own.shape == (2, 2, 900 % PAGE + 40, 16)
    assert past.tokens.tolist() == [900 // PAGE * PAGE] * 2
    pages = zip(past.packed.pages, held.packed().pages, strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pages)


def test_rows_of_a_batch_and_beams_are_alone():
    model, (ids, mask) = tiny("qwen3"), left_padded(LENGTH)
    with hfsparse.patch(model, packing(model)):
        together = generate(model, ids, mask, num_beams=2, new=40).sequences
        for row, pads in enumerate((0, 7, 13)):
            alone = generate(model, ids[row : row + 1, pads:], num_beams=2, new=40).sequences
            assert together[row, pads:].tolist() == alone[0].tolist()


def test_a_copy_goes_on_as_the_cache_does_and_drafts_can_be_taken_back():
    model, ids = tiny("llama"), tokens(1, LENGTH)
    with hfsparse.patch(model, packing(model, every=True)):
        cache = forward(model, ids).past_key_values
        copies = [copy.deepcopy(cache) for _ in range(2)]
        wanted = forward(model, ids[:, :1], cache=copies[0]).logits
        forward(model, ids[:, :30], cache=cache)
        cache.crop(-30)
        for each in (cache, copies[1]):
            assert torch.equal(forward(model, ids[:, :1], cache=each).logits, wanted)
        assert generate(model, ids, prompt_lookup_num_tokens=4).sequences.shape[1] > LENGTH


def test_under_autocast_pages_are_packed_in_its_type():
    model, ids = tiny("llama"), tokens(2, LENGTH)
    found = []
    for bits in (16, 8):
        with hfsparse.patch(model, packing(model, bits, every=True)), torch.autocast("cpu"):
            out = forward(model, ids)
            found.append(forward(model, ids[:, :3], cache=out.past_key_values).logits)
        layer = out.past_key_values.layers[0]
        assert layer.stores[0].k.dtype == torch.bfloat16
    assert 0 < (found[0] - found[1]).norm() / found[0].norm() < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_predicted_is_held(bits):
    model, (ids, mask) = tiny("llama"), left_padded(700, [0, 40])
    plan = packing(model, bits, every=True)
    with hfsparse.patch(model, plan) as handle:
        cache = forward(model, ids, mask).past_key_values
        stats = handle.stats()
        told = handle.explain()
    held = sum(layer.bytes() for layer in cache.layers)
    assert held == stats.kv_bytes
    assert memory.cache_bytes(model.config, plan, 700, 2, 4) == (held, stats.kv_bytes_dense)
    # Newest pages and the index of full heads are there beside the bits, in float32.
    full = stats.layers[0].cache.shares[0]
    assert bits / 32 + 2 * PAGE / 700 < full < bits / 32 + 2 * PAGE / 700 + 0.1
    assert f"1 selected in {bits} bits by reference (PyTorch)" in told
    assert "in fewer bits, new tokens: reference (PyTorch) (not Triton: needs a CUDA" in told


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n"])
def test_a_plan_in_other_bits_keeps_the_same_keys(family):
    """And where it can't, its words: of windows, small rings, evictions, readers of whole keys."""
    model = models.tiny(family) if family == "gemma3n" else tiny(family)
    shapes = layer_shapes(model)

    def words(index, windowed):
        Hq, Hkv = heads(model)
        kv = ["full"] * Hkv, ["full"] * Hkv
        if index == 1 and not windowed and family == "llama":
            kv = ["snap", "full"], ["kept", "means"]
        elif shapes[index].window is None and family != "gemma3n":
            ring = "near" if index == 1 else "far"
            kv = ([ring] * Hkv, ["ring"] * Hkv) if index else (["full"] * Hkv, ["quest"] * Hkv)
        return [word if word in ("near", "far") else "full" for word in kv[0][:1] * Hq], *kv

    near = dict(sink=2, recent=70)
    more = dict(near=("streaming", near), far=("streaming", dict(sink=64, recent=256)))
    more |= dict(quest=("quest", {}), means=("quest", dict(means=True)))
    plan = plan_of(model, words, (16,) * 3, snap=("snapkv", dict(size=80)), **more)
    plan.expected = {64: {"pair_density": 0.5, "cache_share": 0.7, "cache_share_free": 0.6}}
    plan.made = {"method": "by hand", "verified": {"told": "lost nothing"}}
    four = plan.with_bits(4, model)
    assert four.expected == {64: {"pair_density": 0.5}}
    assert four.made.keys() == {"method", "in_bits"}
    back = four.with_bits(8, model).with_bits(16, model)
    assert back.layers == plan.layers
    assert back.patterns.items() <= plan.patterns.items()
    for own, other, shape in zip(plan.layers, four.layers, shapes, strict=True):
        assert (own.prefill, own.decode) == (other.prefill, other.decode)
        for word, new, read in zip(own.cache, other.cache, own.decode, strict=True):
            stays = shape.window is not None or word == "near" or read in ("kept", "means")
            assert (word == new) if stays else four.patterns[new].bits == 4
    held = []
    for each in (plan, four):
        with hfsparse.patch(model, each) as handle:
            forward(model, tokens(1, 700))
            held.append(handle.stats().kv_bytes)
        assert memory.cache_bytes(model.config, each, 700, itemsize=4)[0] == held[-1]
    assert held[1] < 0.9 * held[0]


def test_what_cannot_be_packed_is_refused_in_a_sentence():
    model = tiny("llama")
    plan = packing(model)
    layers = (replace(plan.layers[0], prefill=("packed",) * 4),) * 3
    with pytest.raises(PlanError, match="prefill can't be packed, a full: give full or the name"):
        replace(plan, layers=layers).validate()
    with pytest.raises(UsageError, match="bits is 3: give 16, 8, 4 or fp8"):
        Streaming(bits=3)
    with pytest.raises(UsageError, match="bits is '4': give 16"):
        plan.with_bits("4", model)
    odd = llama(head_dim=3)
    with pytest.raises(PlanError, match=r"heads of 3 channels.* give packed 8 bits"):
        packing(odd).check(odd)
    if latents.exists("deepseek_v3"):
        latent = latents.fresh("deepseek_v3")
        with pytest.raises(PlanError, match=r"layer 0 keeps latents.*packed has 4 bits: write"):
            hfsparse.patch(latent, packing(latent))
        with pytest.raises(PlanError, match="no kv head of this plan can keep its keys in 4 bits"):
            Plan.full(ModelId.of(latent)).with_bits(4, latent)
