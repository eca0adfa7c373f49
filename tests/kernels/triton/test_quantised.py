"""Products with quantised matrices, interpreted, against those of their numbers in float64."""

import pytest
import torch
from torch.nn.functional import linear

from hfsparse.kernels.codes import Quantised
from tests.kernels.interpreter import interpreter


def matrix(kind: str, N: int, K: int, group: int) -> Quantised:
    """Random codes of a format, as torchao's tensors hold them."""
    made = torch.Generator().manual_seed(N)

    def random(*shape):
        return torch.rand(shape, generator=made) + 0.1

    def codes(*shape, low=-128, high=128, dtype=torch.int8):
        return torch.randint(low, high, shape, generator=made, dtype=dtype)

    if kind == "int8":
        zero = codes(N, K // group) if group < K else None
        return Quantised(N, codes(N, K), random(N, K // group), zero)
    if kind == "fp8":
        return Quantised(N, (random(N, K) - 0.5).to(torch.float8_e4m3fn), random(N, K // group))
    scale, zero = ((random(K // group, -(-N // 8) * 8) - 0.6 * i).half().t() for i in range(2))
    words = dict(low=-(1 << 31), high=1 << 31, dtype=torch.int32)
    if kind == "int4":
        return Quantised(N, codes(N, K // 8, **words), scale[:N], zero[:N])
    return Quantised(N, codes(-(-N // 8), K // 128, 32, 4, **words), scale, zero, tiled=True)


def product_of_bits(x, dtype, codes, bias):
    """In the interpreter's process: fp8 is not pickled."""
    from hfsparse.kernels.triton.quantised import product

    return product(x, codes._replace(codes=codes.codes.view(dtype)), bias)


@pytest.fixture(scope="module")
def product():
    def call(x, codes, bias):
        bits = codes.codes.view(torch.int8)
        given = x, codes.codes.dtype, codes._replace(codes=bits), bias
        return run(f"{__name__}.product_of_bits", *given)

    with interpreter(triton__quantised__COLUMNS=256) as run:
        yield call


@pytest.mark.parametrize(
    ("kind", "N", "K", "held", "group", "rows"),
    [
        ("int8", 6, 100, 100, 100, 1),
        ("int8", 5, 320, 320, 32, 3),
        ("fp8", 9, 264, 264, 264, 8),
        ("fp8", 4, 256, 256, 64, 1),
        ("int4", 7, 320, 320, 32, 1),
        ("int4", 8, 512, 512, 128, 3),
        ("int4 in tiles", 12, 384, 512, 128, 1),
        ("int4 in tiles", 8, 512, 512, 256, 2),
    ],
)
def test_products_are_those_of_the_numbers(product, kind, N, K, held, group, rows):
    codes = matrix(kind, N, held, group)
    x, bias = torch.randn(rows, 1, K).half(), torch.randn(N).half()
    weight = codes.numbers().double()[:N, :K]
    found, want = product(x, codes, bias), linear(x.double(), weight, bias.double())
    assert (found.shape, found.dtype) == ((rows, 1, N), x.dtype)
    assert (found - want).abs().max() < 1e-3 * want.abs().max()
