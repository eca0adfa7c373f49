"""Steps into stores that pack: by the Triton kernels, interpreted, as by the stores' own append."""

from __future__ import annotations

import copy

import pytest
import torch

from hfsparse.lists import FULL, PAGE, Band
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.packed import PackedFull, PackedRing
from hfsparse.selectors.landmarks import Landmarks
from hfsparse.selectors.quest import Quest
from tests.kernels.interpreter import interpreter
from tests.kernels.launches import compiled, launched, stack_of
from tests.kernels.triton.test_append import HALF, SINGLE, of_tokens, positions, tokens

LENGTHS = [62, 190]  # each row ends a page in another step
STEPS = [[1, 1], [1, 0], [1, 3], [16, 0], [0, 1], [16, 16], [16, 16], [16, 16], [1, 1]]
KINDS = {
    "full": Group((0, 1), bits=8),
    "pages": Group((0, 1), selector=Quest(), bits=4),
    "spans": Group((0, 1), selector=Quest(unit=16, bound=8), bits=8),
    "landmarks": Group((0, 1), selector=Landmarks(0.3, 2), bits=4),
    "ring": Group((0, 1), Band(4, 40), bits=4),
    "sink": Group((0, 1), Band(100, 200), bits="fp8"),
}


@pytest.fixture(scope="module")
def append():
    with interpreter() as run:
        yield lambda **more: run("tests.kernels.stores.append_store", **more)


def begin(group: Group, dims, dtype, made):
    """A store of rows of LENGTHS."""
    store = PackedFull(group, 0) if group.band == FULL else PackedRing(group, 0)
    k, v = tokens(len(LENGTHS), max(LENGTHS), dims, dtype, made)
    store.create(k, v)
    store.append(k, v, Lengths([0] * len(LENGTHS), LENGTHS, max(LENGTHS)))
    return store


@pytest.mark.parametrize(
    ("kind", "dims", "dtype"),
    [
        ("full", (64, 128), HALF),
        ("pages", (64, 20), SINGLE),
        ("spans", (16, 16), HALF),
        ("landmarks", (16, 32), SINGLE),
        ("ring", (128, 64), HALF),
        ("sink", (80, 16), SINGLE),
    ],
    ids=str,
)
def test_a_store_is_filled_bit_for_bit_as_its_own_append_does(append, kind, dims, dtype):
    made = torch.Generator().manual_seed(0)
    store, past = begin(KINDS[kind], dims, dtype, made), LENGTHS
    for new in STEPS:
        k, v = (t * torch.randn(t.shape[-1]).exp() for t in tokens(2, max(new), dims, dtype, made))
        k[:, :, 0, :4] *= 2.0 ** -torch.arange(4, 16, 3)  # what fp8 has few numbers for
        k, v = k.to(dtype), v.to(dtype)
        lengths = Lengths(past, new, max(new))
        store.room(past, lengths.rows)
        ours = copy.deepcopy(store)
        append(store=ours, k=k, v=v, query_pos=positions(past, new, max(new)))
        store.append(k, v, lengths)
        past = lengths.rows
        for found, wanted in zip(ours.tensors(), store.tensors(), strict=True):
            if found.ndim == 5 and found.dtype == dtype:  # spans of no token hold anything
                found, wanted = (of_tokens(t, past) for t in (found, wanted))
            found, wanted = (t.contiguous().view(torch.uint8) for t in (found, wanted))
            assert torch.equal(found, wanted), f"differs once {new} made it {past}"
    read = store.read(past)[0]
    if isinstance(store, Full):  # pages were packed, by both
        assert not torch.equal(read[0, :, PAGE : 2 * PAGE], store.k[0, :, PAGE : 2 * PAGE])


def test_a_new_length_launches_the_same(monkeypatch):
    """What a CUDA graph holds on to: grids and numbers; positions it reads."""
    module = pytest.importorskip("hfsparse.kernels.triton.pack", exc_type=ImportError)
    seen, found = launched(monkeypatch, module), []
    store = begin(KINDS["sink"], (64, 64), HALF, torch.Generator().manual_seed(0))
    for past in (LENGTHS, [300, 64]):
        module.pack(store.place(), positions(past, [1, 1], 1))
        found.append(list(seen))
        seen.clear()
    assert found[0] == found[1] != []


@pytest.mark.parametrize("bits", [8, 4, "fp8"])
def test_it_compiles_for_a_gpu(monkeypatch, bits):
    """As it would be launched there, which the interpreter doesn't tell."""
    module = pytest.importorskip("hfsparse.kernels.triton.pack", exc_type=ImportError)
    made = compiled(monkeypatch, module, "_pack")
    store = begin(Group((0, 1), bits=bits), (128, 128), torch.bfloat16, torch.Generator())
    module.pack(store.place(), positions(LENGTHS, [1, 1], 1))
    (kernel,) = made
    assert kernel.metadata.shared <= 48 << 10
    assert not stack_of(kernel)
