"""Prefill kernels on the GPU against plain float32 attention: Triton's, and flash-attn-4."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch

from hfsparse.kernels import COUNT, dense, fa4, reference
from hfsparse.kernels.triton import prefill as triton_prefill
from hfsparse.lists import Band, BlockLists, Grid
from tests.gpu.common import (
    BF16,
    DEVICE,
    HALF,
    SINGLE,
    causal,
    compiled,
    near,
    need_fa4,
    on_gpu,
    unwritten,
)
from tests.helpers import Batch, truth
from tests.kernels.test_fa4 import scattered
from tests.patterns.matrix import heads, mixed

KERNELS = {"triton": triton_prefill, "fa4": fa4}
both = pytest.mark.parametrize("kernel", KERNELS)


def check(kernel: str, it: Batch, lists: BlockLists, **logits) -> None:
    if kernel == "fa4":
        need_fa4(it.q, it.k, it.v)
    expected = truth(it.q, it.k, it.v, lists.mask(), it.scale, **logits)
    unwritten(expected.shape, it.v.dtype)
    kv = heads(it).to(DEVICE)
    out = KERNELS[kernel].prefill(it.q, it.k, it.v, lists, kv, scale=it.scale, **logits)
    assert out.dtype == it.v.dtype
    assert near(out, expected)
    assert not out.masked_fill(it.grid.query_pos()[:, None, :, None] >= 0, 0).any()


SHAPES = [
    *(("triton", BF16, dim) for dim in (64, 80, 96, 128, 192, 256, 512)),
    *(("triton", HALF, dim) for dim in (64, 80, 256)),
    *(("triton", SINGLE, dim) for dim in (64, 96, 256, 512)),
    *(("fa4", BF16, dim) for dim in (64, 80, 96, 128)),
    ("fa4", HALF, 128),
]


@pytest.mark.parametrize(("kernel", "dtype", "dim"), SHAPES, ids=str)
def test_every_head_dim_and_dtype(kernel, dtype, dim):
    it = on_gpu(517, past=45, rows="left_padded", dim=dim, dtype=dtype)
    check(kernel, it, mixed(it))


PLACES = {
    **{f"{n}_tokens": dict(length=n) for n in (1, 31, 33, 127, 129, 517)},
    "padded_rows": dict(length=517, rows="left_padded"),
    "an_empty_row": dict(length=300, rows="empty_row"),
    "a_chunk": dict(length=130, past=500, rows="left_padded"),
    "a_window": dict(length=517, window=200),
    "a_chunk_in_a_window": dict(length=150, past=600, window=170, rows="left_padded"),
}


@both
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("build", [mixed, scattered], ids=["mixed_heads", "scattered"])
def test_every_place_of_queries_and_keys(kernel, build, place):
    it = on_gpu(**PLACES[place])
    check(kernel, it, build(it))


@both
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_every_group_of_q_heads(kernel, group):
    it = on_gpu(517, group=group, kv_heads=2)
    check(kernel, it, mixed(it))


@both
def test_narrower_values(kernel):
    it = on_gpu(517, value_dim=64)
    check(kernel, it, mixed(it))


@both
@pytest.mark.parametrize(
    "logits", [{"softcap": 5.0}, {"s_aux": True}, {"softcap": 5.0, "s_aux": True}], ids=str
)
def test_softcap_and_sink_logits(kernel, logits):
    it = on_gpu(300, past=45, rows="left_padded", dtype=HALF)
    if "s_aux" in logits:
        logits = {**logits, "s_aux": torch.linspace(-2, 3, it.q.shape[1], device=DEVICE)}
    check(kernel, it, mixed(it), **logits)


@both
@pytest.mark.parametrize("band", [Band(5, 150), Band(0, 40, 6554), Band(0, 1000)], ids=str)
def test_bands(kernel, band):
    it = on_gpu(517, past=45, rows="left_padded")
    check(kernel, it, BlockLists.of(it.grid, it.q.shape[1], band=band))


@both
def test_a_ring_that_has_dropped_keys(kernel):
    it = on_gpu(512, group=2, poison=0.0)
    first, live = (
        torch.tensor([t], device=DEVICE) for t in ([0, 1000, 1128, 1256], [70, 128, 128, 44])
    )
    new, total = (torch.tensor([n], device=DEVICE) for n in (100, 1300))
    grid = Grid(new, total, 100, 512, 128, None, first, live)
    dead = (grid.key_pos < 0)[:, None, :, None]
    k, v = (t[:1].masked_fill(dead, torch.nan) for t in (it.k, it.v))
    it = replace(it, q=it.q[:1, :, :100], k=k, v=v, grid=grid)
    check(kernel, it, BlockLists.of(grid, 4, band=Band(70, 150)))


@both
def test_blocks_that_no_list_names_are_not_read(kernel):
    """All of them hold NaN, which no mask holds back from a product with values."""
    it = on_gpu(256, past=8192 - 256)
    it = it.row(0)
    it = replace(it, grid=causal(256, 8192))
    keep = torch.zeros(1, 6, it.grid.nq, it.grid.nk, dtype=torch.bool, device=DEVICE)
    keep[..., [0, 7, 40, 62, 63]] = True
    lists = BlockLists.of(it.grid, 6, keep)
    unread = ~keep[0].any((0, 1)).repeat_interleave(128)
    for t in (it.k, it.v):
        t.masked_fill_(unread[:, None], torch.nan)
    check(kernel, it, lists)


@both
def test_time_follows_the_density(kernel):
    """At 16,384 tokens a fifth of the blocks takes less than half the time."""
    grid = causal(16384, 16384)
    q, k, v = (
        torch.randn(1, 16384, n, 128, device=DEVICE, dtype=BF16).transpose(1, 2) for n in (32, 8, 8)
    )
    if kernel == "fa4":
        need_fa4(q, k, v)
    block = torch.arange(grid.nq, device=DEVICE)
    near_by = (block[:, None] - block < 13).expand(1, 32, -1, -1)
    kv = torch.arange(32, device=DEVICE) // 4
    taken = []
    for keep in (None, near_by):
        run = partial(
            KERNELS[kernel].prefill, q, k, v, BlockLists.of(grid, 32, keep), kv, scale=128**-0.5
        )
        taken.append(milliseconds(run))
    print(f"{taken[0]:.2f} ms dense, {taken[1]:.2f} ms over a fifth")
    assert taken[1] < taken[0] / 2


def milliseconds(run, times: int = 10) -> float:
    """The fastest of some calls, as the device has it."""
    found = []
    for _ in range(times + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return min(found[2:])


@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 128), (HALF, 64), (BF16, 256)])
def test_tiles_below_a_threshold_are_skipped_as_by_the_reference(dtype, dim):
    it = on_gpu(900, past=45, rows="left_padded", group=2, dim=dim, dtype=dtype, poison=0.0)
    strength = 4 * torch.rand(it.k.shape[2] // 128 + 1, generator=torch.Generator().manual_seed(0))
    k = it.k * strength.repeat_interleave(128)[: it.k.shape[2], None].to(DEVICE, dtype)
    lists, kv = BlockLists.of(it.grid, it.q.shape[1]), heads(it).to(DEVICE)
    counts = torch.zeros(2, it.q.shape[1], 2, dtype=torch.int64, device=DEVICE)
    tile = triton_prefill.tile_of(dim, 2, 128, str(it.q.device), gathered=False)[:2]
    more = {"scale": it.scale, "skip": 3.0}
    out = triton_prefill.prefill(it.q, k, it.v, lists, kv, **more, skipped=counts[0])
    expected = reference.prefill(it.q, k, it.v, lists, kv, **more, skipped=counts[1], tile=tile)
    assert near(out, expected)
    share = (counts[..., 0].sum(1) / counts[..., 1].sum(1)).tolist()
    assert 0.05 < share[0] < 0.95
    assert share[0] == pytest.approx(share[1], abs=0.01)


def test_pairs_are_counted_as_by_the_lists():
    it = on_gpu(517, past=45, rows="left_padded", group=7, kv_heads=2)
    for lists in (mixed(it), scattered(it)):
        assert torch.equal(COUNT[0].run(lists), lists.pairs())


def test_a_new_length_compiles_nothing():
    found = []
    for length in (517, 300, 1024, 2000, 4133):
        it = on_gpu(length, rows="equal")
        check("triton", it, scattered(it))
        found.append(compiled(triton_prefill))
    assert found == [found[0]] * 5


# -- flash-attn-4 alone --------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("past", [0, 400])
def test_fa4_dense(dim, past):
    it = on_gpu(517, past=past, group=4, dim=dim).row(0)
    need_fa4(it.q, it.k, it.v, lists=False)
    lists = BlockLists.of(it.grid, 8)
    expected = truth(it.q, it.k, it.v, lists.mask(), it.scale)
    unwritten(expected.shape, BF16)
    assert near(fa4.dense(it.q, it.k, it.v, it.scale), expected)


@pytest.mark.parametrize("build", [scattered, lambda it: BlockLists.of(it.grid, 6)])
def test_fa4_compiles_once_a_plan_shape_never_for_a_length(build):
    found = []
    for length in (517, 300, 1024, 2000, 4133):
        it = on_gpu(length, rows="equal")
        check("fa4", it, build(it))
        found.append(fa4.compiled())
    assert found == [found[0]] * 5


def test_dense_by_torch_where_rows_are_padded_or_have_a_past():
    for more in (dict(rows="left_padded"), dict(past=300), dict(past=45, rows="empty_row")):
        it = on_gpu(200, **more)
        lists = BlockLists.of(it.grid, it.q.shape[1])
        expected = truth(it.q, it.k, it.v, lists.mask(), it.scale)
        with patch.object(dense, "MASK", 1 << 14):  # in pieces
            assert near(dense.prefill(it.q, it.k, it.v, it.grid, scale=it.scale), expected)
