"""Products with quantised matrices, interpreted, against those of their numbers in float64."""

import pytest
import torch
from torch.nn.functional import linear

from tests.kernels.codes import matrix
from tests.kernels.interpreter import interpreter


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

    small = dict.fromkeys((1, 2, 4, 8), (4, 256, 2))
    small = dict(triton__quantised__ROW=(4, 64, 2), triton__quantised__ROWS=(16, 64, 2))
    with interpreter(**small) as run:
        yield call


@pytest.mark.parametrize(
    ("kind", "N", "K", "group", "rows"),
    [
        ("int8", 17, 100, 100, 1),
        ("int8", 5, 320, 32, 3),
        ("int8", 16, 512, 512, 8),
        ("fp8", 9, 264, 264, 1),
        ("fp8", 4, 256, 32, 1),
        ("fp8", 6, 384, 128, 1),
        ("fp8", 20, 264, 264, 8),
        ("fp8", 3, 384, 128, 2),
    ],
)
def test_products_are_those_of_the_numbers(product, kind, N, K, group, rows):
    codes = matrix(kind, N, K, group)
    x, bias = torch.randn(rows, 1, K).half(), torch.randn(N).half()
    found, want = (
        product(x, codes, bias),
        linear(x.double(), codes.numbers().double(), bias.double()),
    )
    assert (found.shape, found.dtype) == ((rows, 1, N), x.dtype)
    assert (found - want).abs().max() < 1e-3 * want.abs().max()
