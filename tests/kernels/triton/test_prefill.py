"""The Triton prefill kernel, interpreted, against plain float32 attention."""

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch

from hfsparse import kernels
from hfsparse.kernels import Need, reference
from hfsparse.lists import Band, BlockLists, Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.packed import PackedFull
from tests.helpers import Batch, batch, causal, close, read_pairs, truth
from tests.kernels.interpreter import interpreter
from tests.kernels.launches import compiled
from tests.patterns.matrix import heads, mixed

SINGLE, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
ROOMS = ["4090", "A100", "H100"]  # with 99, 163 and 227 KiB of shared memory


@pytest.fixture(scope="module")
def prefill():
    with interpreter() as run:
        yield lambda *args, **more: run("triton.prefill.prefill", *args, **more)


def unread(out: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What is given for queries that do not exist."""
    return out.masked_fill(grid.query_pos()[:, None, :, None] >= 0, 0)


@pytest.mark.parametrize(
    ("length", "group", "kv_heads", "rows", "past", "block", "dtype"),
    [
        (1, 3, 2, "equal", 0, 32, SINGLE),
        (1, 4, 1, "empty_row", 45, 128, HALF),
        (31, 7, 1, "left_padded", 45, 16, SINGLE),
        (33, 8, 1, "left_padded", 0, 32, HALF),
        (127, 1, 3, "empty_row", 127, 64, SINGLE),
        (129, 4, 1, "left_padded", 45, 32, SINGLE),
        (129, 7, 1, "equal", 0, 128, HALF),
        (517, 3, 1, "left_padded", 127, 128, SINGLE),
        (517, 7, 1, "equal", 0, 128, HALF),
    ],
)
def test_mixed_heads_match_plain_attention(
    prefill, length, group, kv_heads, rows, past, block, dtype
):
    more = dict(rows=rows, past=past, block=block, dtype=dtype)
    it = batch(length, group=group, kv_heads=kv_heads, **more)
    lists = mixed(it)
    out = prefill(it.q, it.k, it.v, lists, heads(it), scale=it.scale)
    assert out.dtype == dtype
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), it.scale))
    assert not unread(out, it.grid).any()


EXTRAS = {
    "softcap": {"softcap": 3.0},
    "sink_logits": {"s_aux": True},
    "window": {"window": 70},
    "wide_values": {"value_dim": 40},
    "narrow_values": {"value_dim": 8},
    "all_at_once": {"softcap": 5.0, "s_aux": True, "window": 99, "value_dim": 24},
}


@pytest.mark.parametrize(
    ("extras", "dtype"), [*((name, SINGLE) for name in EXTRAS), ("all_at_once", HALF)]
)
def test_what_models_add_matches_plain_attention(prefill, extras, dtype):
    extra = dict(EXTRAS[extras])
    logits = {"softcap": extra.pop("softcap", None), "s_aux": extra.pop("s_aux", None)}
    it = batch(70, past=45, rows="left_padded", group=5, kv_heads=1, dtype=dtype, **extra)
    if logits["s_aux"]:
        logits["s_aux"] = torch.linspace(-2, 3, 5)
    lists = mixed(it)
    out = prefill(it.q, it.k, it.v, lists, heads(it), scale=it.scale, **logits)
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), it.scale, **logits))
    assert not unread(out, it.grid).any()


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        *((8, HALF), (64, SINGLE), (80, HALF), (96, SINGLE), (128, SINGLE), (128, HALF)),
        *((192, HALF), (256, HALF), (512, HALF)),
    ],
)
def test_every_head_dim_matches_plain_attention(prefill, dim, dtype):
    """Of 192 values are narrower, as those that MLA expands."""
    value_dim = 128 if dim == 192 else dim
    more = dict(dim=dim, value_dim=value_dim, dtype=dtype)
    it = batch(150, past=20, group=2, kv_heads=1, block=128, **more)
    lists = mixed(it)
    out = prefill(it.q, it.k, it.v, lists, heads(it), scale=it.scale)
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), it.scale))


@pytest.mark.parametrize(
    "lists",
    [
        lambda grid: BlockLists.of(grid, 4),
        lambda grid: BlockLists.of(grid, 4, band=Band(0, 1000)),
        lambda grid: BlockLists.of(grid, 4, band=Band(1000, 1)),
        lambda grid: BlockLists.of(grid, 4, columns=torch.arange(185).expand(3, 4, -1)),
    ],
    ids=["full", "recent", "sink", "columns"],
)
def test_density_1_equals_dense(prefill, lists):
    it = batch(140, past=45, rows="left_padded", group=2)
    out = prefill(it.q, it.k, it.v, lists(it.grid), heads(it), scale=it.scale)
    assert close(out, truth(it.q, it.k, it.v, causal(it.grid, 4), it.scale))


def test_columns_without_any_block_are_read_by_every_later_query(prefill):
    it = batch(70, group=1)
    columns = torch.tensor([0, 5, 31, 32, 69, 1 << 40]).expand(2, 2, -1)
    nothing = torch.zeros(2, 2, it.grid.nq, it.grid.nk, dtype=torch.bool)
    lists = BlockLists.of(it.grid, 2, nothing, columns=columns)
    out = prefill(it.q, it.k, it.v, lists, heads(it), scale=it.scale)
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), it.scale))


def test_a_ring_that_has_dropped_keys_matches_plain_attention(prefill):
    """Sink 0-9, window from 40 on, 90 tokens in the row, the last 20 new; and a shorter row."""
    first = torch.tensor([[0, 40, 72], [0, 32, 64]])
    live = torch.tensor([[10, 32, 18], [10, 32, 3]])
    new, total = torch.tensor([20, 9]), torch.tensor([90, 67])
    grid = Grid(new, total, 20, 96, 32, None, first, live)
    it = batch(96, group=3, poison=0.0)
    k, v = (t.masked_fill((grid.key_pos < 0)[:, None, :, None], torch.nan) for t in (it.k, it.v))
    for band in (Band(10, 25), Band(3, 31), Band(0, 7, 6554)):
        lists = BlockLists.of(grid, 6, band=band)
        q = it.q[:, :, :20].masked_fill((grid.query_pos() < 0)[:, None, :, None], torch.nan)
        out = prefill(q, k, v, lists, heads(it), scale=it.scale)
        assert close(out, truth(q, k, v, lists.mask(), it.scale))
        assert not unread(out, grid).any()


def test_lists_that_keep_nothing_give_zeros(prefill):
    it = batch(70, group=1)
    nothing = torch.zeros(2, 2, it.grid.nq, it.grid.nk, dtype=torch.bool)
    lists = BlockLists.of(it.grid, 2, nothing)
    for bare in (None, torch.zeros(2)):
        out = prefill(it.q, it.k, it.v, lists, heads(it), scale=it.scale, s_aux=bare)
        assert torch.equal(out, torch.zeros_like(it.q))


def test_one_list_may_serve_every_row_and_q_heads_may_read_any_kv_head(prefill):
    it = batch(70, group=2)
    kv = torch.tensor([1, 0, 0, 1])
    lists = BlockLists.of(it.grid, 4, band=Band(3, 20))
    names, mask = ("full_count", "full_index", "part_count", "part_index"), lists.mask()
    lists = replace(lists, **{name: getattr(lists, name)[:1] for name in names})
    out = prefill(it.q, it.k, it.v, lists, kv, scale=it.scale)
    assert close(out, truth(it.q, it.k[:, kv], it.v[:, kv], mask, it.scale))


def test_huge_logits_stay_finite(prefill):
    it = batch(100, group=1)
    lists = BlockLists.of(it.grid, 2)
    out = prefill(it.q, it.k, it.v, lists, heads(it), scale=1e4)
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), 1e4))


# -- behind packed pages -------------------------------------------------------------------------


def behind_pages(it: Batch, bits):
    """What a store finds for a batch's new tokens: their keys and values behind packed pages, those
    pages, and all keys and values unpacked."""
    new, total = it.grid.q_len.tolist(), it.grid.k_len.tolist()
    past, kv = [t - n for t, n in zip(total, new, strict=True)], it.k.shape[1]
    store = PackedFull(Group(tuple(range(kv)), bits=bits), 0)
    store.create(it.k, it.v)
    store.append(it.k, it.v, Lengths([0] * len(past), past, max(past)))
    at = it.grid.query_pos().clamp(min=0)[:, None, :, None]
    k, v = (t.gather(2, at.expand(-1, kv, -1, t.shape[3])) for t in (it.k, it.v))
    lengths = Lengths(past, new, it.grid.Sq)
    return store.with_pages(k, v, lengths), store.with_chunk(k, v, lengths, it.grid)[:2]


@pytest.mark.parametrize(
    ("bits", "past", "dim", "more"),
    [
        (8, 150, 16, dict(group=3, rows="left_padded", dtype=HALF, block=128)),
        (4, 150, 16, dict(group=8, kv_heads=1, rows="left_padded")),
        ("fp8", 150, 16, dict(group=4, kv_heads=1, rows="empty_row")),
        (4, 64, 80, dict(group=4, kv_heads=1, value_dim=24, block=64)),
        ("fp8", 129, 64, dict(group=1, dtype=HALF, window=70)),
        (8, 63, 128, dict(group=1, block=16)),
        (4, 200, 256, dict(group=1, kv_heads=1, dtype=HALF, block=128)),
    ],
    ids=str,
)
def test_a_past_in_packed_pages_is_read_as_it_is_unpacked(prefill, bits, past, dim, more):
    """Its keys by full blocks, partial ones and columns; and of it all, by dense heads."""
    it = batch(70, past=past, dim=dim, **more)
    (k, v, pages), whole = behind_pages(it, bits)
    logits = {"s_aux": torch.linspace(-2, 3, it.q.shape[1])} if bits == 8 else {"softcap": 3.0}
    wide = replace(it, k=whole[0], v=whole[1])
    for lists in (mixed(wide), BlockLists.of(it.grid, it.q.shape[1])):
        given = lists, heads(it)
        out = prefill(it.q, k, v, *given, scale=it.scale, past=pages, **logits)
        assert close(out, truth(it.q, *whole, lists.mask(), it.scale, **logits))
        assert not unread(out, it.grid).any()
    found = pages.keys(k, slice(None), it.grid.Sk)
    held = (torch.arange(it.grid.Sk) < it.grid.k_len[:, None])[:, None, :, None]
    assert torch.equal(*(t.masked_fill(~held, 0) for t in (found, whole[0])))


# -- skipping ------------------------------------------------------------------------------------


def uneven(length: int, **more) -> Batch:
    """Keys in runs of 16 whose logits differ by far."""
    it = batch(length, **more)
    made = torch.Generator().manual_seed(1)
    loud = 5 * torch.rand(it.k.shape[2] // 16 + 1, generator=made).repeat_interleave(16)
    return replace(it, k=it.k * loud[None, None, : it.k.shape[2], None].to(it.k.dtype))


@pytest.mark.parametrize("rows", ["equal", "left_padded"])
@pytest.mark.parametrize("tile", [(32, 32), (16, 32), (32, 16)])
def test_the_reference_skips_by_the_definition(tile, rows):
    it = uneven(150, past=45, rows=rows, group=2)
    lists = BlockLists.of(it.grid, 4, band=Band(10, 90))
    mask, lost, seen = read_pairs(it, lists, heads(it), 2.0, tile)
    assert 0.1 < lost / seen < 0.9
    counts = torch.zeros(4, 2, dtype=torch.int64)
    more = {"scale": it.scale, "skip": 2.0, "skipped": counts, "tile": tile}
    out = reference.prefill(it.q, it.k, it.v, lists, heads(it), **more)
    assert counts.sum(0).tolist() == [lost, seen]
    assert close(out, truth(it.q, it.k, it.v, mask, it.scale))


@pytest.mark.parametrize(
    ("extras", "dtype"),
    [
        ("plain", SINGLE),
        ("plain", HALF),
        ("softcap", HALF),
        ("columns", SINGLE),
        ("window", SINGLE),
    ],
)
def test_the_kernel_skips_what_the_reference_skips(prefill, extras, dtype):
    window = 120 if extras == "window" else None
    it = uneven(150, past=45, rows="left_padded", group=2, dtype=dtype, window=window)
    lists = BlockLists.of(it.grid, 4)
    if extras == "columns":
        lists = VerticalSlash(20, 100).lists(it.q, it.k, it.grid, it.scale)
    counts = torch.zeros(2, 4, 2, dtype=torch.int64)
    more = {"scale": it.scale, "skip": 2.0}
    if extras == "softcap":
        more.update(softcap=4.0, skip=1.0)
    out = prefill(it.q, it.k, it.v, lists, heads(it), **more, skipped=counts[0])
    expected = reference.prefill(it.q, it.k, it.v, lists, heads(it), **more, skipped=counts[1])
    assert close(out, expected, dtype)
    assert torch.equal(counts[0], counts[1])
    lost, seen = counts[0].sum(0).tolist()
    assert 0.05 < lost / seen < 0.95


def test_a_skip_that_is_never_reached_changes_nothing(prefill):
    it = uneven(100, group=1)
    lists = BlockLists.of(it.grid, 2)
    counts = torch.zeros(2, 2, dtype=torch.int64)
    more = {"scale": it.scale, "skip": 1e9, "skipped": counts}
    out = prefill(it.q, it.k, it.v, lists, heads(it), **more)
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), it.scale))
    assert counts.tolist() == [[0, 2 * 10], [0, 2 * 10]]  # blocks on and under the diagonal


# -- around the kernel ---------------------------------------------------------------------------


def test_heavy_heads_and_heavy_query_blocks_come_first():
    kernel = pytest.importorskip("hfsparse.kernels.triton.prefill", exc_type=ImportError)
    grid = Grid(torch.tensor([300, 200]), torch.tensor([300, 200]), 300, 300)
    light, full = BlockLists.of(grid, 1, band=Band(0, 1)), BlockLists.of(grid, 1)
    order, blocks = kernel._schedule(BlockLists.cat([light, full]), 2)
    assert order.tolist() == [1, 3, 0, 2]  # b * 2 + h: the full heads, the longer row first
    assert blocks[0, 1].tolist() == [*range(9, -1, -1)]
    assert blocks[1, 1].tolist() == [*range(6, -1, -1), 7, 8, 9]  # what is past the row: last


def for_a_card_with(monkeypatch, room: int):
    """The kernel's module, choosing tiles for a card with so much shared memory."""
    kernel = pytest.importorskip("hfsparse.kernels.triton.prefill", exc_type=ImportError)
    monkeypatch.setattr(kernel, "shared_memory", lambda device: room)
    monkeypatch.setattr(kernel, "tile_of", kernel.tile_of.__wrapped__)
    return kernel


@pytest.mark.parametrize("room", [99 << 10, 163 << 10, 227 << 10], ids=ROOMS)
def test_every_head_dim_and_dtype_has_a_tile_on_large_and_small_gpus(monkeypatch, room):
    kernel = for_a_card_with(monkeypatch, room)
    for block, gathered, skips in product(kernel.BLOCKS, (False, True), (False, True)):
        for width, itemsize in product((64, 80, 96, 128, 192, 256, 512), (2, 4)):
            tile = kernel.tile_of(width, itemsize, block, "cpu", gathered, skips)
            assert (tile is None) == (width == 512 and itemsize == 4 and room < 227 << 10)
            if tile is not None:
                assert block % tile[0] == block % tile[1] == 0


@pytest.mark.parametrize(("dim", "skip"), [(256, None), (128, 3.0)], ids=str)
def test_a_tile_that_gathers_columns_fits_in_a_card_with_little_room(monkeypatch, dim, skip):
    """Compiled for an RTX 3090, without one."""
    kernel = for_a_card_with(monkeypatch, 99 << 10)
    made = compiled(monkeypatch, kernel, "_prefill", card=86)
    q = torch.zeros(1, 2, 130, dim, dtype=BF16)
    lists = BlockLists.of(Grid.causal(1, 130, 128), 2, columns=torch.arange(3).expand(1, 2, -1))
    kernel.prefill(q, q, q, lists, torch.arange(2), scale=1.0, skip=skip)
    queries, keys, _ = kernel.tile_of(dim, 2, 128, "cpu", True, skip is not None)
    most = kernel.shared_by(queries, keys, dim, 2, True, skip is not None)
    assert 0 < made[0].metadata.shared <= most <= 99 << 10


def test_what_the_kernel_cannot_do_is_said(monkeypatch):
    kernel = pytest.importorskip("hfsparse.kernels.triton.prefill", exc_type=ImportError)
    q = torch.empty(1, 2, 8, 64)
    need = Need.of(q, q, q, lists=True)
    assert kernel.why_not(need) is None
    assert "float64" in kernel.why_not(need._replace(dtype=torch.float64))
    assert "at most 512" in kernel.why_not(need._replace(value_dim=640))
    assert "blocks of 48 tokens" in kernel.why_not(need._replace(block=48))
    assert "no gradients" in kernel.why_not(Need.of(q.clone().requires_grad_(), q, q, lists=True))
    on_cpu = kernels.PREFILL[2].why_not(need)
    assert kernels.PREFILL[2].name == "Triton"
    assert "needs a CUDA device, not cpu" in on_cpu
    monkeypatch.setattr(kernel, "tile_of", lambda *given: None)
    wide = kernel.why_not(need._replace(head_dim=512))
    assert "heads of 512: too wide for this GPU" in wide


def test_hfsparse_can_be_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import hfsparse, hfsparse.kernels"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
