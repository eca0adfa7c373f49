"""Quantised weights in recorded steps: which formats are read, as what, and when ours is asked."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from hfsparse import kernels
from hfsparse.kernels import plain
from hfsparse.kernels.codes import read
from hfsparse.runtime.graphs import products

ao = pytest.importorskip("torchao.quantization")


def by_config(config):
    def quantise(layer: nn.Linear) -> None:
        ao.quantize_(layer, config)

    return quantise


def int4_in_tiles(layer: nn.Linear) -> None:
    """Random codes: torchao packs its own on a GPU alone."""
    N, K = layer.weight.shape
    words, scale = torch.randint(-(2**31), 2**31, (N // 8, K // 128, 32, 4)), torch.rand(1, N, 2)
    made = ao.Int4TilePackedTo4dTensor(words.int(), scale.bfloat16(), [1, 128], (N, K))
    layer.weight = nn.Parameter(made, requires_grad=False)


KINDS = {
    "int8": by_config(ao.Int8WeightOnlyConfig()),
    "int8 by groups": by_config(ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(64))),
    "int8 of a matrix": by_config(ao.Int8WeightOnlyConfig(granularity=ao.PerTensor())),
    "fp8": by_config(ao.Float8WeightOnlyConfig()),
    "fp8 by groups": by_config(ao.Float8WeightOnlyConfig(granularity=ao.PerGroup(64))),
    "fp8 of a matrix": by_config(ao.Float8WeightOnlyConfig(granularity=ao.PerTensor())),
}
READ = {**KINDS, "int4": int4_in_tiles}
OTHERS = {
    "plain": lambda layer: None,
    "int8 activations": by_config(ao.Int8DynamicActivationInt8WeightConfig()),
}


def block(quantise) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 8)).bfloat16()
    quantise(made[0])
    return made


@pytest.fixture
def asked(monkeypatch):
    """Rows and matrices of each call that ours was asked for."""
    asked = []

    def run(x, matrices, biases):
        asked.append((x.numel() // x.shape[-1], len(matrices)))
        return plain.quantised(x, matrices, biases)

    row = kernels.Kernel("any", run, lambda need: None)
    monkeypatch.setattr(products, "QUANTISED", (row, kernels.QUANTISED[-1]))
    return asked


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_torchao(kind):
    weight = block(KINDS[kind])[0].weight
    assert torch.equal(read(weight).numbers(), weight.dequantize(torch.float32))


def test_numbers_in_tiles_are_those_that_a_product_of_tensor_cores_reads():
    """Lanes of PyTorch's `matrix_to_m16n8k16_Bint4_layout`, one by one."""
    weight = block(int4_in_tiles)[0].weight
    want, words = torch.empty(64, 128), weight.qdata
    for n, lane, j in itertools.product(range(8), range(32), range(4)):
        word, row = int(words[n, 0, lane, j]), 8 * n + lane // 4
        scale, added = weight.scale_and_zero[0, row].tolist()
        for bit, offset in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
            code = word >> 4 * bit & 15
            want[row, 32 * j + lane % 4 * 2 + offset] = (code - 8) * scale + added
    torch.testing.assert_close(read(weight).numbers(), want)


@pytest.mark.parametrize(("columns", "group"), [(100, 128), (128, 32)])
def test_tiles_that_were_padded_and_smaller_groups_are_torchaos(columns, group):
    words, scale = torch.zeros(8, 1, 32, 4).int(), torch.ones(128 // group, 64, 2).bfloat16()
    assert read(ao.Int4TilePackedTo4dTensor(words, scale, [1, group], (64, columns))) is None


@pytest.mark.parametrize("kind", READ)
def test_few_rows_are_ours_in_a_step_fused_or_not(kind, asked):
    model, x = block(READ[kind]), torch.randn(2, 1, 128).bfloat16()
    want = plain.quantised(x, [read(model[0].weight)], [model[0].bias])
    want = model[1:](want)
    with torch.no_grad():
        with products.OwnProducts():
            assert torch.equal(model(x), want)
        assert asked == [(2, 1)]
        torch.testing.assert_close(fused(model.forward)(x), want)
        assert asked == [(2, 1)] * 2


def test_products_of_the_same_rows_are_one_call_of_a_fused_step(asked):
    layers, x = [block(KINDS[k])[0] for k in ("int8", "fp8", "int8")], torch.randn(1, 3, 128)
    x, int8, fp8 = x.bfloat16(), layers[::2], layers[1:2]
    with torch.no_grad():
        got = fused(lambda x: [layer(x) for layer in layers])(x)
    assert asked == [(3, 2), (3, 1)]
    for layer, found in zip(int8 + fp8, got[::2] + got[1:2], strict=True):
        torch.testing.assert_close(found, plain.quantised(x, [read(layer.weight)], [layer.bias]))


def fused(forward):
    torch.compiler.reset()
    return torch.compile(forward, backend=backend, fullgraph=True)


def backend(module, inputs):
    products.join_products(module)
    return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


@pytest.mark.parametrize("kind", ["int8", *OTHERS])
def test_all_else_is_pytorchs(kind, asked):
    model, rows = block({**KINDS, **OTHERS}[kind]), 33 if kind == "int8" else 1
    x = torch.randn(rows, 128).bfloat16()
    with torch.no_grad():
        want = model(x)
        with products.OwnProducts():
            assert torch.equal(model(x), want)
    assert not asked


def test_no_kernel_of_ours_serves_a_cpu():
    model, x = block(KINDS["int8"]), torch.randn(1, 128).bfloat16()
    with torch.no_grad(), products.OwnProducts():
        got = model(x)
    assert torch.equal(got, model(x))
