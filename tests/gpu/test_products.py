"""Products of a row on the GPU, and a fused step of batch 1 that is made of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

import hfsparse
from hfsparse.kernels.triton import products
from tests.gpu.common import DEVICE
from tests.gpu.test_graphs import graphs, inputs
from tests.patcher.families import fresh, mixed
from tests.patcher.runs import generate


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("K", "sizes"), [(4096, [4096, 1024, 1024]), (576, [1536, 1536]), (14336, [4096]), (2050, [7])]
)
def test_a_product_is_that_of_float32(K, sizes, dtype):
    torch.manual_seed(0)
    x, *weights = (torch.randn(n, K, device=DEVICE, dtype=dtype) for n in (1, *sizes))
    biases = [torch.randn(n, device=DEVICE, dtype=dtype) if i else None
              for i, n in enumerate(sizes)]  # fmt: skip
    parts = zip(weights, biases, strict=True)
    want = [linear(x.float(), w.float(), None if b is None else b.float()) for w, b in parts]
    want = torch.cat(want, -1)
    off = (products.products(x, weights, biases) - want).abs().max() / want.abs().max()
    assert off < 2 * torch.finfo(dtype).eps


def test_a_fused_step_of_one_row_is_made_of_them(monkeypatch):
    run, launched = products.products, []
    monkeypatch.setattr(products, "products", lambda *a: launched.append(len(a[1])) or run(*a))
    model, (ids, mask) = fresh("llama").to(DEVICE, torch.bfloat16), inputs(150)
    said = []
    for fuse in (False, True):
        torch.compiler.reset()
        with hfsparse.patch(model, mixed(model), fuse=fuse):
            said.append(generate(model, ids, mask, new=8).logits)
            assert graphs(model).why is None
        assert bool(launched) == fuse
    assert sorted(set(launched)) == [1, 2, 3]  # o and down, gate and up, q and k and v
    want, got = (torch.stack(each).float() for each in said)
    assert (got - want)[:, :1].abs().max() < 0.1
