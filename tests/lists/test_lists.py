"""Invariants of the lists, for grids and patterns drawn by hypothesis."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsparse.kernels import reference
from hfsparse.lists import PAGE, Band, BlockLists, Grid, HeadIndex, PageLists, default_block
from hfsparse.lists.pages import passed_pages
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from tests.helpers import causal, close

share = st.floats(0.01, 1)
few = st.integers(1, 12)
patterns = st.one_of(
    st.builds(Streaming, st.integers(0, 60), st.integers(1, 90), st.floats(0, 1)),
    st.builds(VerticalSlash, st.integers(1, 60), st.integers(1, 160)),
    st.builds(BlockTopK, share, few),
)


@st.composite
def grids(draw) -> Grid:
    """Up to three rows, each with its own past and its own number of new queries, perhaps none."""
    rows = draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 70)), min_size=1, max_size=3))
    new, past = (torch.tensor(t) for t in zip(*rows, strict=True))
    total = torch.where(new > 0, new + past, 0)
    spare = draw(st.integers(0, 5))
    window = draw(st.none() | st.integers(1, 120))
    Sq, Sk = int(new.max()) + spare, int(total.max()) + spare
    return Grid(new, total, max(Sq, 1), max(Sk, 1), draw(st.sampled_from([8, 16, 32])), window)


@st.composite
def cases(draw) -> tuple:
    """A grid, and q and k of 2 kv heads with 2 q heads each; loud keys make the scores uneven."""
    grid, made = draw(grids()), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    B = len(grid.q_len)
    q = torch.randn(B, 4, grid.Sq, 8, generator=made)
    k = torch.randn(B, 2, grid.Sk, 8, generator=made)
    return q, k * torch.rand(B, 2, grid.Sk, 1, generator=made) * 4, grid


def listed(lists: BlockLists, name: str, b: int, h: int, i: int) -> list[int]:
    count, index = getattr(lists, f"{name}_count"), getattr(lists, f"{name}_index")
    return index[b, h, i, : count[b, h, i]].tolist()


@given(cases(), patterns)
def test_lists_keep_the_invariants(case, pattern):
    q, k, grid = case
    lists = pattern.lists(q, k, grid, 8**-0.5)
    mask, dense, block = lists.mask(), causal(grid, 4), grid.block
    assert mask.shape == (len(q), 4, grid.Sq, grid.Sk)
    assert not (mask & ~dense).any(), "a key past the query, past the row, or past the window"
    for b, (new, total) in enumerate(zip(grid.q_len.tolist(), grid.k_len.tolist(), strict=True)):
        own = range(total - new, total)
        assert mask[b, :, range(new), own].all(), "a query does not see its own key"
        sink = pattern.sink if isinstance(pattern, Streaming) else 1
        expected = dense[b, :, :new, :sink]
        assert torch.equal(mask[b, :, :new, :sink], expected), "a sink is not kept"
        for h in range(4):
            for i in range(grid.nq):
                rows = slice(i * block, min((i + 1) * block, new))
                full, part = (listed(lists, name, b, h, i) for name in ("full", "part"))
                assert full == sorted(set(full))
                assert part == sorted(set(part))
                assert not set(full) & set(part), "a block is listed twice"
                for j in full:
                    assert mask[b, h, rows, j * block : (j + 1) * block].all()
                    assert (j + 1) * block <= total
                for j in full + part:
                    assert rows.start < new
                    assert j * block <= total - new + rows.stop - 1, "a block past the query"


@given(cases(), patterns)
def test_densities_count_what_the_mask_keeps(case, pattern):
    q, k, grid = case
    lists = pattern.lists(q, k, grid, 8**-0.5)
    assert torch.equal(lists.pairs(), lists.mask().sum((2, 3)))
    assert torch.equal(grid.pairs(), causal(grid, 1).sum((1, 2, 3)))
    shape = (len(q), 1, grid.nq * grid.block, grid.nk * grid.block)
    padded = torch.zeros(shape, dtype=torch.bool)
    padded[..., : grid.Sq, : grid.Sk] = causal(grid, 1)
    tiles = padded.unflatten(3, (-1, grid.block)).unflatten(2, (-1, grid.block)).any(5).any(3)
    assert torch.equal(grid.blocks(), tiles.sum((1, 2, 3)))
    held = lists.kept_blocks()
    assert not (held & ~tiles).any(), "a block is read of which no pair is causal"
    blocks = lists.blocks()
    if lists.columns is None:
        assert torch.equal(blocks, held.sum((2, 3)).double())
        assert (blocks <= grid.blocks()[:, None]).all()
    assert (blocks * grid.block**2 >= lists.pairs()).all(), "more pairs than its blocks hold"


@given(cases(), patterns)
def test_a_few_query_rows_of_the_mask_equal_those_of_the_whole(case, pattern):
    q, k, grid = case
    lists = pattern.lists(q, k, grid, 8**-0.5)
    rows = torch.arange(grid.Sq)[:: max(grid.Sq // 3, 1)].flip(0)
    assert torch.equal(lists.mask(rows), lists.mask()[:, :, rows])


@given(cases(), patterns)
def test_some_batch_rows_equal_the_same_rows_of_the_batch(case, pattern):
    q, k, grid = case
    mask = pattern.lists(q, k, grid, 8**-0.5).mask()
    rows = torch.arange(len(q)).flip(0)[:2]
    some = pattern.lists(q[rows], k[rows], grid.take(rows), 8**-0.5)
    assert torch.equal(some.mask(), mask[rows])


@given(cases(), st.lists(patterns, min_size=2, max_size=4))
def test_joined_lists_equal_each_alone(case, several):
    q, k, grid = case
    parts = [pattern.lists(q, k, grid, 8**-0.5) for pattern in several]
    both = BlockLists.cat(parts)
    assert torch.equal(both.mask(), torch.cat([part.mask() for part in parts], 1))
    assert torch.equal(both.pairs(), torch.cat([part.pairs() for part in parts], 1))
    assert torch.equal(both.blocks(), torch.cat([part.blocks() for part in parts], 1))


@settings(max_examples=40)
@given(cases(), st.integers(0, 150))
def test_settings_that_keep_everything_equal_dense(case, extra):
    q, k, grid = case
    dense = causal(grid, 4)
    everything = (
        Streaming(0, 160 + extra),
        Streaming(160 + extra, 1),
        VerticalSlash(1, 160 + extra),
        VerticalSlash(160 + extra, 1),
        BlockTopK(1.0, 1),
    )
    for pattern in everything:
        assert torch.equal(pattern.lists(q, k, grid, 8**-0.5).mask(), dense), pattern
    assert torch.equal(BlockLists.of(grid, 4).mask(), dense)


@settings(max_examples=40)
@given(cases(), patterns)
def test_queries_past_a_rows_end_give_zeros(case, pattern):
    q, k, grid = case
    lists = pattern.lists(q, k, grid, 8**-0.5)
    out = reference.prefill(q, k, k, lists, torch.arange(4) // 2, scale=8**-0.5)
    assert out.isfinite().all()
    for b, new in enumerate(grid.q_len.tolist()):
        assert not out[b, :, new:].any()
        assert out[b, :, :new].any(-1).all()


@given(st.integers(0, 10), st.integers(1, 50), st.integers(0, 1 << 16), st.integers(0, 300_000))
def test_a_window_never_grows_faster_than_its_row(sink, recent, rate, position):
    band = Band(sink, recent, rate)
    start = band.start(torch.arange(position, position + 50))
    assert (start.diff() >= 0).all()
    assert (start.diff() <= 1).all()
    assert band.span(position) == position - int(start[0]) + 1


@pytest.mark.parametrize("seen", [0, 30, 64])
def test_a_grid_with_dropped_keys_counts_them_as_dense(seen):
    """A ring's chunk: sink 0-9, window from 40 on, 90 tokens in the row, the last 20 new."""
    first, live = torch.tensor([[0, 40, 72]]), torch.tensor([[10, 32, 18]])
    length = torch.tensor([90])
    grid = Grid(torch.tensor([20]), length, 20, 96, 32, None, first, live)
    plain = Grid(torch.tensor([20]), length, 20, 90, 32)
    assert torch.equal(grid.pairs(), plain.pairs())
    assert torch.equal(grid.blocks(), plain.blocks())
    band = Band(10, 25 + seen // 64 * 6)  # the oldest query, 70, reads back to 46 or 40
    lists = BlockLists.of(grid, 1, band=band)
    mask, at = lists.mask()[0, 0], grid.key_pos[0]
    assert at[at >= 0].tolist() == [*range(10), *range(40, 90)]
    expected = BlockLists.of(plain, 1, band=band).mask()[0, 0]
    assert torch.equal(mask[:, at >= 0], expected[:, at[at >= 0]])
    assert not mask[:, at < 0].any()
    assert torch.equal(lists.pairs(), expected.sum()[None, None])


def test_blocks_are_finer_for_short_rows():
    assert [default_block(n) for n in (1, 4095, 4096, 131_072)] == [32, 32, 128, 128]


def test_a_comparison_that_is_off_fails():
    """The helper that every numeric test uses can fail."""
    a = torch.randn(10)
    assert close(a, a)
    assert not close(a * (1 + 1e-5), a)
    assert not close(torch.full_like(a, torch.nan), a)
    assert not close(a, torch.full_like(a, torch.nan))
    assert close((a * 1.001).bfloat16(), a)
    assert not close((a * 1.02).bfloat16(), a)


def test_an_index_of_heads_stays_where_it_is():
    """A recorded step reads it by its address, whatever else was asked for since."""
    index, cpu = HeadIndex(), torch.device("cpu")
    first, side_by_side = index((0, 2, 5), cpu), index((3, 4), cpu)
    for last in range(6, 3000):
        index((0, 2, last), cpu)
    assert index([0, 2, 5], cpu) is first
    assert (first.tolist(), side_by_side) == ([0, 2, 5], slice(3, 5))
    assert index.tensor((3, 4), cpu) is index.tensor((3, 4), cpu)
    assert copy.deepcopy(index)((0, 2, 5), cpu) is not first


bands = st.builds(Band, st.integers(0, 150), st.integers(1, 300), st.integers(0, 1 << 15))


@given(bands, st.lists(st.integers(1, 900), min_size=1, max_size=3), st.integers(0, 200))
def test_the_pages_around_a_band_are_those_that_hold_a_key_of_it(band, rows, spare):
    lists = PageLists.around(band, torch.tensor(rows), 2, max(rows) + spare)
    for b, n in enumerate(rows):
        near = n - band.span(n - 1)
        read = sorted({key // PAGE for key in range(n) if key < band.sink or key >= near})
        for h in range(2):
            assert lists.pages[b, h, : lists.count[b, h]].tolist() == read
        assert len(read) == -(-n // PAGE) - passed_pages(band, np.array(n))
    assert (lists.pages * PAGE < max(rows) + spare).all(), "a page that the buffers lack"
