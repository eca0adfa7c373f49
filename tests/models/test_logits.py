"""Logits of hidden states are the model's own, whatever it does around its output embedding."""

import pytest
import torch
import transformers

import hfsparse
from hfsparse.models.logits import read_logits
from hfsparse.models.names import text_decoder
from tests.support.models import FAMILIES, causal, exists, tiny

HYBRIDS = ("qwen3_next", "lfm2", "nemotron_h", "falcon_h1", "zamba2")


def of_text(model, ids):
    with torch.no_grad():
        return text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family):
    if not exists(family):
        pytest.skip("not in this transformers")
    if family in HYBRIDS and not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        pytest.skip("refused there")
    model, ids = tiny(family), torch.arange(2, 32)[None]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        assert torch.equal(read_logits(model, of_text(model, ids)), want)
        with hfsparse.patch(model):
            some = read_logits(model, of_text(model, ids)[:, 3:9])
    torch.testing.assert_close(some, want[:, 3:9], atol=1e-4, rtol=1e-4)
    assert "forward" not in vars(model.get_decoder())


SCALES = {  # prefix of the class, what its config sets, what that makes of logits
    "Granite": (dict(logits_scaling=8.0), lambda x: x / 8),
    "Cohere": (dict(logit_scale=0.0625), lambda x: x / 16),
    "Gemma2": (dict(final_logit_softcapping=0.5), lambda x: 0.5 * torch.tanh(2 * x)),
}


@pytest.mark.parametrize("prefix", SCALES)
def test_scales_and_caps_are_followed(prefix):
    more, scale = SCALES[prefix]
    torch.manual_seed(0)
    model = causal(prefix, num_attention_heads=4, num_key_value_heads=2, **more).eval()
    hidden = torch.randn(1, 5, 64)
    with torch.no_grad():
        bare = model.get_output_embeddings()(hidden)
        torch.testing.assert_close(read_logits(model, hidden), scale(bare))


def test_gradients_flow_and_a_decoder_is_given_back_when_the_model_raises():
    model, hidden = tiny("gemma2"), torch.randn(1, 5, 64, requires_grad=True)
    read_logits(model, hidden).sum().backward()
    assert float(hidden.grad.norm()) > 0
    with pytest.raises(RuntimeError):
        read_logits(model, torch.randn(1, 5, 63))
    assert "forward" not in vars(model.get_decoder())
