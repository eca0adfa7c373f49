"""Products of few rows, interpreted, against torch's own; and which a step's graph joins."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from hfsparse import kernels
from hfsparse.runtime.graphs.products import join_products
from tests.kernels.interpreter import interpreter


@pytest.fixture(scope="module", params=["wide", "narrow"])
def products(request):
    """On a card with room for a tile of all warps, and on one without."""
    rows = {8: (16, 16, 3), 16: (32, 16, 3), 32: (32, 16, 3)}
    small = dict(triton__products__ROW=(4, 32, 1), triton__products__ROWS=rows)
    if request.param == "narrow":
        small["triton__products__TOGETHER"] = 64, 128, 99
    with interpreter(**small) as run:
        yield lambda *given: run("triton.products.products", *given)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 32])
@pytest.mark.parametrize(("K", "sizes"), [(128, [9]), (100, [8, 3]), (64, [4, 1, 7, 5, 2])])
def test_products_are_those_of_torch(products, K, sizes, rows):
    torch.manual_seed(K)
    dtype = torch.float16
    x = torch.randn(1, rows, K, dtype=dtype)
    weights = [torch.randn(n, K, dtype=dtype) for n in sizes]
    biases = [torch.randn(n, dtype=dtype) if i % 2 else None for i, n in enumerate(sizes)]
    want = [linear(x.double(), w.double(), None if b is None else b.double())
            for w, b in zip(weights, biases, strict=True)]  # fmt: skip
    found = products(x, weights, biases)
    assert (found.shape, found.dtype) == ((1, rows, sum(sizes)), dtype)
    torch.testing.assert_close(found.double(), torch.cat(want, -1), rtol=2e-3, atol=2e-3)


KINDS = "products", "linear", "function add"


class Block(nn.Module):
    """Three products of one row, one of another, and one whose weight is made on the way."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 2, False), nn.Linear(8, 2)
        self.o = nn.Linear(6, 8)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = self.o(q) + torch.cat([k, v], -1).repeat(1, 1, 2)
        return linear(y, self.o.weight.T * 2), linear(x, self.k.weight)


class Residual(nn.Module):
    """Two products that are added to a row, and one whose sum is of another shape."""

    def __init__(self):
        super().__init__()
        self.o, self.down, self.more = (nn.Linear(8, 8, False) for _ in range(3))

    def forward(self, x):
        y = x + self.o(x * 2)
        z = self.down(torch.relu(y)) + y
        return z, self.more(z * 2) + z.new_ones(3, 1, 1)


def joined(x, monkeypatch, serves=True, kind=Block):
    """The products and sums of a compiled block, which gives what the eager one does."""
    names = []

    def backend(module, inputs):
        join_products(module)
        names.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return module

    torch.manual_seed(0)
    block, why = kind(), None if serves else "not here"
    row = kernels.Kernel("any", kernels.PRODUCTS[-1].run, lambda need: why)
    table = row, kernels.PRODUCTS[-1]
    monkeypatch.setattr("hfsparse.runtime.graphs.products.PRODUCTS", table)
    with torch.inference_mode():
        found = torch.compile(kind.forward, backend=backend, fullgraph=True)(block, x)
        torch.testing.assert_close(found, block(x))
    torch.compiler.reset()
    return [name for name in names if any(word in name for word in KINDS)]


@pytest.mark.parametrize("rows", [1, 32])
def test_a_graph_joins_products_that_share_their_rows(monkeypatch, rows):
    found = joined(torch.randn(rows, 1, 8), monkeypatch)
    assert [n for n in found if "products" in n] == ["hfsparse.products.default"] * 2
    assert len(found) == 4, found  # and the one whose weight is made in the step, and a sum


def test_a_product_adds_the_row_that_it_is_added_to(monkeypatch):
    found = joined(torch.randn(1, 1, 8), monkeypatch, kind=Residual)
    assert [n for n in found if "products" in n] == ["hfsparse.products.default"] * 3
    assert len(found) == 4, found  # one sum is of more rows


def test_nothing_is_joined_where_no_kernel_serves(monkeypatch):
    found = joined(torch.randn(1, 1, 8), monkeypatch, serves=False)
    assert len(found) == 7
    assert not any("products" in name for name in found)


def test_many_rows_are_left_to_torch(monkeypatch):
    assert len(joined(torch.randn(33, 1, 8), monkeypatch)) == 7
