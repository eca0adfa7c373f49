"""Labels scored, chosen by and written in Triton, interpreted, against the selector itself."""

from __future__ import annotations

import pytest
import torch

from hfsparse.lists import PAGE
from hfsparse.lists.places import Place
from hfsparse.selectors.lowrank import LowRank
from tests.kernels.interpreter import interpreter
from tests.kernels.launches import launched, watch
from tests.kernels.triton.test_quest import assert_same

SINGLE, HALF = torch.float32, torch.float16
LENGTHS = [64 * 9 + 5, 130, 7, 0]
CASES = [  # bits, unit, rank, new tokens, q heads of a group
    (4, 16, 16, 1, 3, SINGLE),
    (8, 16, 16, 1, 3, SINGLE),
    (4, 8, 6, 1, 4, HALF),
    (16, 1, 5, 3, 2, SINGLE),
    (8, 64, 20, 2, 1, HALF),
    (4, 32, 16, 16, 8, SINGLE),
]


@pytest.fixture(scope="module")
def run():
    with interpreter() as run:
        yield run


def drawn(bits: int, unit: int, rank: int, queries: int, group: int, dtype, dim: int = 24, **more):
    """A bound selector, new queries, keys `[4, 2, 10, PAGE, dim]`, NaN beyond rows, and lengths."""
    made = torch.Generator().manual_seed(0)
    seen, length = torch.randn(2, 1, 2, 300, dim, generator=made), torch.tensor(LENGTHS)
    table = dict(zip(("keys", "queries"), seen.mT @ seen / 300, strict=True))
    selector = LowRank(0.2, 2, unit=unit, rank=rank, bits=bits, **more)
    selector = selector.bind(0, range(2), table)
    q = torch.randn(4, 2 * group, queries, dim, generator=made).to(dtype)
    k = torch.randn(4, 2, 10, PAGE, dim, generator=made).to(dtype)
    return selector, q, k.masked_fill(~real(length), torch.nan), length


def real(length: torch.Tensor) -> torch.Tensor:
    return (torch.arange(10 * PAGE) < length[:, None]).view(len(length), 1, 10, PAGE, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_units_equal_the_selectors(run, case):
    selector, q, k, length = drawn(*case)
    index = selector.summarise(k, real(length))
    expected = selector.pages(q, index, length, 0.3)
    found = run("triton.choose.pages", selector, q, index, length, 0.3)
    assert_same(found, expected, index)
    # Of all heads of a layer some, and a row that is too short.
    heads = torch.arange(q.shape[1])
    every = torch.cat([torch.full_like(q, torch.nan), q], 1)
    found = run("triton.choose.pages", selector, every, index, length, 0.3, heads + len(heads), 131)
    assert found.count[1:].eq(0).all()
    assert torch.equal(found.pages[0], expected.pages[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_tokens_get_the_labels_of_a_prompts(run, case):
    selector, q, k, length = drawn(*case)
    Q = q.shape[2]
    wanted = selector.summarise(k, real(length))
    position = length[:, None] - Q + torch.arange(Q)
    position = torch.where(position < 0, -1, position)
    new = k.flatten(2, 3).gather(2, position.clamp(min=0)[:, None, :, None].expand(-1, 2, -1, 24))
    index = {name: t.clone() for name, t in wanted.items()}
    written = (torch.arange(10 * PAGE) == position[..., None]).any(1).view(4, 1, 10, PAGE)
    for t in index.values():
        t[written.expand(-1, 2, -1, -1)] = 77
    # The part has the layer's last heads, in another order.
    given = torch.cat([torch.full_like(new, torch.nan), new.flip(1)], 1)
    heads = torch.tensor([3, 2])
    part = Place((3, 2), k, k, selector=selector, index=index)
    index = run("tests.kernels.triton.test_labels.followed", part, given, heads, position)
    for name, t in index.items():
        assert torch.equal(t, wanted[name]), name


def followed(part: Place, *args) -> dict[str, torch.Tensor]:
    from hfsparse.kernels.triton import labels

    labels.follow(part, *args)
    return part.index


def test_a_new_length_launches_and_compiles_the_same(monkeypatch):
    choose = pytest.importorskip("hfsparse.kernels.triton.choose", exc_type=ImportError)
    labels = choose.labels
    for note in (launched, watch):
        with monkeypatch.context() as patch:
            seen, found = note(patch, choose, labels), []
            for length in ([10 * PAGE, 9], [77, 0]):
                selector, q, k, _ = drawn(8, 16, 16, 1, 4, HALF)
                index = selector.summarise(k, real(torch.tensor(LENGTHS)))
                length = torch.tensor(length * 2)
                choose.pages(selector, q, index, length, 0.3)
                part = Place((0, 1), k, k, selector=selector, index=index)
                labels.follow(part, q[:, :2], torch.arange(2), length[:, None] - 1)
                found.append(list(seen))
                seen.clear()
            assert len(found[0]) == 3
            assert found[0] == found[1]
