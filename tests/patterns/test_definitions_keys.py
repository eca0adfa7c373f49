"""What patterns keep of small prompts, worked out by plain loops over their papers' definitions."""

from dataclasses import replace
from math import exp

import pytest
import torch

from hfsparse.lists import Grid
from hfsparse.patterns.hip import HiP
from hfsparse.patterns.sample import Sample
from hfsparse.patterns.strided import Strided
from tests.helpers import batch

TOKENS, BLOCK = 200, 16


def drawn(seed: int):
    """One head's q and k, as lists of rows, and how a pattern's lists of them are made."""
    it = batch(TOKENS, group=1, kv_heads=1, block=BLOCK, seed=seed)
    one = replace(it, q=it.q[:1], k=it.k[:1], grid=Grid.causal(1, TOKENS, BLOCK))
    return one.q[0, 0], one.k[0, 0], lambda p: p.lists(one.q, one.k, one.grid, one.scale)


def blocks_of(pattern, grid: Grid) -> list[list[int]]:
    """The key blocks of each query block of one head, positions alone deciding."""
    kept = pattern.placed(grid, 1).kept_blocks()[0, 0]
    return [row.nonzero().flatten().tolist() for row in kept]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("alpha", "stride", "max_share"), [(0.5, 20, 1.0), (0.9, 7, 0.25)])
def test_sample_keeps_the_fewest_columns_that_hold_alpha_of_sampled_attention(
    seed, alpha, stride, max_share
):
    q, k, lists = drawn(seed)
    mass, sampled = [0.0] * TOKENS, 0
    for i in range(TOKENS - 1, -1, -stride):
        weights = [exp(float(q[i] @ k[j]) / 4) for j in range(i + 1)]
        for j, weight in enumerate(weights):
            mass[j] += weight / sum(weights)
        sampled += 1
    kept, held = [], 0.0
    for j in sorted(range(TOKENS), key=lambda j: -mass[j]):
        if held < alpha * sampled and len(kept) < max_share * TOKENS:
            kept.append(j)
            held += mass[j]
    found = lists(Sample(alpha, stride, 0.1, max_share))
    assert found.columns[found.columns < TOKENS].tolist() == sorted(kept)
    assert found.cut.item() == (-(-TOKENS // BLOCK) if held < alpha * sampled else 0)
    for i in range(0, TOKENS, BLOCK):  # a window of 20 tokens, as whole blocks
        near = {j // BLOCK for j in range(max(i - 19, 0), min(i + BLOCK, TOKENS))}
        rows = found.kept_blocks()[0, 0, i // BLOCK].nonzero().flatten().tolist()
        assert rows == sorted({0} | near)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hip_ranks_a_block_by_the_key_that_halving_leaves(seed):
    q, k, lists = drawn(seed)
    found = lists(HiP(share=0.3, sink=20, recent=30)).kept_blocks()[0, 0]
    for i in range(0, TOKENS, BLOCK):
        asked = range(i, min(i + BLOCK, TOKENS), 4)

        def best(j, asked=asked):
            return max(float(q[i] @ k[j]) for i in asked)

        always = {j // BLOCK for j in range(min(20, i + BLOCK))}
        always |= {j // BLOCK for j in range(max(i - 29, 0), min(i + BLOCK, TOKENS))}
        scores = {}
        for block in {*range(i // BLOCK)} - always:
            low, high = block * BLOCK, (block + 1) * BLOCK
            while high - low > 1:
                middle = (low + high) // 2
                if best((middle + high) // 2) > best((low + middle) // 2):
                    low = middle
                else:
                    high = middle
            scores[block] = best(low)
        few = sorted(scores, key=lambda b: -scores[b])[: -(-3 * len(scores) // 10)]
        assert found[i // BLOCK].nonzero().flatten().tolist() == sorted(always | {*few})


def test_halving_finds_a_key_whose_neighbours_match_and_misses_one_that_stands_alone():
    q, k = torch.zeros(2, 1, 1, 8 * BLOCK, 4)
    q[..., 0] = k[..., 1] = 1.0
    k[0, 0, 3 * BLOCK : 3 * BLOCK + BLOCK // 2, 0] = 1.0  # the left half of block 3
    k[0, 0, 5 * BLOCK + 13, 0] = 9.0  # no middle of its half is like it
    grid = Grid.causal(1, 8 * BLOCK, BLOCK)
    kept = HiP(share=0.1, sink=0, recent=1).lists(q, k, grid, 1.0).kept_blocks()[0, 0]
    assert kept[7].nonzero().flatten().tolist() == [0, 3, 7]


def test_equal_scores_keep_the_earlier_blocks_and_columns():
    q = k = torch.ones(1, 1, 12 * BLOCK, 4)
    grid = Grid.causal(1, 12 * BLOCK, BLOCK)
    kept = HiP(share=0.2, sink=0, recent=1).lists(q, k, grid, 1.0).kept_blocks()[0, 0]
    assert kept[11].nonzero().flatten().tolist() == [0, 1, 2, 11]
    last = Sample(alpha=0.5, stride=12 * BLOCK, window=0.01, max_share=0.1)  # one query is asked
    columns = last.lists(q, k, grid, 1.0).columns[0, 0]
    assert columns.tolist() == [*range(len(columns))]


def test_strides_a_window_and_the_first_blocks():
    grid = Grid.causal(1, 10 * BLOCK, BLOCK)
    found = blocks_of(Strided(sink=17, recent=BLOCK + 1, stride=4, shift=2), grid)
    assert found[:3] == [[0], [0, 1], [0, 1, 2]]
    assert found[8] == [0, 1, 2, 6, 7, 8]  # 0 and 1: the sink; 2 and 6; 7 and 8: the window
    assert found[9] == [0, 1, 3, 7, 8, 9]
    found = blocks_of(Strided(sink=0, recent=1, stride=4), grid)
    assert found[9] == [0, 1, 5, 9]


def test_heads_of_other_shifts_share_the_row():
    grid, each = Grid.causal(1, 12 * BLOCK, BLOCK), []
    for shift in range(3):
        each.append(blocks_of(Strided(sink=0, recent=1, stride=3, shift=shift), grid)[11])
    assert sorted(j for row in each for j in row if j not in (0, 11)) == [*range(1, 11)]


def test_random_blocks_are_so_many_others_and_drawn_from_the_whole_past():
    grid = Grid.causal(1, 200 * BLOCK, BLOCK)
    plain, first, second = (
        blocks_of(Strided(sink=0, recent=1, stride=0, random=n, seed=s), grid)
        for n, s in ((0, 0), (5, 0), (5, 1))
    )
    for i in range(200):
        assert len(first[i]) == min(len(plain[i]) + 5, i + 1)
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 180
    far = [j / i for i, row in enumerate(first) if i > 20 for j in row if 0 < j < i]
    assert 0.45 < sum(far) / len(far) < 0.55
    assert sum(x < 0.1 for x in far) > 0.06 * len(far)


@pytest.mark.parametrize("past", [3 * BLOCK, 3 * BLOCK + 5])
def test_chunks_room_and_neighbours_change_no_strided_block(past):
    """Behind a past that is no multiple of a block more may be read, and never less."""
    pattern = Strided(sink=8, recent=40, stride=5, random=2, seed=3)
    whole = pattern.placed(Grid.causal(1, TOKENS, BLOCK), 1).mask()[0, 0]
    new, total = torch.tensor([TOKENS - past, 20]), torch.tensor([TOKENS, 30])
    grid = Grid(new, total, TOKENS - past, TOKENS + 7 * BLOCK, BLOCK)
    chunk = pattern.placed(grid, 1).mask()[0, 0, :, :TOKENS]
    assert not (whole[past:] & ~chunk).any()
    assert torch.equal(whole[past:], chunk) or past % BLOCK
