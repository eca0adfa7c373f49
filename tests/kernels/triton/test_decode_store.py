"""What the kernel over packed pages takes of a GPU: compiled for one, without one."""

import pytest
import torch

from hfsparse.lists import FULL, PAGE, PageLists
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.packed import PackedFull
from tests.kernels.launches import compiled, stack_of


@pytest.mark.parametrize(("bits", "unit"), [(4, PAGE), (4, 16)], ids=str)
@pytest.mark.parametrize("room", [99 << 10, 163 << 10, 227 << 10], ids=["4090", "A100", "H100"])
def test_its_tiles_fit_in_the_shared_memory_that_they_are_chosen_for(monkeypatch, room, bits, unit):
    store = pytest.importorskip("hfsparse.kernels.triton.decode_store", exc_type=ImportError)
    monkeypatch.setattr(store, "shared_memory", lambda device: room)
    monkeypatch.setattr(store, "tile_of", store.tile_of.__wrapped__)
    monkeypatch.setattr(store, "is_nvidia", lambda device: True)
    made = compiled(monkeypatch, store, "_decode_store")
    monkeypatch.setattr(store, "merge_shares", lambda *shares: None)
    packed, k = (
        PackedFull(Group((0, 1), FULL, bits=bits), 0),
        torch.zeros(1, 2, 130, 128).bfloat16(),
    )
    packed.create(k, k)
    packed.append(k, k, Lengths([0], [130], 130))
    q, pages = k.new_zeros(1, 8, 1, 128), torch.zeros(1, 2, 2, dtype=torch.int64)
    length, listed = (
        torch.tensor([130]),
        PageLists(pages, torch.ones(1, 2, dtype=torch.int64), unit),
    )
    store.decode(q, packed.place(), length[:, None] - 1, listed, length=length, scale=1.0)
    (kernel,) = made
    assert 0 < kernel.metadata.shared <= room
    assert stack_of(kernel) <= 64  # a warp has all registers that there are


@pytest.mark.parametrize("bits", [8, "fp8"])
def test_other_codes_need_no_more_registers(monkeypatch, bits):
    test_its_tiles_fit_in_the_shared_memory_that_they_are_chosen_for(
        monkeypatch, 227 << 10, bits, PAGE
    )
