"""Tokens of an image that see each other inside a prompt."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import masking_utils

import hfsparse
from hfsparse.errors import PatchError
from hfsparse.runtime.image_blocks import block_mask, last_seen, read_blocks, split_mask
from hfsparse.runtime.layer_plan import Logits
from hfsparse.runtime.masks import mask_start
from tests.census import entries as census
from tests.patcher.families import STREAM, left_padded, plan_of, streaming
from tests.patcher.oracle import oracle, whole_cache
from tests.patcher.runs import close
from tests.support.models import IMAGE, tiny

BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 2], [-1] * 6 + [0, 0]])


def blocks(row, head, q, k):
    """Causal, and both ways inside a block."""
    own, other = BLOCKS[row, q], BLOCKS[row, k]
    return (k <= q) | ((own == other) & (own >= 0))


def test_the_last_column_that_each_token_sees():
    found = last_seen(blocks, 2, torch.arange(8))
    assert found.tolist() == [[0, 3, 3, 3, 4, 6, 6, 7], [0, 1, 2, 3, 4, 5, 7, 7]]
    mask = block_mask(found, [2, 0])
    last, starts = split_mask(mask)
    assert last[0, :, 0].tolist() == [-1, -1, 3, 3, 4, 6, 6, 7]
    assert starts.flatten().tolist() == [2, 0]
    assert split_mask(None) == (None, None)
    assert split_mask(starts)[1] is starts


def packed(row, head, q, k):
    return (k <= q) & (q // 4 == k // 4)


def two_ways_in_a_window(row, head, q, k):
    return (q - k).abs() < 3


@pytest.mark.parametrize("function", [packed, two_ways_in_a_window])
def test_other_masks_are_no_blocks(function):
    def whole(row, head, q, k):
        return function(row, head, q, k).expand(2, -1)

    assert last_seen(whole, 2, torch.arange(8)) is None


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("special", [False, True])
def test_rows_that_see_later_keys_are_read_densely(window, special):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 8, 16) for heads in (4, 2, 2))
    sinks = torch.randn(4) if special else None
    logits = Logits(0.3, 5.0 if special else None, sinks)
    last, _ = split_mask(block_mask(last_seen(blocks, 2, torch.arange(8)), [1, 0]))
    out = torch.full((2, 4, 8, 16), 9.0)
    read_blocks(q, k, v, last, window, logits, out)
    at = torch.arange(8)
    for b, first in enumerate((1, 0)):
        for row in range(8):
            seen = blocks(b, 0, torch.tensor(row), at) & (at >= first)
            if window is not None:
                seen &= at > row - window
            if row < first or not bool(seen[row + 1 :].any()):
                assert bool((out[b, :, row] == 9).all())
                continue
            for head in range(4):
                scores = (k[b, head // 2] @ q[b, head, row]) * 0.3
                if special:
                    scores = 5 * torch.tanh(scores / 5)
                scores = scores.masked_fill(~seen, -torch.inf)
                bare = (
                    scores.new_full((1,), -torch.inf) if sinks is None else sinks[head : head + 1]
                )
                want = torch.softmax(torch.cat([scores, bare]), 0)[:8] @ v[b, head // 2]
                torch.testing.assert_close(out[b, head, row], want, rtol=1e-5, atol=1e-5)


def images(model, where, length=130):
    """A left-padded batch with an image of four tokens at each of these places."""
    torch.manual_seed(0)
    ids, mask = left_padded(length)
    ids[ids == IMAGE] = 50
    for at in where:
        ids[:, at : at + 4] = IMAGE
    more = {"pixel_values": torch.randn(3 * len(where), 3, 16, 16)}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": (ids == IMAGE).long(),
        **more,
    }


@pytest.mark.parametrize("where", [(40,), (30, 34, 90)])
def test_a_prompt_with_images_equals_the_model(where):
    model = tiny("gemma3_vl")
    given = images(model, where)
    with torch.no_grad():
        stock = model(**given).logits
        flat = model(**{**given, "token_type_ids": torch.zeros_like(given["token_type_ids"])})
        with hfsparse.patch(model):
            got = model(**given).logits
        plan = streaming(model)
        with oracle(model, plan):
            want = model(**given, **whole_cache(model)).logits
        with hfsparse.patch(model, plan):
            sparse = model(**given).logits
    close(got, stock, given["attention_mask"])
    close(sparse, want, given["attention_mask"])
    real = given["attention_mask"].bool()
    assert (flat.logits - stock)[real].abs().max() > 1e-3, "the blocks don't show"
    assert (sparse - got)[real].abs().max() > 1e-3


def test_gemma4_sees_images_in_windowed_layers_alone():
    entry = next((each for each in census.entries() if each.name == "gemma-4-31b"), None)
    if entry is None or not hasattr(transformers, "Gemma4ForConditionalGeneration"):
        pytest.skip("not in this version")
    model, (ids, mask) = census.build(entry), left_padded(130)
    model.config.get_text_config().use_bidirectional_attention = "vision"
    kinds = torch.zeros_like(ids)
    kinds[:, 40:48] = kinds[:, 60:70] = 1
    given = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}

    def ring(index, windowed):
        return (["full"] * 4, ["full"], ["full"]) if windowed else (["s"] * 4, ["s"], ["ring"])

    plan = plan_of(model, ring, s=STREAM)
    with torch.no_grad():
        stock = model(**given).logits
        flat = model(**{**given, "mm_token_type_ids": torch.zeros_like(kinds)}).logits
        with hfsparse.patch(model):
            got = model(**given).logits
        with oracle(model, plan):
            want = model(**given, **whole_cache(model)).logits
        with hfsparse.patch(model, plan):
            sparse = model(**given).logits
    real = mask.bool()
    assert (got - stock)[real].abs().max() < 1e-4  # of logits up to 10
    assert (sparse - want)[real].abs().max() < 1e-4
    assert (flat - stock)[real].abs().max() > 1e-3, "the blocks don't show"
    assert (want - stock)[real].abs().max() > 1e-3


def test_an_image_behind_a_past_is_refused():
    """Gemma 3 and 4 read such images causally; another model may not."""
    where = {"cache_position": torch.arange(1, 8), "q_length": 7, "q_offset": 1}
    more = {"batch_size": 2, "mask_function": blocks, "allow_is_causal_skip": False}
    with pytest.raises(PatchError, match=r"an image behind a past.*without prefill_chunk_size"):
        mask_start(**where, **more)


def test_two_images_need_not_touch_the_text():
    """transformers' own function for blocks, as masks are composed."""
    if not hasattr(masking_utils, "blockwise_overlay"):
        pytest.skip("not in this version")
    own = masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.blockwise_overlay(BLOCKS)
    )
    assert torch.equal(last_seen(own, 2, torch.arange(8)), last_seen(blocks, 2, torch.arange(8)))
