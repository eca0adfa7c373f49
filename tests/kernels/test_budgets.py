"""Budgets that are shares: patterns, selectors and kernels count the same at every length."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hfsparse.kernels import reference
from hfsparse.lists import PAGE, BlockLists, Grid, PageLists
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.energy import Energy
from hfsparse.patterns.sparge import Sparge
from hfsparse.selectors.quest import Quest
from hfsparse.shares import ratio, share_of, whole_of
from tests import asserts
from tests.helpers import close
from tests.kernels.interpreter import interpreter

BLOCK = 16
SHARES = (0.1, 0.3, 0.36, 0.6, 0.123457, 1 / 3, 1.0)


@pytest.fixture(scope="module")
def run():
    with interpreter() as run:
        yield run


def awkward(share: float) -> list[int]:
    """Numbers of blocks at which floats round the share of them up or down, and some others."""
    some = [1, 2, 3, 30, 63, 64, 65, 419]
    for n in range(1, 420):
        floats = ceil(share * n), ceil(np.float32(share) * np.float32(n) - np.float32(1e-6))
        if set(floats) != {ceil(Fraction(share).limit_denominator(10**6) * n)}:
            some.append(n)
    return sorted({*some[:8], *some[-12:]})


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_share_of_six_decimals_is_meant_as_it_is_written(millionths, whole):
    share = ratio(float(f"{millionths / 1e6:.6f}"))
    expected = -(-whole * millionths // 10**6)
    assert share_of(whole, *share) == expected
    assert share_of(torch.tensor(whole), *share) == expected
    assert share_of(np.array([whole]), *share) == expected


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_smallest_whole_of_which_a_share_is_enough(millionths, least):
    share = float(f"{millionths / 1e6:.6f}")
    whole = whole_of(share, least)
    assert share_of(whole - 1, *ratio(share)) < least <= share_of(whole, *ratio(share))


@given(st.floats(1e-6, 1), st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 64))
def test_no_budget_is_above_the_width_of_its_lists(share, blocks, visible, least):
    """Whatever the share, and however many of the row's blocks a query block sees."""
    visible = min(blocks, visible)
    budget = share_of(visible, *ratio(share))
    assert budget <= visible
    assert max(budget, least) <= BlockTopK(share, least).width(blocks)
    assert budget <= Antidiagonal(max_share=share).width(blocks)
    always = min(least, 5)  # sinks, and recent blocks
    assert max(budget, min(visible, 2 * always + 1)) <= Energy(
        1.0, always, always, max_share=share
    ).width(blocks)
    width = Quest(share, max(least, 2)).budget.width(blocks, 1)
    assert min(visible, max(budget, least)) <= width


def ended(blocks: list[int]) -> Grid:
    """Rows of whole blocks; their last token is the one query."""
    total = torch.tensor(blocks) * BLOCK
    return Grid(torch.ones_like(total), total, 1, int(total.max()), BLOCK)


def best(share: float, blocks: list[int]) -> Tensor:
    """How many blocks the kernel keeps for each row of so many."""
    from hfsparse.kernels.triton import select as triton_select

    grid = ended(blocks)
    lists = triton_select.empty(grid, 1, grid.nk)
    scores = torch.rand(len(blocks), 1, 1, 1, grid.nk, generator=torch.Generator().manual_seed(0))
    triton_select.best_blocks(lists, scores, 0, share=share)
    return counted(lists)


def counted(lists: BlockLists) -> Tensor:
    return (lists.full_count + lists.part_count).flatten()


@pytest.mark.parametrize("share", SHARES)
def test_patterns_and_kernel_keep_as_many_blocks_at_every_length(run, share):
    blocks = awkward(share)
    grid, made = ended(blocks), torch.Generator().manual_seed(0)
    q = torch.randn(len(blocks), 1, 1, 4, generator=made)
    k = torch.randn(len(blocks), 1, grid.Sk, 4, generator=made)
    exact = Fraction(share).limit_denominator(10**6)
    expected = [min(n, max(ceil(exact * n), 1 + (n > 1))) for n in blocks]
    all_of_them = Energy(1e-30, 0, 0, 0, share), Sparge(-1, 1.0, share)
    for pattern in (BlockTopK(share, 1), Antidiagonal(1.0, share), *all_of_them):
        lists = pattern.lists(q, k, grid, 0.5)
        asserts.block_lists(lists)
        assert counted(lists).tolist() == expected
    assert run("tests.kernels.test_budgets.best", share, blocks).tolist() == expected


@pytest.mark.parametrize("share", SHARES)
def test_selector_and_kernel_read_as_many_pages_at_every_length(run, share):
    quest, pages = Quest(share, 2), awkward(share)
    length = torch.tensor(pages) * PAGE
    made = torch.Generator().manual_seed(0)
    q = torch.randn(len(pages), 1, 1, 16, generator=made)
    low = torch.randn(len(pages), 1, max(pages), 16, generator=made)
    index = {"low": low, "high": low + 1}
    plain = quest.pages(q, index, length, 0.5)
    asserts.page_lists(plain, max(pages))
    exact = Fraction(share).limit_denominator(10**6)
    expected = [min(n, max(ceil(exact * n), 2)) for n in pages]
    assert plain.count.flatten().tolist() == expected
    assert quest.budget.reads(length.numpy(), np.ones(len(pages), int)).tolist() == [
        n * PAGE for n in expected
    ]
    fused = run("triton.choose.pages", quest, q, index, length, 0.5)
    assert torch.equal(fused.count, plain.count)


@pytest.mark.parametrize(
    ("pattern", "nk"), [(BlockTopK(0.3, 2), 170), (Antidiagonal(1.0, max_share=0.6), 205)], ids=str
)
def test_a_turn_whose_last_query_ends_a_key_block_is_listed_in_its_row(run, pattern, nk):
    """A turn of a block and a token: its last query block has one query, and no partial block."""
    new, total, made = BLOCK + 1, nk * BLOCK, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 16, generator=made) for n in (new, total, total))
    grid = Grid(torch.tensor([new]), torch.tensor([total]), new, total, BLOCK, padded=False)
    lists = run("triton.estimate.lists", pattern, q, k, grid, 0.25)
    assert lists.full_count.max() <= lists.full_index.shape[-1]
    plain = pattern.lists(q, k, grid, 0.25)
    assert torch.equal(lists.full_count, plain.full_count)
    kv = torch.zeros(1, dtype=torch.int64)
    expected = reference.prefill(q, k, v, plain, kv, scale=0.25)
    assert close(run("triton.prefill.prefill", q, k, v, lists, kv, scale=0.25), expected)


# -- what tests of kernels assert of each list ---------------------------------------------------


def test_lists_that_would_lead_a_kernel_astray_end_in_an_assertion(run):
    grid = Grid.causal(1, 5 * BLOCK, BLOCK)
    q = torch.zeros(1, 1, grid.Sq, 16)
    good, kv = BlockLists.of(grid, 1), torch.zeros(1, dtype=torch.int64)
    wide, order = good.full_count.clone(), good.full_index.clone()
    wide[..., -1] = good.full_index.shape[-1] + 1
    order[..., -1, :] = order[..., -1, :].flip(-1)
    wrong = {
        "beyond the row's width": replace(good, full_count=wide),
        "not below 5": replace(good, full_index=good.full_index + 1),
        "does not ascend": replace(good, full_index=order),
        "columns are not ascending": replace(
            good, columns=torch.tensor([[[4, 3]]]), covered=torch.zeros(1, 1, 5, 2).bool()
        ),
    }
    for says, lists in wrong.items():
        with pytest.raises(RuntimeError, match=says):
            run("triton.prefill.prefill", q, q, q, lists, kv, scale=1.0)
        with pytest.raises(RuntimeError, match=says):
            run("triton.count.pairs", lists)
    q, query_pos = torch.zeros(1, 1, 1, 16), torch.tensor([[2 * PAGE - 1]])
    for pages, says in (([0, 1], "a count is beyond"), ([0, 1, 2], "not below 2")):
        lists = PageLists(torch.tensor([[pages]]), torch.tensor([[3]]))
        k = torch.zeros(1, 1, 2 * PAGE, 16)
        more = {"length": torch.tensor([2 * PAGE]), "scale": 1.0}
        with pytest.raises(RuntimeError, match=says):
            run("tests.kernels.stores.decode", q, k, k, query_pos, lists, **more)


def test_rows_too_short_for_a_choice_name_pages_all_the_same(run):
    """Their lists are empty, but a kernel that masks what it gathers reads what they name."""
    q, low = torch.ones(2, 1, 1, 16), torch.zeros(2, 1, 40, 16)
    index = {"low": low, "high": low}
    length = torch.tensor([40 * PAGE, 9])
    for _ in range(3):  # in memory that was used before, too
        found = run("triton.choose.pages", Quest(0.3, 2), q, index, length, 1.0, slice(None), PAGE)
        assert found.count.tolist() == [[12], [0]]
        assert ((found.pages >= 0) & (found.pages < 40)).all()


def test_a_kernel_that_leaves_its_tensors_is_stopped(run):
    """Keys end a token before the grid says so."""
    grid = Grid.causal(1, 5 * BLOCK, BLOCK)
    q, kv = torch.zeros(1, 1, grid.Sq, 16), torch.zeros(1, dtype=torch.int64)
    k, lists = q[:, :, :-1].clone(), BlockLists.of(grid, 1)
    with pytest.raises(Exception, match="lie in no tensor"):
        run("triton.prefill.prefill", q, k, q, lists, kv, scale=1.0)
