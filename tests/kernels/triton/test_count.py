"""Pairs counted by the kernel, interpreted, against the plain count and the boolean mask."""

import pytest

from hfsparse.lists import Band, BlockLists, HeadIndex
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from tests.helpers import batch
from tests.kernels.interpreter import interpreter


@pytest.fixture(scope="module")
def count():
    with interpreter() as run:
        yield lambda lists: run("triton.count.pairs", lists)


@pytest.mark.parametrize("rows", ["equal", "left_padded", "empty_row"])
@pytest.mark.parametrize(("past", "window"), [(0, None), (61, None), (61, 50)])
def test_the_kernel_counts_the_pairs_of_the_mask(count, rows, past, window):
    it = batch(150, past=past, rows=rows, window=window)
    parts = [
        VerticalSlash(45, 20).lists(it.q[:, :3], it.k[:, :1], it.grid, it.scale),
        BlockTopK(0.3, 2).lists(it.q[:, :2], it.k[:, :1], it.grid, it.scale),
        Streaming(3, 9, 0.25).lists(it.q[:, :2], it.k, it.grid, it.scale),
        BlockLists.of(it.grid, 1, band=Band(0, 40)),
        BlockLists.of(it.grid, 1),
    ]
    lists = BlockLists.cat(parts)
    assert lists.columns is not None
    want = lists.mask().sum((2, 3))
    assert count(lists).tolist() == lists.pairs().tolist() == want.tolist()
    order = [4, 0, 8, 2, 6, 1, 3, 5, 7]
    found = count(lists.in_order(order, HeadIndex()))
    assert found.tolist() == want[:, order].tolist()
