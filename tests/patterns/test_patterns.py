"""Every pattern against the plain boolean mask that its definition means."""

from itertools import product

import numpy as np
import pytest
import torch

from hfsparse.kernels import reference
from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns import PATTERNS
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.energy import Energy
from hfsparse.patterns.flexprefill import FlexPrefill
from hfsparse.patterns.hip import HiP
from hfsparse.patterns.sample import Sample
from hfsparse.patterns.sparge import Sparge
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.strided import Strided
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.selectors import SELECTORS
from tests.helpers import ROWS, batch, causal, close
from tests.patterns.matrix import (
    EVERYTHING,
    PATTERN_ROWS,
    SELECTOR_ROWS,
    SETTINGS,
    oracle_masks,
)

LENGTHS = (1, 31, 32, 33, 127, 128, 129, 1037)
PASTS = (0, 45, 127)  # no multiples of a block; behind 127 a block's first query ends a key block
GROUPS = (1, 3, 4, 8)


def shapes():
    """Every length with every kind of rows and every past; groups and blocks take turns."""
    for n, (length, rows, past) in enumerate(product(LENGTHS, ROWS, PASTS)):
        group, block = GROUPS[(n + n // 4) % 4], (32, 128)[n // 2 % 2]
        name = f"gqa{group}-len{length}-past{past}-{rows}-block{block}"
        yield pytest.param((length, past, rows, group, block), id=name)


def made(shape, **more):
    length, past, rows, group, block = shape
    kv_heads = 1 if group == 8 or length > 1000 else 2
    return batch(length, past=past, rows=rows, group=group, kv_heads=kv_heads, block=block, **more)


def test_every_pattern_and_selector_has_a_row_in_the_matrix():
    missing = set(PATTERNS) - set(PATTERN_ROWS)
    assert not missing, f"write a row of {missing} in tests/patterns/matrix.py"
    assert set(PATTERN_ROWS) == set(PATTERNS)
    assert set(SELECTOR_ROWS) == set(SELECTORS)
    for kind, row in PATTERN_ROWS.items():
        assert row.settings
        assert {setting.kind for setting in row.settings.values()} == {kind}
        assert row.everything
        assert {setting.kind for setting in row.everything.values()} == {kind}


@pytest.mark.parametrize("shape", list(shapes()))
@pytest.mark.parametrize("name", SETTINGS)
def test_lists_equal_the_plain_mask(name, shape):
    it = made(shape)
    group = it.q.shape[1] // it.k.shape[1]
    mask = SETTINGS[name].lists(it.q, it.k, it.grid, it.scale).mask().numpy()
    assert mask.shape == (*it.q.shape[:3], it.grid.Sk)
    for b, h in product(range(len(it.q)), range(it.q.shape[1])):
        one = it.row(b)
        Q, S = one.grid.Sq, one.grid.Sk
        assert not mask[b, h, Q:].any()
        assert not mask[b, h, :, S:].any()
        if Q == 0:
            continue
        q, k = one.q[0, h], one.k[0, h // group]
        surely, perhaps = oracle_masks(name, q, k, it.grid.block, it.scale)
        kept = mask[b, h, :Q, :S]
        assert np.array_equal(kept & surely, surely), f"row {b} head {h}: a pair is missing"
        assert np.array_equal(kept | perhaps, perhaps), f"row {b} head {h}: a pair too many"


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_left_padded_row_equals_its_unpadded_run(name, past):
    it = batch(129, past=past, rows="left_padded", group=3)
    kv = torch.arange(6) // 3
    lists = SETTINGS[name].lists(it.q, it.k, it.grid, it.scale)
    out = reference.prefill(it.q, it.k, it.v, lists, kv, scale=it.scale)
    for b in range(3):
        one = it.row(b)
        alone = SETTINGS[name].lists(one.q, one.k, one.grid, one.scale)
        assert torch.equal(lists.mask()[b : b + 1, :, : one.grid.Sq, : one.grid.Sk], alone.mask())
        expected = reference.prefill(one.q, one.k, one.v, alone, kv, scale=it.scale)
        assert close(out[b : b + 1, :, : one.grid.Sq], expected)
        assert not out[b, :, one.grid.Sq :].any()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_stands_in_padding_changes_nothing(name, rows):
    nan, big, zero = (batch(129, past=45, rows=rows, poison=p) for p in (torch.nan, 1e9, 0.0))
    masks = [SETTINGS[name].lists(i.q, i.k, i.grid, i.scale).mask() for i in (nan, big, zero)]
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_density_1_equals_dense(name, rows, past):
    it = batch(140, past=past, rows=rows, group=3)
    lists = EVERYTHING[name].lists(it.q, it.k, it.grid, it.scale)
    assert torch.equal(lists.mask(), causal(it.grid, 6))
    assert torch.equal(lists.pairs(), it.grid.pairs()[:, None].expand(-1, 6))


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("window", [1, 33, 64, 97])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_models_own_window_is_respected(name, window, past):
    """No pattern reads past the window, and each still keeps its diagonal."""
    it = batch(129, past=past, rows="left_padded", group=2, window=window)
    lists = SETTINGS[name].lists(it.q, it.k, it.grid, it.scale)
    mask, dense = lists.mask(), causal(it.grid, 4)
    assert not (mask & ~dense).any()
    for b, (new, total) in enumerate(
        zip(it.grid.q_len.tolist(), it.grid.k_len.tolist(), strict=True)
    ):
        assert mask[b, :, range(new), range(total - new, total)].all()
    assert torch.equal(lists.pairs(), mask.sum((2, 3)))


def test_columns_are_chosen_by_the_attention_that_the_window_leaves():
    """A key far outside the window scores highest, and is not chosen."""
    q = torch.ones(1, 1, 256, 16)
    k = torch.zeros(1, 1, 256, 16)
    k[:, :, 60] = 9.0  # out of the last queries' reach
    k[:, :, 200] = 5.0  # within it
    pattern = VerticalSlash(columns=31, diagonals=1)
    for window, expected in ((None, 60), (128, 200)):
        columns = pattern.lists(q, k, Grid.causal(1, 256, window=window), 1.0).columns
        assert columns[0, 0, -1] == expected


def test_equal_scores_keep_the_earlier_blocks():
    """Ties of block_topk go to the lower block: row 8 of blocks keeps 0, 1, 2 and its own."""
    q = k = torch.ones(1, 2, 9 * 32, 16)
    lists = BlockTopK(share=0.01, min_blocks=4).lists(q, k, Grid.causal(1, 288), 1.0)
    assert lists.kept_blocks()[0, 0, 8].nonzero().flatten().tolist() == [0, 1, 2, 8]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_a_dropped_key_never_comes_back(rate):
    pattern = Streaming(sink=3, recent=7, recent_per_token=rate)
    it = batch(300, group=1)
    mask = pattern.lists(it.q, it.k, it.grid, it.scale).mask()[0, 0]
    was = torch.tril(mask)[:-1] & ~mask[1:]  # dropped between one query and the next
    dropped = was.cumsum(0).bool()
    assert not (dropped & mask[1:]).any()
    start = pattern.band.start(torch.arange(200_000))
    assert (start.diff() >= 0).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Streaming(sink=-1), "sink is -1"),
        (lambda: Streaming(recent=0), "recent is 0"),
        (lambda: Streaming(recent_per_token=1.01), "recent_per_token is 1.01"),
        (lambda: Streaming(recent_per_token=-0.1), "recent_per_token is -0.1"),
        (lambda: VerticalSlash(columns=0), "columns is 0"),
        (lambda: VerticalSlash(diagonals=0), "diagonals is 0"),
        (lambda: BlockTopK(share=0), "share is 0"),
        (lambda: BlockTopK(share=1.5), "share is 1.5"),
        (lambda: BlockTopK(min_blocks=0), "min_blocks is 0"),
        (lambda: Energy(alpha=0), "alpha is 0"),
        (lambda: Energy(recent_blocks=-1), "recent_blocks is -1"),
        (lambda: Energy(max_share=0), "max_share is 0"),
        (lambda: Sparge(theta=1.1), "theta is 1.1"),
        (lambda: Sparge(tau=0), "tau is 0"),
        (lambda: Sparge(max_share=2), "max_share is 2"),
        (lambda: FlexPrefill(gamma=0), "gamma is 0"),
        (lambda: FlexPrefill(tau=1.5), "tau is 1.5"),
        (lambda: FlexPrefill(min_budget=0), "min_budget is 0"),
        (lambda: FlexPrefill(max_share=0), "max_share is 0"),
        (lambda: Sample(alpha=0), "alpha is 0"),
        (lambda: Sample(window=1.5), "window is 1.5"),
        (lambda: Sample(max_share=0), "max_share is 0"),
        (lambda: Sample(stride=0), "stride is 0"),
        (lambda: HiP(share=0), "share is 0"),
        (lambda: HiP(sink=-1), "sink is -1"),
        (lambda: HiP(recent=0), "recent is 0"),
        (lambda: Strided(sink=-1), "sink is -1"),
        (lambda: Strided(recent=0), "recent is 0"),
        (lambda: Strided(stride=-1), "stride is -1"),
        (lambda: Strided(shift=8), "shift is 8"),
        (lambda: Strided(random=-1), "random is -1"),
        (lambda: Strided(seed=-1), "seed is -1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_number_out_of_range_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_heads_of_all_patterns_together_equal_each_alone():
    """BlockLists.cat: mixed widths, with and without columns, in order."""
    it = batch(200, past=45, rows="left_padded", group=2)
    parts = [p.lists(it.q, it.k, it.grid, it.scale) for p in SETTINGS.values()]
    parts.insert(2, BlockLists.of(it.grid, 1))
    both = BlockLists.cat(parts)
    assert both.heads == sum(part.heads for part in parts)
    assert torch.equal(both.mask(), torch.cat([part.mask() for part in parts], 1))
    assert torch.equal(both.pairs(), torch.cat([part.pairs() for part in parts], 1))
    assert torch.equal(both.blocks(), torch.cat([part.blocks() for part in parts], 1))
    q = torch.cat([it.q[:, : part.heads] for part in parts], 1)
    kv = torch.cat([torch.arange(part.heads) // 2 for part in parts])
    out = reference.prefill(q, it.k, it.v, both, kv, scale=it.scale)
    for part in parts:
        alone = reference.prefill(
            q[:, : part.heads], it.k, it.v, part, kv[: part.heads], scale=it.scale
        )
        assert close(out[:, : part.heads], alone)
        q, kv, out = q[:, part.heads :], kv[part.heads :], out[:, part.heads :]
