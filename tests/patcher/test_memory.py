"""Memory predicted from a config, against what caches really take and what an H100 showed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import hfsparse
from hfsparse import bench
from hfsparse.patcher import memory
from hfsparse.plan import Layer, Plan
from hfsparse.plan.kept import Full
from hfsparse.runtime.cache.full import Full as FullStore
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.selectors.quest import Quest
from tests.patcher.families import (
    FAMILIES,
    fresh,
    full,
    growing,
    hosted,
    mixed,
    packing,
    streaming,
    tiny,
    tokens,
)
from tests.patcher.oracle import CACHE
from tests.patcher.runs import forward, generate, same_generation
from tests.support import models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", [full, mixed, growing, streaming])
@pytest.mark.parametrize(("length", "batch"), [(40, 1), (300, 3)])
def test_the_cache_takes_what_was_predicted(family, plan, length, batch):
    model = tiny(family)
    plan = plan(model)
    with hfsparse.patch(model, plan) as handle:
        forward(model, tokens(batch, length))
        stats = handle.stats()
    ours, stock = memory.cache_bytes(model.config, plan, length, batch, itemsize=4)
    assert (ours, stock) == (stats.kv_bytes, stats.kv_bytes_dense)
    predicted = memory.predict(model.config, plan, length, batch, itemsize=4)
    assert predicted.cache == stats.kv_bytes
    assert predicted.weights == 4 * sum(p.numel() for p in model.parameters())
    assert memory.predict(model.config, None, length, batch, itemsize=4).cache == stock


def llama_8b() -> tuple[LlamaConfig, Plan]:
    """The shape and the plan of `hfsparse bench --shape llama-3.1-8b`."""
    config = LlamaConfig(**bench.SHAPES["llama-3.1-8b"], architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        return config, bench.stand_in(LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("length", "dense", "sparse"),
    [(8192, 16.9, 16.5), (32768, 22.6, 20.7), (65536, 30.3, 26.4), (131072, 45.6, 37.8)],
)
def test_peaks_are_those_measured_on_an_h100(length, dense, sparse):
    """GiB as benchmarks/results/prefill.md has them."""
    config, plan = llama_8b()
    for arm, measured in ((None, dense), (plan, sparse)):
        peak = memory.predict(config, arm, length).peak / 2**30
        assert peak == pytest.approx(measured, rel=0.01)


def test_chunks_bound_the_work_and_change_no_cache():
    config, plan = llama_8b()
    whole, chunked = (memory.predict(config, plan, 100_000, chunk=c) for c in (0, 10_000))
    assert chunked.work * 10 == whole.work
    assert chunked.cache == whole.cache
    assert memory.predict(config, plan, 5000, chunk=10_000) == memory.predict(config, plan, 5000)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_longest_prompt_fits_and_no_longer_one(batch):
    config, plan = llama_8b()
    for arm in (None, plan):
        found = memory.longest(config, arm, 40 << 30, batch=batch)
        assert memory.predict(config, arm, found, batch).peak <= 40 << 30
        assert memory.predict(config, arm, found + 1, batch).peak > 40 << 30
    assert memory.longest(config, plan, 1 << 30) == 0


def test_out_of_memory_is_answered_with_what_is_needed_and_what_fits(monkeypatch):
    model = fresh("llama")
    plan = streaming(model)
    chooses = Layer(("full",) * 4, ("full",) * 2, ("quest",) * 2)
    layers = (chooses, *plan.layers[1:])
    plan = replace(plan, patterns=plan.patterns | {"quest": Quest(0.2, 2)}, layers=layers)

    def full_card(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with hfsparse.patch(model, plan) as handle:
        monkeypatch.setattr("hfsparse.runtime.graphs.Graphs.run", full_card)
        with pytest.raises(torch.cuda.OutOfMemoryError, match=r"2 x 300 tokens need about 0"):
            forward(model, tokens(2, 300))
        monkeypatch.undo()
        forward(model, tokens(2, 300))
        assert handle.stats().kv_bytes
    more = plan, 300, 2, 0
    need = memory.predict(model.config, *more, itemsize=4)
    assert "in chunks" not in memory.describe_shortage(model.model, *more, 0)
    told = memory.describe_shortage(model.model, *more, need.peak)
    fits = int(told.rpartition(" x ")[2].split()[0].replace(",", ""))
    again = dict(batch=2, chunk=memory.CHUNK, itemsize=4)
    assert memory.longest(model.config, plan, need.peak, **again) == fits >= 300
    few = memory.longest(model.config, plan.with_bits(4, model), need.peak, **again)
    four = plan.with_bits(4, model)
    words = tuple("host4" if word == "full-int4" else word for word in four.layers[0].cache)
    kinds = four.patterns | {"host4": Full(4, host=True, hot=0.2)}
    both = replace(four, patterns=kinds, layers=(replace(chooses, cache=words), *four.layers[1:]))
    most = memory.longest(model.config, both, need.peak, **again)
    assert f"{few:,} in 4 bits (hfsparse bits), {most:,} in 4 bits (hfsparse bits) with" in told
    assert "with host: true where heads choose, as far as" in told
    assert fits < few < most


@pytest.mark.parametrize("plan", [full, streaming, packing, hosted])
def test_room_for_a_prompt_in_chunks_is_made_before_the_first_is_read(monkeypatch, plan):
    """Not layer by layer between a chunk's activations; and no buffer moves from then on."""
    model, where = fresh("qwen2"), []
    monkeypatch.setattr("hfsparse.runtime.cache.host.why_not", lambda device: None)

    def look(decoder, args, kwargs):
        stores = [store for layer in kwargs[CACHE].layers for store in layer.stores]
        stores = [store for store in stores if isinstance(store, FullStore)]
        assert all(store.capacity >= 150 for store in stores)
        where.append([t.data_ptr() for s in stores for t in (*s.tensors(), *s.outside())])

    with hfsparse.patch(model, plan(model)):
        model.model.register_forward_pre_hook(look, with_kwargs=True)
        generate(model, tokens(2, 150), prefill_chunk_size=60, new=3)
    assert where[0]
    assert where == where[:1] * 5


def test_room_that_a_prompt_in_chunks_does_not_find_is_told_of_all_of_it(monkeypatch):
    def full_card(layer, k, v):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model = tiny("llama")
    monkeypatch.setattr(CacheLayer, "prepare", full_card)
    with (
        hfsparse.patch(model),
        pytest.raises(memory.OutOfMemoryError, match="out of memory: 2 x 150 tokens need about"),
    ):
        generate(model, tokens(2, 150), prefill_chunk_size=60)
    monkeypatch.undo()
    with hfsparse.patch(model):
        assert generate(model, tokens(2, 150), prefill_chunk_size=60).sequences.shape == (2, 162)


def test_keys_of_another_kind_than_the_decoder_find_room_of_theirs(monkeypatch):
    model, ids = tiny("llama"), tokens(2, 150)
    with hfsparse.patch(model, streaming(model)):
        want = generate(model, ids, prefill_chunk_size=60)
        monkeypatch.setattr(type(model.model), "dtype", torch.float64)
        got = generate(model, ids, prefill_chunk_size=60)
    same_generation(got, want)
    kinds = {s.k.dtype for layer in got.past_key_values.layers for s in layer.stores}
    assert kinds == {torch.float32}


OTHER_NAMES = {  # how wide the MLP is, for a hidden size of 64
    "GPT2": (dict(n_embd=64, n_layer=2, n_head=4), 256),
    "GPT2 of its own": (dict(n_embd=64, n_layer=2, n_head=4, n_inner=96), 96),
    "GPTJ": (dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8), 256),
    "GPTBigCode": (dict(n_embd=64, n_layer=2, n_head=4), 256),
    "OPT": (
        dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=80)
        | dict(word_embed_proj_dim=64),
        80,
    ),
    "CTRL": (dict(n_embd=64, n_layer=2, n_head=4, dff=72), 72),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_an_mlp_is_found_by_whatever_name_its_size_has(name):
    more, width = OTHER_NAMES[name]
    config = getattr(transformers, f"{name.split()[0]}Config")(vocab_size=100, **more)
    need = memory.predict(config, None, 1000, itemsize=2)
    assert need.work == 2 * 1000 * (memory.WIDE * width + memory.NARROW * 64)
    assert need.weights > 0


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3_vl"])
def test_a_model_of_images_is_predicted_by_its_text_decoder(family):
    model = models.tiny(family)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    need = memory.predict(config, full(model), 100, itemsize=4)
    assert need.weights == 4 * sum(p.numel() for p in model.parameters())
    assert need.work == 4 * 100 * (memory.WIDE * 64 + memory.NARROW * 64)
