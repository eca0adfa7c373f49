"""Norms of transformers' own, of which a recorded step has the bits."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn

from hfsparse.runtime.graphs import fewer
from tests.gpu.common import DEVICE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Olmo2"])
@pytest.mark.parametrize("shape", [(1, 1, 4096), (3, 1, 2304), (1, 1, 8, 128), (1, 5, 576)])
def test_a_norm_has_the_bits_of_the_models(family, shape, dtype, monkeypatch):
    kind = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    norm = getattr(kind, f"{family}RMSNorm")(shape[-1]).to(DEVICE, dtype)
    run, ran = fewer._norm, []
    monkeypatch.setattr(fewer, "_norm", lambda *a: ran.append(a) or run(*a))
    with torch.no_grad():
        nn.init.normal_(norm.weight)
        call = fewer.with_fewer_launches(lambda x: norm(x), norm)
        for seed in range(20):
            torch.manual_seed(seed)
            x = (1 + seed) * torch.randn(shape, device=DEVICE, dtype=dtype)
            assert torch.equal(call(x=x), norm(x))
    assert len(ran) == 20
