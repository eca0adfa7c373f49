"""Labels scored, chosen by and written in Triton on the GPU, against the selector itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hfsparse.kernels.triton import choose as triton_choose
from hfsparse.kernels.triton import labels as triton_labels
from hfsparse.lists import PAGE
from hfsparse.lists.places import Place
from hfsparse.selectors.lowrank import LowRank
from tests.gpu.common import BF16, DEVICE, HALF, SINGLE, compiled
from tests.gpu.test_quest import same

LENGTHS = (64 * 90 + 5, 64 * 41, 300, 17, 0)
CASES = [  # bits, unit, rank, new tokens, q heads of a group, head dim
    *[(8, unit, 16, 1, 4, 128) for unit in (1, 8, 16, 32, 64)],
    *[(4, unit, 32, 1, 4, 128) for unit in (1, 8, 16, 64)],
    *((4, 16, 16, 1, 4, 128), (4, 8, 6, 3, 7, 80), (4, 1, 64, 1, 8, 128)),
    *((16, 16, 16, 1, 4, 128), (16, 8, 5, 16, 1, 64), (8, 16, 128, 16, 8, 256)),
]


def drawn(bits, unit, rank, queries, group, dim, dtype, lengths=LENGTHS, **more):
    """A bound selector, new queries, keys `[B, 2, P, PAGE, D]`, which are real, and lengths."""
    made = torch.Generator(DEVICE).manual_seed(0)
    B, P, length = len(lengths), -(-max(lengths) // PAGE), torch.tensor(lengths, device=DEVICE)

    def random(*shape):
        return torch.randn(*shape, generator=made, device=DEVICE)

    spread = [random(1, 2, dim, dim) for _ in "kq"]
    table = {name: (t.mT @ t).cpu() for name, t in zip(("keys", "queries"), spread, strict=True)}
    selector = LowRank(0.1, 2, unit=unit, rank=rank, bits=bits, **more)
    selector = selector.bind(0, range(2), table)
    q = random(B, queries, 2 * group, dim).to(dtype).transpose(1, 2)
    k = random(B, 2, P, PAGE, dim).to(dtype)
    real = (torch.arange(P * PAGE, device=DEVICE) < length[:, None]).view(B, 1, P, PAGE, 1)
    return selector, q, k.masked_fill(~real, torch.nan), real, length


@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_units_equal_the_selectors(case, dtype):
    selector, q, k, real, length = drawn(*case, dtype)
    index = selector.summarise(k, real)
    for chosen in (selector, replace(selector, share=0.9, top_p=0.5)):
        found = triton_choose.pages(chosen, q, index, length, 0.125)
        same(found, chosen.pages(q, index, length, 0.125))


@pytest.mark.parametrize("dtype", [BF16, SINGLE])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_tokens_get_the_labels_of_a_prompts(case, dtype):
    selector, q, k, real, length = drawn(*case, dtype)
    (_, H, P, _, D), Q = k.shape, q.shape[2]
    wanted = selector.summarise(k, real)
    position = length[:, None] - Q + torch.arange(Q, device=DEVICE)
    position = torch.where(position < 0, -1, position)
    at = position.clamp(min=0)[:, None, :, None].expand(-1, H, -1, D)
    new = k.flatten(2, 3).gather(2, at)
    index = {name: torch.zeros_like(t) for name, t in wanted.items()}
    part = Place((0, 1), k, k, selector=selector, index=index)
    triton_labels.follow(part, new, torch.arange(2, device=DEVICE), position)
    written = (torch.arange(P * PAGE, device=DEVICE) == position[..., None]).any(1)
    for name, t in index.items():
        ours, theirs = (x.flatten(2, 3).transpose(1, 2).float() for x in (t, wanted[name]))
        assert not ours[~written].any()
        apart = (ours[written] != theirs[written]).float().mean()
        assert apart < 0.01, f"{name}: sums in another order round a few elsewhere"


@pytest.mark.parametrize("lengths", [(131072 - 5,), (64 * 1500, 64 * 700 - 3)], ids=str)
@pytest.mark.parametrize("unit", [8, 64])
def test_long_rows_and_room_for_more_pages(unit, lengths):
    selector, q, k, real, length = drawn(4, unit, 32, 1, 4, 128, BF16, lengths)
    index = selector.summarise(k, real)
    found = triton_choose.pages(selector, q, index, length, 0.125)
    same(found, selector.pages(q, index, length, 0.125))
    roomy = {name: torch.cat([t, t.flip(2)], 2) for name, t in index.items()}
    if 2 * k.shape[2] * PAGE // unit <= triton_choose.MOST:
        again = triton_choose.pages(selector, q, roomy, length, 0.125)
        assert torch.equal(again.count, found.count)
        n = int(found.count[0, 0])
        assert torch.equal(again.pages[0, :, :n], found.pages[0, :, :n])


def test_a_new_length_compiles_nothing():
    found = []
    for length in (5, 64, 700, 8000):
        selector, q, k, real, rows = drawn(8, 16, 16, 1, 4, 128, BF16, (length,))
        index = selector.summarise(k, real)
        triton_choose.pages(selector, q, index, rows, 0.125)
        part = Place((0, 1), k, k, selector=selector, index=index)
        triton_labels.follow(part, q[:, :2], torch.arange(2, device=DEVICE), rows[:, None] - 1)
        found.append(compiled(triton_labels))
    assert found == [found[0]] * 4
