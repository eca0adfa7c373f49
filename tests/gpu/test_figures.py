"""On a GPU, too, a plan expects what the patched model measures: its blocks are wider there."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import hfsparse
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.stats import FIGURES
from tests import tiny
from tests.gpu.common import DEVICE

LENGTH = 700  # tokens: short enough for other blocks on a CPU


def gemma3():
    """Two of three layers have a window of 96 tokens."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    sizes = dict(vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    torch.manual_seed(0)
    config = Gemma3TextConfig(**sizes, **heads, sliding_window=96, layer_types=kinds)
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["plain", "windowed"])
@pytest.mark.parametrize("method", ["minference", "duo"])
def test_a_profile_expects_what_the_patched_model_measures(family, method):
    model = {"plain": lambda: tiny.llama(window=1024), "windowed": gemma3}[family]().to(DEVICE)
    proxy = "error" if method == "duo" else None
    settings = dict(lengths=(LENGTH,), samples=1, verify=False, cache_share=0.75, decode_share=0.8)
    plan = hfsparse.profile(
        model, tiny.tokenizer(), method=method, proxy=proxy, prefill_density=0.9, **settings
    )
    ids = make_prompts(tiny.tokenizer(), LENGTH, 1, 0)[0].ids.to(DEVICE)
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        out = model(ids[:, :-1])
        model(ids[:, -1:], past_key_values=out.past_key_values)
        stats = handle.stats()
    said = plan.expected[LENGTH]
    for end, part in stats.parts.items():
        for name in FIGURES:
            assert getattr(part, name) == pytest.approx(said[name + end], rel=0.01), name
