"""Streaming attention with a backward on the GPU, and the `duo` method through it."""

from __future__ import annotations

import pytest
import torch

import hfsparse
from hfsparse.kernels import flex
from hfsparse.lists import Band, BlockLists
from hfsparse.profiler.methods import duo
from tests import tiny
from tests.gpu.common import DEVICE, near, on_gpu
from tests.helpers import truth


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [512, 1000])
def test_streaming_and_its_gradient(length, dim):
    it, band = on_gpu(length, group=4, dim=dim), Band(128, 256)
    mask = BlockLists.of(it.grid, 8, band=band).mask()
    inputs = [t.detach().requires_grad_() for t in (it.q, it.k, it.v)]
    plain = [t.detach().float().requires_grad_() for t in inputs]
    out = flex.streaming(*inputs, band, scale=it.scale)
    expected = truth(*plain, mask, it.scale)
    assert near(out, expected)
    along = torch.randn_like(expected)
    out.backward(along.to(out.dtype))
    expected.backward(along)
    for one, other in zip(inputs, plain, strict=True):
        off = (one.grad.float() - other.grad).norm() / other.grad.norm()
        assert off < 2e-2


def test_a_model_on_the_gpu_gets_a_plan(monkeypatch):
    monkeypatch.setattr(duo, "STEPS", 4)
    monkeypatch.setattr(duo, "PIECE", 2)
    model = tiny.llama(1024).to(DEVICE, torch.bfloat16)
    shares = dict(prefill_density=1.0, cache_share=0.75, decode_share=1.0)
    plan = hfsparse.profile(
        model, tiny.tokenizer(), lengths=(768,), samples=2, method="duo", verify=False, **shares
    )
    plan.check(model)
    assert plan.made["steps"] == 4
    assert plan.made["distance"] > 0
