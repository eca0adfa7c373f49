"""Modules of transformers' own, of which a recorded step has the bits in fewer launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hfsparse.kernels import Kernel
from hfsparse.runtime.graphs import fewer
from tests.gpu.common import DEVICE
from tests.kernels.triton.test_fewer import kind_of, tiny

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
SEEDS = range(20)


@pytest.fixture
def ran(monkeypatch):
    """Of which table a kernel ran."""
    ran = []

    def counting(name: str, kernel: Kernel) -> Kernel:
        return replace(kernel, run=lambda *given: ran.append(name) or kernel.run(*given))

    for name in ("NORMS", "ROPES", "GATES"):
        *own, last = getattr(fewer, name)
        monkeypatch.setattr(fewer, name, (*(counting(name, kernel) for kernel in own), last))
    return ran


@DTYPES
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Olmo2"])
@pytest.mark.parametrize("shape", [(1, 1, 4096), (3, 1, 2304), (1, 1, 8, 128), (1, 5, 576)])
def test_a_norm_has_the_bits_of_the_models(family, shape, dtype, ran):
    norm = kind_of(family, "RMSNorm")(shape[-1]).to(DEVICE, dtype)
    with torch.no_grad():
        nn.init.normal_(norm.weight)
        call = fewer.with_fewer_launches(lambda x: norm(x), norm, {})
        ran.clear()
        for seed in SEEDS:
            torch.manual_seed(seed)
            x = (1 + seed) * torch.randn(shape, device=DEVICE, dtype=dtype)
            assert torch.equal(call(x=x), norm(x))
    assert ran.count("NORMS") == len(SEEDS)


@DTYPES
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 5)])
def test_queries_and_keys_turned_have_the_bits_of_the_models(family, rows, tokens, dtype, ran):
    attention = tiny(family, "Attention", head_dim=128).to(DEVICE, dtype)
    more = {"device": DEVICE, "dtype": dtype}
    with torch.no_grad():
        call = fewer.with_fewer_launches(attention, attention, {})
        ran.clear()
        for seed in SEEDS:
            torch.manual_seed(seed)
            x = torch.randn(rows, tokens, 32, **more)
            angles = tuple(torch.randn(2, rows, tokens, 128, **more))
            given = {"hidden_states": x, "position_embeddings": angles, "attention_mask": None}
            assert torch.equal(call(**given)[0], attention(**given)[0])
    assert ran.count("ROPES") == len(SEEDS)


@DTYPES
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 5, 32)])
def test_a_gate_and_up_have_the_bits_of_the_models(family, shape, dtype, ran):
    mlp = tiny(family, "MLP", intermediate_size=2000).to(DEVICE, dtype)
    with torch.no_grad():
        call = fewer.with_fewer_launches(lambda x: mlp(x), mlp, {})
        ran.clear()
        for seed in SEEDS:
            torch.manual_seed(seed)
            x = (1 + seed) * torch.randn(shape, device=DEVICE, dtype=dtype)
            assert torch.equal(call(x=x), mlp(x))
    assert ran.count("GATES") == len(SEEDS)
