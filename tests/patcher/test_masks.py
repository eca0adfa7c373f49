"""Masks that hfsparse can't follow are refused, never ignored."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import hfsparse
from hfsparse.errors import CacheError
from tests.patcher.families import left_padded, streaming, tiny, tokens
from tests.patcher.oracle import CACHE
from tests.patcher.runs import close, continue_with, forward, generate


@pytest.fixture(params=["llama", "gemma3"])
def model(request):
    """A patched model."""
    built = tiny(request.param)
    with hfsparse.patch(built, streaming(built)):
        yield built


def ones(*shape):
    return torch.ones(shape).long()


def test_holes_in_a_mask_are_refused(model):
    mask = ones(1, 30)
    mask[0, 10:12] = 0
    for run in (forward, generate):
        with pytest.raises(ValueError, match=r"has holes \(row 0, from column 10 on\)") as error:
            run(model, tokens(1, 30), mask)
        assert "padding_side" not in str(error.value)


def test_padding_between_two_turns_is_no_question_of_the_side(model):
    """Each turn was padded on the left: the second one's padding lies behind the first."""
    ids, first = left_padded(60)
    cache = forward(model, ids, first).past_key_values
    mask = torch.cat([first, ones(3, 8)], 1)
    mask[1, 60:63] = 0
    with pytest.raises(ValueError, match=r"row 1, from column 60 on.*between two turns") as error:
        model(tokens(3, 8), attention_mask=mask, **{CACHE: cache})
    assert "padding_side" not in str(error.value)


def test_right_padding_is_refused(model):
    mask = ones(2, 30)
    mask[1, 25:] = 0
    for more in ({}, {"use_cache": False}):
        told = r"has right padding \(row 1, from column 25 on\).*padding_side = 'left'"
        with pytest.raises(ValueError, match=told):
            forward(model, tokens(2, 30), mask, **more)


def test_virtual_tokens_of_prefix_tuning_are_named(model):
    """peft hands on a cache of its own and a mask that covers it, beside what generate made."""
    ids, mask = tokens(1, 20), torch.cat([ones(1, 5), ones(1, 20)], 1)
    with pytest.raises(ValueError, match=r"covers 25 columns.*Prefix tuning \(peft\)"):
        model(ids, attention_mask=mask, **{CACHE: DynamicCache()})
    virtual, config = DynamicCache(), model.config.get_text_config()
    for index in range(config.num_hidden_layers):
        keys = torch.zeros(1, config.num_key_value_heads, 5, config.head_dim)
        virtual.update(keys, keys, index)
    with pytest.raises(CacheError, match=r"holds 5 tokens.*Prefix tuning \(peft\)"):
        model(ids, attention_mask=mask, **{CACHE: virtual})


@pytest.mark.parametrize("shape", [(1, 1, 30, 30), (1, 30, 30)], ids=["4D", "3D"])
@pytest.mark.parametrize("more", [{}, {"use_cache": False}], ids=["cached", "uncached"])
def test_masks_of_more_dimensions_are_refused(model, shape, more):
    mask = torch.ones(shape).tril().bool()
    with pytest.raises(ValueError, match=r"attention mask of shape \[1, .*left padding only"):
        model(tokens(1, 30), attention_mask=mask, **more)


def test_packed_sequences_without_a_cache_are_refused(model):
    packed = torch.arange(15).repeat(2)[None]
    with pytest.raises(ValueError, match=r"more than causal attention.*one sequence a row"):
        model(tokens(1, 30), position_ids=packed, use_cache=False)


def second_turn(model, mask):
    ids, first = left_padded(60)
    cache = forward(model, ids, first).past_key_values
    return model(tokens(3, 5), attention_mask=mask, **{CACHE: cache})


def test_a_second_turn_without_the_mask_is_refused(model):
    with pytest.raises(CacheError, match=r"should hold.*earlier padding included"):
        second_turn(model, None)


def test_a_second_turn_with_the_new_tokens_mask_is_refused(model):
    with pytest.raises(ValueError, match=r"covers 5 columns.*have 65"):
        second_turn(model, ones(3, 5))


def test_a_second_turn_with_other_padding_is_refused(model):
    ids, mask = left_padded(60, pads=(0, 7, 12))
    with pytest.raises(CacheError, match=r"hold \[60, 53, 47\].* \[60, 53, 48\]"):
        second_turn(model, continue_with(ids, mask, 5))


def test_a_mask_wider_than_the_input_is_refused(model):
    wide = torch.cat([torch.zeros(1, 35), torch.ones(1, 5)], 1).long()
    for more in ({}, {"use_cache": False}):
        with pytest.raises(ValueError, match=r"covers 40 columns.*have 30"):
            model(tokens(1, 30), attention_mask=wide, **more)


def test_masks_of_any_dtype_say_the_same(model):
    ids, mask = left_padded(40)
    want = forward(model, ids, mask).logits
    for dtype in (torch.bool, torch.int32, torch.float32):
        more = dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        with torch.no_grad():  # by the kernel that was asked above
            got = model(ids, attention_mask=mask.to(dtype), **more)
        assert torch.equal(got.logits[mask.bool()], want[mask.bool()])


def test_a_mask_of_ones_says_the_same_as_none(model):
    ids = tokens(2, 40)
    assert torch.equal(forward(model, ids, ones(2, 40)).logits, forward(model, ids).logits)


def test_a_row_of_pads_only_is_finite_and_disturbs_nobody(model):
    ids, mask = left_padded(40, pads=(0, 40, 5))
    got = forward(model, ids, mask).logits
    want = forward(model, ids[[0, 2]], mask[[0, 2]]).logits
    assert torch.isfinite(got).all()
    close(got[[0, 2]], want, mask[[0, 2]])
