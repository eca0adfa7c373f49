"""Models of MLA are profiled as their cache has them: a pattern a q head, one word a layer."""

from __future__ import annotations

import pytest
import torch

import hfsparse
from hfsparse.patterns.streaming import Streaming
from hfsparse.profiler.measure.capture import backward
from hfsparse.profiler.measure.latents import solve_latents
from hfsparse.profiler.methods import duo, moa
from tests import latents, tiny

pytestmark = pytest.mark.skipif(
    not latents.exists("deepseek_v3"), reason="this transformers caches expanded keys"
)


def model_of(**more):
    return latents.fresh("deepseek_v3", vocab_size=400, max_position_embeddings=2048, **more)


def test_latents_are_those_that_the_module_expands():
    model, made = model_of(), torch.Generator().manual_seed(0)
    module = model.model.layers[1].self_attn
    latent, rotated = (torch.randn(1, 1, 40, dim, generator=made) for dim in (24, 8))
    with hfsparse.patch(model), torch.no_grad():
        k, v = module.expand_kv(latent, rotated)
        found = solve_latents(module, k, v)
        assert torch.allclose(found.kept[0], torch.cat([latent, rotated], -1), atol=1e-4)


def test_what_is_seen_of_latents_is_what_heads_do():
    """Weights, what is added to the layer's output, and its gradient are those by head."""
    model, seen = model_of(), []

    def objective(model, hidden, wanted):
        return model.get_output_embeddings()(hidden).float().square().mean()

    ids = torch.arange(60)[None] * 7 % 390 + 2
    backward(model, ids, torch.tensor([30, 50]), objective, lambda it: seen.append(it) or {})
    assert len(seen) == 3
    for it in seen:
        assert (it.q.shape, it.k.shape, it.v.shape) == (
            (1, 4, 60, 32),
            (1, 1, 60, 32),
            (1, 1, 60, 24),
        )
        causal = torch.ones(60, 60, dtype=torch.bool).tril()
        weights = (it.q @ it.k.mT * it.logits.scale).masked_fill(~causal, -torch.inf).softmax(-1)
        read = weights @ it.v
        module = model.model.layers[it.layer].self_attn
        values = module.kv_b_proj.weight.view(4, 28, 24)[:, 16:]
        heads, own = (torch.einsum("bhqr,hvr->bhqv", t, values) for t in (read, it.out))
        assert torch.allclose(heads, own, atol=1e-4)
        whole = torch.einsum("bhqr,hro->bqo", read, it.proj)
        expected = module.o_proj(heads.transpose(1, 2).flatten(2))
        assert torch.allclose(whole, expected, atol=1e-4)
        # A change of the means moves the objective as the change of the output that it makes.
        assert it.grad.shape == read.shape
        assert it.grad.norm() > 0


NEAR = Streaming(8, 64)
SETTINGS = {
    "balanced": {},
    "streaming-llm": {},
    "moa": dict(lengths=(512, 768), cache_share=0.95, prefill_density=0.8),
    "duo": dict(cache_share=0.9, decode_share=0.9, prefill_density=0.9),
}


@pytest.mark.parametrize("method", SETTINGS)
def test_methods_make_plans_with_one_word_a_layer(method, monkeypatch):
    model = model_of()
    monkeypatch.setattr(moa, "STEPS", 2)
    for name, value in dict(TRAINED=NEAR, DEPLOYED=NEAR, STEPS=4, PIECE=2).items():
        monkeypatch.setattr(duo, name, value)
    settings = {"lengths": (512,), "samples": 1, "verify": False, **SETTINGS[method]}
    plan = hfsparse.profile(model, tiny.tokenizer(), method=method, **settings)
    assert plan.model.kv_heads == 1
    assert {len(layer.cache) for layer in plan.layers} == {1}
    ids = torch.arange(600)[None] % 390 + 2
    with hfsparse.patch(model, plan), torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
