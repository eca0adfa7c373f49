"""Products with quantised matrices, interpreted, against those of their numbers in float64."""

import pytest
import torch
from torch.nn.functional import linear

from tests.kernels.codes import matrix
from tests.kernels.interpreter import interpreter


def products_of_bits(x, dtype, matrices, biases):
    """In the interpreter's process: fp8 is not pickled."""
    from hfsparse.kernels.triton.products import products_of_codes

    return products_of_codes(x, [m._replace(codes=m.codes.view(dtype)) for m in matrices], biases)


@pytest.fixture(scope="module")
def products():
    def call(x, matrices, biases):
        bits = [m._replace(codes=m.codes.view(torch.int8)) for m in matrices]
        given = x, matrices[0].codes.dtype, bits, biases
        return run(f"{__name__}.products_of_bits", *given)

    rows = dict.fromkeys((8, 16, 32), (16, 64, 2))
    small = dict(triton__products__ROW_OF_CODES=(4, 64, 2), triton__products__ROWS=rows)
    with interpreter(**small) as run:
        yield call


@pytest.mark.parametrize(
    ("kind", "sizes", "K", "group", "rows"),
    [
        ("int8", [17], 100, 100, 1),
        ("int8", [5], 320, 32, 3),
        ("int8", [16, 7], 512, 512, 8),
        ("int8", [5, 16, 3, 8], 320, 64, 1),
        ("fp8", [9, 17, 5], 264, 264, 1),
        ("fp8", [4], 256, 32, 1),
        ("fp8", [6], 384, 128, 1),
        ("fp8", [20], 264, 264, 8),
        ("fp8", [9, 2], 264, 264, 17),
        ("int8", [5], 320, 64, 12),
        ("fp8", [3, 18], 384, 128, 2),
        ("int4", [8], 1024, 128, 1),
        ("int4", [24, 16, 8, 40], 1024, 256, 3),
        ("int4", [40, 8], 2048, 128, 17),
    ],
)
def test_products_are_those_of_the_numbers(products, kind, sizes, K, group, rows):
    matrices = [matrix(kind, n, K, group) for n in sizes]
    x, biases = torch.randn(rows, 1, K).half(), [torch.randn(n).half() for n in sizes]
    biases[1:2] = [None] * len(biases[1:2])
    found, parts = products(x, matrices, biases), zip(matrices, biases, strict=True)
    want = [linear(x.double(), m.numbers().double(), None if b is None else b.double())
            for m, b in parts]  # fmt: skip
    want = torch.cat(want, -1)
    assert (found.shape, found.dtype) == ((rows, 1, sum(sizes)), x.dtype)
    assert (found - want).abs().max() < 1e-3 * want.abs().max()
