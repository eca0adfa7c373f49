"""Products of few rows on the GPU, with quantised weights too, and steps of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

import hfsparse
from hfsparse.kernels import plain
from hfsparse.kernels.codes import Quantised
from hfsparse.kernels.triton import products
from tests.gpu.common import DEVICE
from tests.gpu.test_graphs import graphs, inputs
from tests.kernels.codes import matrix
from tests.patcher.families import fresh, mixed
from tests.patcher.runs import generate


@pytest.mark.parametrize("rows", [1, 3, 8, 12, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("K", "sizes"), [(4096, [4096, 1024, 1024]), (576, [1536, 1536]), (14336, [4096]), (2050, [7])]
)
def test_a_product_is_that_of_float32(K, sizes, dtype, rows):
    torch.manual_seed(0)
    x, *weights = (torch.randn(n, K, device=DEVICE, dtype=dtype) for n in (rows, *sizes))
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


@pytest.mark.parametrize("rows", [1, 3, 8, 12, 32])
@pytest.mark.parametrize(
    ("kind", "sizes", "K", "group"),
    [
        ("int8", [4096, 1024, 1024], 4096, 4096),
        ("int8", [1024], 11008, 128),
        ("fp8", [4096], 14336, 14336),
        ("fp8", [77, 80, 3, 16], 2048, 32),
        ("int4", [72, 1000, 16, 8], 2048, 128),
        ("int4", [40], 14336, 256),
    ],
)
def test_products_with_codes_are_those_of_their_numbers(kind, sizes, K, group, rows):
    made = [matrix(kind, n, K, group) for n in sizes]
    made = [Quantised(*(None if t is None else t.to(DEVICE) for t in each)) for each in made]
    x = torch.randn(rows, 1, K, device=DEVICE, dtype=torch.bfloat16)
    biases = [torch.randn(n, device=DEVICE, dtype=x.dtype) if i else None
              for i, n in enumerate(sizes)]  # fmt: skip
    parts = zip(made, biases, strict=True)
    want = [plain.quantised(x.double(), [m], [b]) for m, b in parts]
    want = torch.cat(want, -1)
    off = (products.products_of_codes(x, made, biases) - want).abs().max() / want.abs().max()
    assert off < 2 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("fuse", [False, True])
def test_steps_of_quantised_weights_are_made_of_them(fuse, monkeypatch):
    ao = pytest.importorskip("torchao.quantization")
    name, launched = "products_of_codes", []
    run = getattr(products, name)
    monkeypatch.setattr(products, name, lambda *a: launched.append(len(a[1])) or run(*a))
    model, (ids, mask) = fresh("llama").to(DEVICE, torch.bfloat16), inputs(150)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
    want = generate(model, ids, mask, new=8).logits
    torch.compiler.reset()
    with hfsparse.patch(model, fuse=fuse):
        got = generate(model, ids, mask, new=8).logits
        assert graphs(model).why is None
    assert sorted(set(launched)) == ([1, 2, 3] if fuse else [1])
    want, got = (torch.stack(each).float() for each in (want, got))
    assert (got - want)[:1].abs().max() < 0.1
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
