"""Layers that read another layer's keys: rings, chunks, padding, turns, crops and chosen pages."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import DynamicCache, cache_utils

import hfsparse
from hfsparse import kernels
from hfsparse.errors import PatchError, PlanError
from hfsparse.kernels import dense, reference
from hfsparse.kernels.per_store import by_store
from hfsparse.models.layers import layer_shapes
from hfsparse.patcher import figures, probe
from hfsparse.plan import Layer
from hfsparse.plan.files import DataFile
from hfsparse.plan.template import template
from hfsparse.runtime import prefill
from hfsparse.runtime.call import use_tables
from hfsparse.selectors.channels import Channels
from tests.patcher.families import (
    QUEST,
    STREAM,
    VS,
    full,
    growing,
    left_padded,
    mixed,
    plan_of,
    straddled,
    streaming,
    tokens,
)
from tests.patcher.oracle import oracle, whole_cache
from tests.patcher.runs import both, close, continue_with, forward
from tests.patterns.matrix import table_of
from tests.support.models import exists, tiny

WINDOWED, FULL = (0, 3), (2, 4)  # producer and reader of either kind
LENGTH = 260


def named(family: str):
    if not exists(family):
        pytest.skip("not in this version")
    return tiny(family)


@pytest.fixture(params=["gemma4_shared", "gemma3n"])
def model(request):
    return named(request.param)


@pytest.fixture
def gemma4():
    return named("gemma4_shared")


def talk(m, cache, keep=0):
    """A left-padded prompt, 9 tokens, a chunk of 40 and a token, each behind the last."""
    ids, mask = left_padded(LENGTH)
    out = forward(m, ids, mask, logits_to_keep=keep, **cache)
    found = [out.logits.masked_fill(~mask[:, -out.logits.shape[1] :, None].bool(), 0)]
    for seed, new in enumerate((9, 40, 1)):
        mask = continue_with(ids, mask, new)
        given = tokens(3, new, seed=seed)
        out = forward(m, given, mask, cache=out.past_key_values, logits_to_keep=keep)
        found.append(out.logits)
    return found


def selected(model, producer="q", reader="q", prefill="vs", **quest):
    """Chosen pages beside a ring in the full layers; other patterns of prompts in each."""
    kind, more = QUEST

    def layer(index, windowed):
        words = ["s", "s", "full", prefill if index == FULL[1] else "full"]
        if windowed:
            return words, ["full"] * 2, ["full"] * 2
        return words, ["s", "full"], ["ring", reader if index == FULL[1] else producer]

    patterns = dict(s=STREAM, vs=VS, q=(kind, {**more, **quest}), again=("reuse", {}))
    plan = plan_of(model, layer, **patterns)
    own = Layer(*map(tuple, layer(FULL[1], False)))
    return replace(plan, layers=(*plan.layers[: FULL[1]], own))


def by_table(model):
    """Units are chosen by labels, of other channels in each layer: readers take the producer's."""
    plan, few = selected(model), Channels(0.06, 2, unit=16, channels=2, bits=8)
    this = plan.model
    table = table_of(few, this.layers, this.kv_heads, this.head_dim)
    data = {few.data: DataFile.of("it.safetensors", table)}
    return replace(plan, patterns={**plan.patterns, "q": few}, data=data)


def test_configs_tell_whose_keys_are_read(model):
    assert [shape.producer for shape in layer_shapes(model)] == [None, None, None, 0, 2]
    lines = template(model.config).splitlines()[-2:]
    assert "window" in lines[0]
    assert lines[1].endswith("reads layer 2's keys: cache and decode are as there")


@pytest.mark.parametrize(
    ("family", "plan", "keep"),
    [
        ("gemma3n", mixed, 0),
        ("gemma3n", selected, 1),
        *product(["gemma4_shared"], [growing, mixed, straddled, selected], [0, 1]),
        ("gemma4_shared", by_table, 0),
        ("gemma4_shared", full, 20),
        ("gemma4_shared", selected, 20),
    ],
)
def test_a_conversation_equals_the_oracle(family, plan, keep):
    """keep: of each call, the last queries alone go through the readers (transformers 5.24)."""
    model = named(family)
    got, want, _ = both(model, plan(model), lambda m, cache: talk(m, cache, keep))
    for ours, truth in zip(got, want, strict=True):
        close(ours, truth)


@pytest.mark.parametrize("keep", [0, 1])
def test_without_a_cache_and_with_one_a_prompt_gives_the_same(gemma4, keep):
    ids, mask = left_padded(LENGTH)
    with hfsparse.patch(gemma4, mixed(gemma4)):
        with_one = forward(gemma4, ids, mask, logits_to_keep=keep).logits
        alone = forward(gemma4, ids, mask, logits_to_keep=keep, use_cache=False).logits
    close(alone, with_one, mask[:, -alone.shape[1] :])


@pytest.mark.parametrize("plan", [streaming, selected])
def test_after_a_crop_and_a_change_of_rows_the_cache_goes_on(gemma4, plan):
    model = gemma4
    ids, mask = left_padded(LENGTH, (0, 7))

    def run(m, cache, back):
        out = forward(m, ids, mask, **cache)
        if back:
            longer = continue_with(ids, mask, 5)
            out = forward(m, tokens(2, 5), longer, cache=out.past_key_values)
            out.past_key_values.crop(-5)
        out.past_key_values.reorder_cache(torch.tensor([1, 0]))
        order = mask[[1, 0]]
        return [
            forward(m, tokens(2, 1), continue_with(ids, order, 1), cache=out.past_key_values).logits
        ]

    with hfsparse.patch(model, plan(model)):
        close(*run(model, {}, True), *run(model, {}, False))
    got, want, _ = both(model, plan(model), lambda m, cache: run(m, cache, False))
    close(*got, *want)


def test_figures_count_what_readers_read_and_they_hold_nothing(gemma4):
    model = gemma4
    plan = selected(model)
    with oracle(model, plan) as truth:
        talk(model, whole_cache())
    with hfsparse.patch(model, plan) as handle:
        talk(model, {})
        stats = handle.stats()
        assert "layers 3 and 4 read the keys of layers 0 and 2" in handle.explain()
        handle.reset_stats()
        ids = tokens(1, 300)
        out = forward(model, ids[:, :-1])
        forward(model, ids[:, -1:], cache=out.past_key_values)
        ran = handle.stats()
    for index, layer in enumerate(stats.layers):
        for shares, done, dense_work in (
            (layer.pair_density, truth.pairs, truth.causal),
            (layer.decode_share, truth.reads, truth.total),
        ):
            assert shares == [done[index, h] / dense_work[index, h] for h in range(len(shares))]
    for producer, reader in (WINDOWED, FULL):
        assert sum(stats.layers[producer].kv_bytes) > 0
        assert [*stats.layers[reader].kv_bytes] == [0, 0]
        assert [*stats.layers[reader].cache.dense] == [0, 0]
    said = figures.predict(model.config, plan, 300)
    for ours, theirs in zip(said.layers, ran.layers, strict=True):
        assert [*ours.kv_bytes] == [*theirs.kv_bytes]
        assert ours.decode_share == theirs.decode_share
    assert (said.cache_share, said.decode_share) == (ran.cache_share, ran.decode_share)


def test_a_reader_reads_the_pages_that_its_producer_chose(gemma4):
    """Also where that one chose for more queries, or some steps ago."""
    read = []

    def watched(run):
        def noted(*args, **more):
            lists = args[5] if len(args) > 5 else None
            read.append(None if lists is None else lists.pages.tolist())
            return run(*args, **more)

        return noted

    kernel = kernels.Kernel(
        "watched", by_store(watched(reference.decode), watched(dense.decode)), lambda need: None
    )
    plan = selected(gemma4, reader="again", refresh=4)
    with hfsparse.patch(gemma4, plan), use_tables(kernels.TABLES._replace(decode=(kernel,))):
        for keep in (0, 1):
            cache = DynamicCache(config=gemma4.config)
            forward(gemma4, tokens(1, 600), cache=cache)
            for new in (1, 3):
                read.clear()
                forward(gemma4, tokens(1, new, seed=new), cache=cache, logits_to_keep=keep)
                chosen = [pages for pages in read if pages is not None]
                assert len(chosen) == 2 + 1  # layer 1 chooses, too
                assert chosen[-1] == chosen[-2]


def test_what_rings_dropped_is_kept_for_readers_and_no_longer(gemma4, monkeypatch):
    calls, run = {}, prefill.read_again

    def noted(layer_call, layout):
        index = layer_call.layer_plan.index
        calls[index] = [len(layer_call.call.gathered), None]
        out = run(layer_call, layout)
        calls[index][1] = len(layer_call.call.gathered)
        return out

    monkeypatch.setattr(prefill, "read_again", noted)
    with hfsparse.patch(gemma4, streaming(gemma4)):
        cache = forward(gemma4, tokens(1, 100)).past_key_values
        assert calls == {}
        forward(gemma4, tokens(1, 40), cache=cache)
    assert calls == {3: [2, 1], 4: [1, 0]}


def test_a_reader_has_its_producers_words(gemma4):
    plan = selected(gemma4)

    def refused(match, **words):
        wrong = replace(plan.layers[4], **words)
        with pytest.raises(PlanError, match=match):
            hfsparse.patch(gemma4, replace(plan, layers=(*plan.layers[:4], wrong)))

    reads = "layer 4 reads the keys of layer 2, whose"
    refused(f"{reads} cache is s full: write that for layer 4, too", cache=("full",) * 2,
            decode=("full", "q"))  # fmt: skip
    refused(f"{reads} decode is ring q: write that", decode=("ring", "full"))
    with pytest.raises(PlanError, match=f"{reads} cache holds one choice of q for steps"):
        selected(gemma4, refresh=4).check(gemma4)
    selected(gemma4, reader="again", refresh=4).check(gemma4)


def test_keys_are_not_handed_to_another_model(gemma4):
    with hfsparse.patch(gemma4), pytest.raises(PatchError, match="hands keys from one model"):
        gemma4(tokens(1, 9), return_shared_kv_states=True)


def test_a_model_that_reads_other_keys_than_its_config_says_is_refused(gemma4, monkeypatch):
    if not hasattr(cache_utils, "KVSharingDict"):
        pytest.skip("not in this version")

    def copied(self, name):
        return tuple(t.clone() for t in self.data[name])

    monkeypatch.setattr(probe, "found", {})
    monkeypatch.setattr(cache_utils.KVSharingDict, "__getitem__", copied)
    with pytest.raises(PatchError, match="layer 3 doesn't read the keys of layer 0"):
        hfsparse.patch(gemma4)
