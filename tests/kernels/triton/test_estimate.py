"""The fused estimators, interpreted, against the plain patterns that they stand for."""

import pytest
import torch

from hfsparse.kernels import Need
from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns import PATTERNS
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.energy import Energy
from hfsparse.patterns.flexprefill import FlexPrefill
from hfsparse.patterns.hip import HiP
from hfsparse.patterns.sample import Sample
from hfsparse.patterns.sparge import Sparge
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from tests.helpers import batch
from tests.kernels.interpreter import interpreter
from tests.kernels.launches import watch
from tests.patterns.matrix import FUSED

SINGLE, HALF = torch.float32, torch.float16


@pytest.fixture(scope="module")
def choose():
    with interpreter() as run:
        yield lambda *args: run("triton.estimate.lists", *args)


def assert_same(found: BlockLists, plain: BlockLists) -> None:
    """Equal in every count, every listed block, every column and what was cut short."""
    for name in ("full", "part"):
        count, index = (getattr(found, f"{name}_{of}") for of in ("count", "index"))
        assert torch.equal(count, getattr(plain, f"{name}_count"))
        assert ((index >= 0) & (index < found.grid.nk)).all()  # the unused ones too
        for place in torch.cartesian_prod(*(torch.arange(n) for n in count.shape)).tolist():
            listed, n = tuple(place), count[tuple(place)]
            assert torch.equal(index[listed][:n], getattr(plain, f"{name}_index")[listed][:n])
    for name in ("columns", "covered", "cut"):
        ours, theirs = getattr(found, name), getattr(plain, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert torch.equal(found.pairs(), plain.pairs())
    assert torch.equal(found.blocks(), plain.blocks())


@pytest.mark.parametrize(
    ("pattern", "length", "past", "rows", "group", "block", "dtype"),
    [
        (VerticalSlash(45, 130), 200, 45, "left_padded", 2, 32, SINGLE),
        (VerticalSlash(7, 1), 129, 0, "empty_row", 3, 16, HALF),
        (VerticalSlash(300, 300), 127, 127, "equal", 1, 128, SINGLE),
        (BlockTopK(0.25, 2), 190, 45, "left_padded", 1, 32, SINGLE),
        (BlockTopK(0.01, 1), 129, 127, "empty_row", 3, 32, HALF),
        (BlockTopK(1.0, 1), 127, 0, "equal", 1, 64, SINGLE),
        (Antidiagonal(0.6, 1.0), 190, 45, "left_padded", 1, 32, SINGLE),
        (Antidiagonal(0.9, 0.2), 129, 127, "empty_row", 2, 32, HALF),
        (Antidiagonal(1.0, 1.0), 127, 0, "equal", 1, 64, SINGLE),
        (Antidiagonal(0.5, 0.6), 1, 400, "equal", 3, 128, SINGLE),
        (Energy(0.96, 1, 2, 0, 1.0), 190, 45, "left_padded", 1, 32, SINGLE),
        (Energy(0.9, 0, 0, 0, 0.2), 129, 127, "empty_row", 2, 16, HALF),
        (Energy(1.0, 2, 1, 1, 0.3), 127, 0, "equal", 1, 16, SINGLE),
        (Sparge(0.024, 0.7, 1.0), 190, 45, "left_padded", 1, 32, SINGLE),
        (Sparge(0.01, 0.95, 0.2), 129, 127, "empty_row", 2, 32, HALF),
        (Sparge(-0.1, 1.0, 0.4), 127, 0, "equal", 1, 16, SINGLE),
        (FlexPrefill(0.3, 0.0, 1, 1.0), 190, 45, "left_padded", 1, 32, SINGLE),
        (FlexPrefill(0.4, 0.2075, 16, 1.0), 129, 127, "empty_row", 3, 16, HALF),
        (FlexPrefill(0.9, 1.0, 1, 0.3), 127, 0, "equal", 1, 16, SINGLE),
        (Sample(0.7, 7, 0.1, 1.0), 190, 45, "left_padded", 1, 32, SINGLE),
        (Sample(0.9, 1, 0.05, 0.1), 129, 127, "empty_row", 3, 16, HALF),
        (Sample(0.5, 200, 0.1, 0.5), 127, 0, "equal", 1, 128, SINGLE),
        (HiP(0.3, 40, 40), 190, 45, "left_padded", 1, 32, SINGLE),
        (HiP(0.4, 0, 1), 129, 127, "empty_row", 3, 16, HALF),
        (HiP(0.5, 0, 1), 1, 400, "equal", 2, 128, SINGLE),
    ],
)
def test_fused_lists_equal_the_plain_ones(choose, pattern, length, past, rows, group, block, dtype):
    more = dict(past=past, rows=rows, block=block, dtype=dtype)
    it = batch(length, group=group, kv_heads=2 if group == 1 else 1, **more)
    found = choose(pattern, it.q, it.k, it.grid, it.scale)
    plain = pattern.lists(it.q, it.k, it.grid, it.scale)
    assert_same(found, plain)
    if plain.cut is not None:
        assert bool(plain.cut.any()) == (pattern.max_share < 0.5)


@pytest.mark.parametrize(
    "pattern",
    [
        VerticalSlash(40, 30),
        BlockTopK(0.3, 1),
        Antidiagonal(0.7),
        Energy(0.95, 1, 1),
        Sparge(0.02, 0.8),
        FlexPrefill(0.3, 0.3, 32),
        Sample(0.6, 3, 0.05, 1.0),
        HiP(0.5, 0, 1),
    ],
    ids=lambda p: p.kind,
)
def test_the_models_own_window_is_respected(choose, pattern):
    it = batch(150, past=45, rows="equal", group=1, kv_heads=1, window=97)
    found = choose(pattern, it.q, it.k, it.grid, it.scale)
    assert_same(found, pattern.lists(it.q, it.k, it.grid, it.scale))


@pytest.mark.parametrize("dim", [80, 192])
def test_wide_heads_are_read_whole(choose, dim):
    """One q head by each pattern, and head dims that are no power of two or come in pieces."""
    it = batch(100, past=60, group=1, kv_heads=1, dim=dim)
    for pattern in (
        VerticalSlash(35, 110),
        BlockTopK(0.3, 1),
        Antidiagonal(0.7),
        Energy(0.95, 1, 1),
        Sparge(0.02, 0.8),
        FlexPrefill(0.3, 0.3, 32),
        Sample(0.7, 7, 0.1, 1.0),
        HiP(0.5, 0, 1),
    ):
        found = choose(pattern, it.q, it.k, it.grid, it.scale)
        assert_same(found, pattern.lists(it.q, it.k, it.grid, it.scale))


def test_equal_scores_keep_the_earlier_blocks(choose):
    q = k = torch.ones(1, 1, 9 * 32, 16)
    found = choose(BlockTopK(0.01, 4), q, k, Grid.causal(1, 288), 1.0)
    assert found.kept_blocks()[0, 0, 8].nonzero().flatten().tolist() == [0, 1, 2, 8]
    found = choose(HiP(0.25, 0, 1), q, k, Grid.causal(1, 288), 1.0)
    assert found.kept_blocks()[0, 0, 8].nonzero().flatten().tolist() == [0, 1, 2, 8]
    found = choose(Antidiagonal(0.5), q, k, Grid.causal(1, 288), 1.0)
    assert found.kept_blocks()[0, 0, 8].nonzero().flatten().tolist() == [0, 1, 2, 3, 8]
    for pattern in (
        Energy(1.0, 0, 0, 0, 0.4),
        Sparge(0.5, 0.6, 0.4),
        FlexPrefill(0.5, 1.0, 1, 0.4),
        FlexPrefill(0.5, 1.0, 1, 1.0),
    ):
        grid = Grid.causal(1, 288)
        assert_same(choose(pattern, q, k, grid, 1.0), pattern.lists(q, k, grid, 1.0))


def test_scores_in_slices_choose_the_same():
    """No room for the scores of more than a few query blocks at a time."""
    it = batch(400, group=1, kv_heads=1)
    with interpreter(triton__select__SCRATCH=4 * 2 * 13 * 5) as run:
        for pattern in (BlockTopK(0.1, 1), Antidiagonal(0.5), Energy(0.95), Sparge(0.02, 0.8)):
            found = run("triton.estimate.lists", pattern, it.q, it.k, it.grid, it.scale)
            assert_same(found, pattern.lists(it.q, it.k, it.grid, it.scale))


# -- around the kernels --------------------------------------------------------------------------


@pytest.fixture
def estimate():
    return pytest.importorskip("hfsparse.kernels.triton.estimate", exc_type=ImportError)


@pytest.mark.parametrize(
    "pattern",
    [VerticalSlash(45, 130), *(PATTERNS[kind]() for kind in FUSED if kind != "vertical_slash")],
    ids=lambda p: p.kind,
)
def test_a_new_length_compiles_nothing(estimate, pattern, monkeypatch):
    from hfsparse.kernels.triton import prefill as triton_prefill

    seen = watch(monkeypatch, *estimate.PARTS, triton_prefill)
    found = []
    for length, past, rows in ((1, 0, "equal"), (129, 0, "equal"), (1000, 3, "left_padded")):
        it = batch(length, past=past, rows=rows, block=128, dim=64, group=3)
        lists = estimate.lists(pattern, it.q, it.k, it.grid, it.scale)
        kv = torch.arange(6) // 3
        triton_prefill.prefill(it.q, it.k, it.v, lists, kv, scale=it.scale)
        found.append(set(seen))
    assert found[0]
    assert found[0] == found[1] == found[2]


def test_the_patterns_known_to_be_fused_stay_so(estimate):
    looks = {kind for kind, cls in PATTERNS.items() if not hasattr(cls, "band")}
    assert set(FUSED) <= {cls.kind for cls in estimate.FUSED} <= looks


def test_slices_cover_every_query_block_once_and_stay_small(estimate, monkeypatch):
    monkeypatch.setattr(estimate.select, "SCRATCH", 100_000)
    grid = Grid.causal(1, 4000)
    found = estimate.select.empty(grid, 2, 3)
    for groups, step in ((1, 1), (2, 8)):
        slices = [
            (first, scores.shape) for first, scores in estimate.select.slices(found, groups, step)
        ]
        assert len(slices) > 1
        end = 0
        for first, (B, H, n, *rest) in slices:
            assert first == end
            assert (B, H, rest) == (1, 2, [groups, grid.nk])
            assert n % step == 0 or first + n == grid.nq
            assert 4 * B * H * n * groups * grid.nk <= 100_000
            end = first + n
        assert end == grid.nq


def test_what_is_not_fused_is_said(estimate):
    need = Need(torch.device("cpu"), SINGLE, 64, 64, chooser=BlockTopK())
    assert estimate.why_not(need) is None
    assert "streaming is not fused" in estimate.why_not(need._replace(chooser=Streaming()))
    assert "at most 512" in estimate.why_not(need._replace(head_dim=640))
    wide = need._replace(head_dim=256, chooser=VerticalSlash())
    assert "shared memory" in estimate.why_not(wide)
    assert estimate.why_not(wide._replace(dtype=HALF)) is None
    assert "blocks of 48" in estimate.why_not(need._replace(block=48))
    assert "dropped keys" in estimate.why_not(need._replace(dropped=True))
