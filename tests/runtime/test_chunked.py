"""Layers whose tokens see no further back than their chunk's first (Llama 4)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from transformers import masking_utils

import hfsparse
from hfsparse.errors import CacheError, PatchError, ShapeError
from hfsparse.lists import Band
from hfsparse.models.layers import layer_shapes
from hfsparse.patcher import figures
from hfsparse.plan import Layer, ModelId, PlanError
from hfsparse.plan.template import template
from hfsparse.runtime.layout import pieces
from hfsparse.runtime.masks import mask_start
from tests.patcher.families import WINDOW as C
from tests.patcher.families import choosing, full, left_padded, mixed, streaming, tokens
from tests.patcher.oracle import oracle, whole_cache
from tests.patcher.runs import (
    both,
    close,
    continue_with,
    forward,
    generate,
    same_generation,
)
from tests.support.models import tiny

PLANS = {"full": full, "streaming": streaming, "mixed": mixed}


@pytest.fixture(scope="module")
def model():
    return tiny("llama4")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pads", [(0,), (0, 7, 13), (0, C)])
@pytest.mark.parametrize("length", [C - 1, C, C + 1, 2 * C + 3])
def test_prompts_around_a_chunks_end(model, plan, pads, length):
    """A row's chunks begin at its first token, wherever its neighbours' do."""
    ids, mask = left_padded(length, pads=[min(n, length - 1) for n in pads])
    got, want, _ = both(model, PLANS[plan](model), lambda m, c: forward(m, ids, mask, **c).logits)
    close(got, want, mask)


@pytest.mark.parametrize("length", [C + 1, 2 * C + 3])
def test_a_plan_that_drops_nothing_is_the_stock_model(model, length):
    ids, mask = left_padded(length)
    stock = generate(model, ids, mask, new=8)
    with hfsparse.patch(model, full(model)):
        same_generation(generate(model, ids, mask, new=8), stock)
        masked = forward(model, ids, mask, use_cache=False).logits
    close(masked, forward(model, ids, mask, use_cache=False).logits, mask)


@pytest.mark.parametrize("plan", [mixed, choosing])
def test_steps_pass_a_chunks_end(model, plan):
    """Rows come to it in different steps, the second time in a ring that has turned."""
    ids, mask = left_padded(2 * C - 3)
    run = lambda m, c: generate(m, ids, mask, new=C + 10, **c)  # noqa: E731
    same_generation(*both(model, plan(model), run)[:2])


@pytest.mark.parametrize("new", [2, 16, 17, C - 5, C, 3 * C + 1])
def test_a_later_turn_begins_in_the_midst_of_a_chunk(model, new):
    """Up to 16 new tokens are a step, whose queries may lie in two chunks; more are a chunk of a
    prompt, of which rows with other pasts are read apart."""
    ids, mask = left_padded(2 * C + 36)

    def run(m, c):
        first = forward(m, ids, mask, use_cache=True, **c)
        whole = continue_with(ids, mask, new)
        turn = forward(m, tokens(3, new), whole, cache=first.past_key_values)
        whole = continue_with(ids, mask, new + 1)
        step = forward(m, tokens(3, 1, seed=2), whole, cache=turn.past_key_values)
        return torch.cat([turn.logits, step.logits], 1)

    for plan in (full, mixed):
        close(*both(model, plan(model), run)[:2])


@pytest.mark.parametrize("back", [1, 17, 32])
def test_tokens_are_taken_back_over_a_chunks_end(model, back):
    """As assisted decoding does."""
    ids = tokens(1, 2 * C + 10)

    def run(m, c):
        cache = forward(m, ids, use_cache=True, **c).past_key_values
        cache.crop(-back)
        said = [forward(m, tokens(1, n, seed=n), cache=cache).logits for n in (1, 3, 50)]
        return torch.cat(said, 1)

    for plan in (full, streaming):
        close(*both(model, plan(model), run)[:2])


def test_a_chunk_whose_first_keys_are_gone_is_no_place_to_go_back_to(model):
    """A ring of 72 of 154 tokens begins at 82: a query at 118 wants those from 80 on."""
    with hfsparse.patch(model):
        cache = forward(model, tokens(1, 154), use_cache=True).past_key_values
        with pytest.raises(CacheError, match="cannot go back to 118 tokens"):
            cache.crop(-36)
        cache.crop(-34)  # a chunk begins here, which needs none before it
        assert cache.get_seq_length() == 120


def test_figures_are_those_of_chunked_attention(model):
    ids, mask = left_padded(2 * C + 20)
    run = lambda m, c: generate(m, ids, mask, new=C, **c)  # noqa: E731
    with oracle(model, mixed(model)) as truth:
        run(model, whole_cache(model))
    with hfsparse.patch(model, mixed(model)) as handle:
        run(model, {})
        stats = handle.stats()
    for index, layer in enumerate(stats.layers):
        assert layer.pairs.done == [truth.pairs[index, h] for h in range(4)]
        assert layer.pairs.dense == [truth.causal[index, h] for h in range(4)]
        assert layer.reads.done == [truth.reads[index, g] for g in range(2)]
        assert layer.reads.dense == [truth.total[index, g] for g in range(2)]
    assert [layer.window for layer in stats.layers] == [C, C, None]
    assert stats.kv_bytes_dense == 3 * 2 * 2 * 16 * 4 * (C + C + 3 * C + 19)


@pytest.mark.parametrize("length", [C, 2 * C + 3])
def test_figures_without_a_run_are_those_of_a_run(model, length):
    plan, shares = full(model), [torch.ones(4).numpy()] * 3
    with hfsparse.patch(model, plan) as handle:
        cache = forward(model, tokens(1, length - 1), use_cache=True).past_key_values
        forward(model, tokens(1, 1), cache=cache)
        ran = handle.stats()
        handle.reset_stats()
        forward(model, tokens(1, length))
        prompt = handle.stats()
    said = figures.predict(model.config, plan, length, figures.Prompts(shares, shares))
    for ours, other, whole in zip(said.layers, ran.layers, prompt.layers, strict=True):
        assert (ours.reads, ours.cache) == (other.reads, other.cache)
        assert (ours.pairs, ours.blocks) == (whole.pairs, whole.blocks)


def test_pieces_of_a_row():
    assert [*pieces(0, 5, 10)] == [(0, slice(0, 5), slice(0, 5))]
    assert [*pieces(17, 5, 10)] == [
        (7, slice(0, 3), slice(0, 10)),
        (0, slice(3, 5), slice(10, 12)),
    ]
    assert [*pieces(20, 10, 10)] == [(0, slice(0, 10), slice(0, 10))]
    assert [*pieces(17, 0, 10)] == [*pieces(20, 0, 10)] == []


def test_a_chunked_bands_keys_begin_at_a_multiple():
    band = Band(0, 10, chunked=True)
    at = torch.arange(35)
    assert band.start(at).tolist() == [p // 10 * 10 for p in range(35)]
    assert band.widest(34) == 10


# -- what transformers asks for -------------------------------------------------------------------


def ask(function, length: int, mask=None, **more):
    """The registered mask function, as a chunked layer's mask is asked for, its form unknown."""
    config = tiny("llama4").config
    where = {"cache_position": torch.arange(length), "local_size": C, "config": config}
    given = {"allow_is_causal_skip": False, "mask_function": function, "batch_size": 2, **where}
    return mask_start(attention_mask=mask, **{**given, **more})


def chunked(*starts: int):
    return masking_utils.chunked_causal_mask_function(C, torch.tensor(starts))


def test_a_mask_of_chunks_from_each_rows_first_token_is_followed():
    mask = left_padded(2 * C + 3, pads=(0, 7))[1]
    assert ask(chunked(0, 0), 2 * C + 3) is None
    assert ask(chunked(0, 7), 2 * C + 3, mask).flatten().tolist() == [0, 7]


@pytest.mark.parametrize(
    "function",
    [
        chunked(0, 1),  # other starts
        masking_utils.chunked_causal_mask_function(C // 2, torch.zeros(2, dtype=int)),
        masking_utils.causal_mask_function,
        lambda row, head, q, k: chunked(0, 0)(row, head, q, k) | (k <= 3),  # an image
    ],
)
def test_other_masks_of_a_chunked_layer_are_refused(function):
    def whole(row, head, q, k):
        return function(row, head, q, k).expand(2, -1)

    with pytest.raises(PatchError, match="more than causal attention"):
        ask(whole, 2 * C + 3)


def test_packed_rows_are_refused(model):
    packed = torch.cat([torch.arange(50), torch.arange(40)])[None]
    with hfsparse.patch(model), pytest.raises(PatchError, match="packed sequences"):
        model(tokens(1, 90), position_ids=packed, use_cache=False)


# -- configs and plans ----------------------------------------------------------------------------


def test_a_config_names_its_chunks(model):
    shapes = layer_shapes(model)
    assert [(s.window, s.chunked, s.free) for s in shapes] == [
        (C, True, False),
        (C, True, False),
        (None, False, True),
    ]
    wider = transformers.Llama4TextConfig(**{**model.config.to_dict(), "attention_chunk_size": 48})
    assert ModelId.of(wider) != ModelId.of(model)
    assert "# chunks of 40 tokens of its own: all stays full" in template(model.config)


def test_a_config_of_chunks_without_a_size_is_refused(model):
    wrong = transformers.Llama4TextConfig(
        **{**model.config.to_dict(), "attention_chunk_size": None}
    )
    with pytest.raises(ShapeError, match="attention_chunk_size is None, not one whole number"):
        layer_shapes(wrong)


@pytest.mark.parametrize("part", ["prefill", "cache"])
def test_a_plan_has_no_words_for_a_chunked_layer(model, part):
    plan = streaming(model)
    words = {
        "prefill": Layer(("s",) * 4, ("full",) * 2, ("full",) * 2),
        "cache": Layer(("s",) * 4, ("s",) * 2, ("ring",) * 2),
    }[part]
    wrong = replace(plan, layers=(words, *plan.layers[1:]))
    with pytest.raises(PlanError, match=r"layer 0 attends in chunks of 40 tokens.*write full"):
        hfsparse.patch(model, wrong)


def test_explain_names_chunked_layers(model):
    with hfsparse.patch(model, mixed(model)) as handle:
        said = handle.explain()
    assert "layers [0, 1] attend in the model's own chunks, and keep one, as a ring" in said
    assert "sliding window, as a ring" not in said
