"""flash-attn-4 is given what the lists say; what it answers is seen in tests/gpu."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hfsparse.kernels import Need, fa4
from hfsparse.lists import Band, BlockLists, Grid
from tests.helpers import Batch, batch, close, truth
from tests.patterns.matrix import heads, mixed

BF16 = torch.bfloat16
BLOCK = fa4.BLOCK


def scattered(it: Batch, columns: bool = True) -> BlockLists:
    """A third of the blocks, at random, and 150 columns a head, some of them inside kept blocks."""
    made, H, grid = torch.Generator().manual_seed(1), it.q.shape[1], it.grid
    keep = torch.rand(1, H, grid.nq, grid.nk, generator=made) < 0.3
    some = None
    if columns:
        some = torch.rand(len(it.q), H, grid.Sk, generator=made).argsort(-1)[..., :150]
        some = some.sort(-1).values.to(it.q.device)
    return BlockLists.of(grid, H, keep.to(it.q.device), columns=some)


def read(call: fa4.Call, grid: Grid) -> Tensor:
    """How often each query reads each key slot `[B, H, Sq, N]`, from what flash-attn-4 is given."""
    B, H, R = len(call.k), len(call.heads), grid.nq * BLOCK
    row, band, sink = call.heads.long().T
    at, oldest, start = call.queries[:, band].unbind(2)
    at, oldest, start = (t[..., None] for t in (at, oldest, start))  # [B, H, R, 1]
    key = call.keys[:, row, None]  # [B, H, 1, N]
    tested = fa4.kept(key, at, oldest, start, sink[:, None, None])
    if call.covered is not None:
        slot = torch.arange(key.shape[-1]) - call.sections[:, None]  # [H, N]
        n = call.covered.shape[-1]
        which = slot.clamp(0, n - 1).expand(B, grid.nq, -1, -1).transpose(1, 2)
        covered = call.covered.gather(3, which).repeat_interleave(BLOCK, 2)
        column = fa4.kept_column(key, at, oldest, covered)
        tested = torch.where((slot >= 0)[:, None], column, tested)
    total = torch.zeros(B, H, R, key.shape[-1], dtype=torch.int64)
    for count, index, every in (
        (call.full_count, call.full_index, True),
        (call.part_count, call.part_index, False),
    ):
        count, index = count.expand(B, H, -1), index.expand(B, H, -1, -1)
        for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, grid.nq))).tolist():
            blocks = index[b, h, i, : count[b, h, i]].tolist()
            assert blocks == sorted(set(blocks)), "ascending, none twice"
            for j in blocks:
                tile = (
                    b,
                    h,
                    slice(i * BLOCK, i * BLOCK + BLOCK),
                    slice(j * BLOCK, (j + 1) * BLOCK),
                )
                total[tile] += 1 if every else tested[tile].long()
    return total[:, :, : grid.Sq]


def answer(it: Batch, lists: BlockLists) -> tuple[Tensor, Tensor]:
    """Attention over what flash-attn-4 would read, and the lists' own mask as it would read it."""
    k, v, group = fa4.grouped(it.k, it.v, heads(it).tolist())
    call = fa4.prepare(k, v, lists, group)
    seen = read(call, it.grid)
    real = it.grid.query_pos()[:, None, :, None] >= 0
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, seen.shape[-1] - t.shape[2])) for t in call[:2])
    assert not (real & (seen > 1)).any(), "no key counts twice"
    read_v = (real & (seen > 0)).any(2).unflatten(1, (-1, group)).any(2)
    assert not v[read_v].isnan().any()
    tiles = torch.zeros(v.shape[:3], dtype=torch.bool)  # what lies in a tile that is read
    tiles |= read_v.unflatten(2, (-1, BLOCK)).any(3).repeat_interleave(BLOCK, 2)
    assert not v[tiles].isnan().any(), "0 * NaN is NaN"
    return truth(it.q, k.nan_to_num(0), v.nan_to_num(0), (seen > 0) & real, it.scale), seen


CASES = {
    "whole_blocks": dict(length=384),
    "odd_length": dict(length=517),
    "padded_rows": dict(length=300, rows="left_padded"),
    "an_empty_row": dict(length=200, rows="empty_row"),
    "a_chunk": dict(length=130, past=500, rows="left_padded"),
    "a_window": dict(length=400, window=200),
    "a_chunk_in_a_window": dict(length=150, past=300, window=170),
    "one_query_head_a_group": dict(length=300, group=1, kv_heads=3),
    "wide_groups": dict(length=300, group=5, kv_heads=1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("build", [mixed, scattered], ids=["mixed_heads", "scattered"])
def test_what_it_is_given_says_what_the_lists_say(case, build):
    it = batch(**{"group": 4, "kv_heads": 2, "block": BLOCK, **CASES[case]})
    lists = build(it)
    out, _ = answer(it, lists)
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), it.scale))


@pytest.mark.parametrize("band", [Band(5, 150), Band(0, 40, 6554), Band(300, 1), Band(0, 1000)])
def test_bands_are_tested_in_partial_blocks_alone(band):
    it = batch(517, past=45, rows="left_padded", block=BLOCK)
    other = BlockLists.of(it.grid, 3, band=Band(64, 100))
    lists = BlockLists.cat([BlockLists.of(it.grid, 3, band=band), other])
    out, seen = answer(it, lists)
    assert torch.equal((seen[..., : it.grid.Sk] > 0)[lists.mask()].all(), torch.tensor(True))
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), it.scale))


def test_without_columns_keys_are_not_copied():
    it = batch(256, block=BLOCK)
    grid = replace(it.grid, padded=False, past=False)
    for kv in ([0, 0, 0, 1, 1, 1], [1, 1, 1]):
        k, v, group = fa4.grouped(it.k, it.v, kv)
        call = fa4.prepare(k, v, BlockLists.of(grid, len(kv)), group)
        assert group == 3
        for found, given in ((call.k, it.k), (call.v, it.v)):
            assert found.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


@pytest.mark.parametrize("kv", [[0, 1, 0, 1], [1, 0], [0, 0, 1], [0, 1, 1, 0, 2], [2], [0, 2]])
def test_any_order_of_heads_reads_its_own_keys(kv):
    it = batch(64, kv_heads=3, block=BLOCK)
    k, v, group = fa4.grouped(it.k, it.v, kv)
    assert len(kv) == k.shape[1] * group
    for h, own in enumerate(kv):
        assert torch.equal(k[:, h // group], it.k[:, own])
        assert torch.equal(v[:, h // group], it.v[:, own])


def test_rows_of_other_pasts_have_dead_slots_too():
    it = batch(130, past=300, group=2, block=BLOCK)
    it = replace(it, grid=replace(it.grid, padded=False))
    out, _ = answer(it, BlockLists.of(it.grid, 4))
    assert close(out, truth(it.q, it.k, it.v, BlockLists.of(it.grid, 4).mask(), it.scale))


def test_column_blocks_that_every_query_reads_are_not_tested():
    it = batch(1024, group=2, kv_heads=1, block=BLOCK)
    columns = torch.arange(256).expand(2, 2, -1)
    near = torch.eye(8, dtype=torch.bool).expand(1, 2, -1, -1)
    lists = BlockLists.of(it.grid, 2, near, columns=columns)
    call = fa4.prepare(it.k, it.v, lists, 2)
    assert call.full_count[0, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert call.part_count[0, 0].tolist() == [1] * 8  # the diagonal alone: it covers its columns
    out, _ = answer(it, lists)
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), it.scale))


def test_a_ring_that_has_dropped_keys_is_read_by_position():
    first, live = torch.tensor([[0, 1000, 1128, 1256]]), torch.tensor([[70, 128, 128, 44]])
    new, total = torch.tensor([100]), torch.tensor([1300])
    grid = Grid(new, total, 100, 512, BLOCK, None, first, live)
    it = batch(512, group=2, poison=0.0)
    dead = (grid.key_pos < 0)[:, None, :, None]
    k, v = (t[:1].masked_fill(dead, torch.nan) for t in (it.k, it.v))
    it = replace(it, q=it.q[:1, :, :100], k=k, v=v, grid=grid)
    lists = BlockLists.of(grid, 4, band=Band(70, 150))
    out, _ = answer(it, lists)
    assert close(out, truth(it.q, it.k, it.v, lists.mask(), it.scale))


def test_refusals_say_why(monkeypatch):
    good = Need(torch.device("cuda"), BF16, 64, 64, lists=True)

    def why(**more) -> str | None:
        return fa4.why_not(good._replace(**more))

    assert "needs a Hopper GPU" in why(device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "8.0: needs 9.0" in why()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fa4, "missing", lambda: None)
    assert why() is None
    assert why(logits=True) is None
    assert why(lists=False, head_dim=256, value_dim=256, block=32) is None
    assert "float32" in why(dtype=torch.float32)
    assert "up to 128" in why(head_dim=256)
    assert "multiples of 8" in why(value_dim=60)
    assert "blocks of 64" in why(block=64)
    assert "without block lists" in why(lists=False, logits=True)
    assert "no gradients" in why(grad=True)
    monkeypatch.setattr(fa4, "missing", lambda: "flash-attn-4 is not installed")
    assert "not installed" in why()
