"""A decode step's tokens stored by Triton on the GPU, against the cache's own stores."""

from __future__ import annotations

import pytest
import torch

from hfsparse.kernels.triton import append as triton_append
from hfsparse.lists import Band
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.ring import Ring
from tests.gpu.common import BF16, DEVICE, HALF, SINGLE, compiled
from tests.kernels import stores
from tests.kernels.triton.test_append import SPANS, of_tokens

STEPS = [[1, 1, 1]] * 5 + [[3, 0, 1], [16, 1, 7], [0, 0, 0], [2, 16, 0], [1, 1, 1]]


def tokens(queries: int, dims: tuple[int, int], dtype, made) -> list[torch.Tensor]:
    """k and v of new tokens of three rows, heads inside tokens in memory, as models have them."""
    shapes = ((3, queries, 2, dim) for dim in dims)
    drawn = [torch.randn(*s, generator=made, device=DEVICE) for s in shapes]
    return [t.to(dtype).transpose(1, 2) for t in drawn]


@pytest.mark.parametrize("kind", ["all", "pages", "spans", "ring"])
@pytest.mark.parametrize(
    ("dims", "dtype"), [((128, 128), BF16), ((80, 64), HALF), ((256, 256), SINGLE)], ids=str
)
def test_a_store_is_filled_as_its_own_append_does(kind, dims, dtype):
    made, past = torch.Generator(DEVICE).manual_seed(0), [61, 130, 5]
    if kind == "ring":
        store = Ring(Group((0, 1), Band(4, 9)), 0)
    else:
        store = Full(Group((0, 1), selector=SPANS[kind]), 320)
    k, v = tokens(max(past), dims, dtype, made)
    store.create(k, v)
    store.append(k, v, Lengths([0, 0, 0], past, max(past)))
    more = {"sink": 4, "size": store.size} if kind == "ring" else {}
    for new in STEPS:
        queries = max(1, *new)
        k, v = tokens(queries, dims, dtype, made)
        lane = torch.arange(queries)
        at = torch.tensor(past)[:, None] + lane
        at = torch.where(lane < torch.tensor(new)[:, None], at, -1).to(DEVICE)
        kept = [t.clone() for t in store.tensors()]
        lengths = Lengths(past, new, queries)
        store.append(k, v, lengths)
        into = dict(zip(("into_k", "into_v", "low", "high"), kept, strict=False))
        stores.append(k=k, v=v, query_pos=at, **into, **more)
        past = lengths.rows
        for ours, theirs in zip(kept, store.tensors(), strict=True):
            if ours.ndim == 5:
                ours, theirs = (of_tokens(t.cpu(), past) for t in (ours, theirs))
            assert torch.equal(*(t.nan_to_num(7) for t in (ours, theirs)))


def test_a_new_length_compiles_nothing():
    found = []
    for past in (5, 64, 1000, 4096):
        k, v = tokens(1, (64, 64), BF16, torch.Generator(DEVICE).manual_seed(0))
        into = [torch.zeros(3, 2, past + 64, 64, dtype=BF16, device=DEVICE) for _ in range(2)]
        at = torch.full((3, 1), past, device=DEVICE)
        stores.append(k=k, v=v, into_k=into[0], into_v=into[1], query_pos=at)
        assert torch.equal(into[0][:, :, past], k[:, :, 0])
        found.append(compiled(triton_append))
    assert found == [found[0]] * 4
