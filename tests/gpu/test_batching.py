"""Continuous batching on a GPU: steps that CUDA graphs replay give the tokens of `generate`."""

from __future__ import annotations

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import hfsparse
from hfsparse.patcher import batching
from tests.gpu.common import DEVICE
from tests.patcher import families

pytestmark = pytest.mark.skipif(not batching.KNOWN, reason="transformers is too old")
LENGTHS = 230, 17, 301, 64, 129, 250
NEW = 12


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("plan", ["full", "streaming", "mixed"])
def test_requests_get_what_they_get_alone(plan, graphs, whole_float32):
    model = families.fresh("llama").to(DEVICE)
    asked = [families.tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    settings = ContinuousBatchingConfig(
        block_size=64, num_blocks=64, max_batch_tokens=1024, use_cuda_graph=graphs
    )

    def alone(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt], device=DEVICE)
        more = dict(attention_mask=torch.ones_like(ids), pad_token_id=0)
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, **more)
        return out[0, len(prompt) :].tolist()

    with hfsparse.patch(model, getattr(families, plan)(model)):
        want = [alone(prompt) for prompt in asked]
        made = {"generation_config": greedy, "continuous_batching_config": settings}
        out = model.generate_batch(asked, **made)
    assert not {each.error for each in out.values()} - {None}
    assert [each.generated_tokens for each in out.values()] == want
