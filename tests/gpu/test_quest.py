"""Quest's pages chosen on the GPU against the selector itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from hfsparse.kernels.triton import choose as triton_choose
from hfsparse.lists import PAGE
from hfsparse.lists.choice import Choice
from hfsparse.selectors.quest import Quest
from tests.gpu.common import BF16, DEVICE, HALF, SINGLE, compiled, rounding, unwritten

PLAIN = Quest()
LENGTHS = (64 * 21 + 5, 64 * 9, 300, 17, 0)


def summaries(lengths, queries=1, group=3, dim=64, dtype=SINGLE, kv_heads=2, room=0, quest=PLAIN):
    """q, the index and lengths of random rows; NaN in the room for more pages."""
    made = torch.Generator(DEVICE).manual_seed(0)
    P = -(-max(lengths) // PAGE)

    def random(*shape):
        return torch.randn(*shape, generator=made, device=DEVICE).to(dtype)

    q = random(len(lengths), queries, group * kv_heads, dim).transpose(1, 2)
    k = random(len(lengths), kv_heads, P, PAGE, dim)
    index = quest.summarise(k, torch.ones_like(k[..., :1], dtype=torch.bool))
    for name, t in index.items():
        index[name] = pad(t, (*[0] * 2 * (t.ndim - 3), 0, room), value=torch.nan)
    return q, index, torch.tensor(lengths, device=DEVICE)


def same(found, expected) -> None:
    """Equal counts; equal pages, but for a few that float32 sums in another order may swap."""
    assert torch.equal(found.count, expected.count)
    apart = total = 0
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in found.count.shape)).tolist():
        n = int(found.count[b, h])
        ours, theirs = (t.pages[b, h, :n].tolist() for t in (found, expected))
        assert ours == sorted(set(ours)), "ascending, none twice"
        apart, total = apart + len({*ours} - {*theirs}), total + n
    assert apart <= total / 200, f"{apart} of {total} pages differ"


CHOICES = [
    *(Quest(0.06, 3), Quest(0.3, 2), Quest(1.0, 2), Quest(0.9, 2, top_p=0.5)),
    *(Quest(0.1, 2, unit=8), Quest(0.2, 3, unit=16, bound=8), Quest(0.2, 2, bound=16)),
    Quest(0.9, 2, top_p=0.5, unit=32, bound=8),
]


@pytest.mark.parametrize("quest", CHOICES, ids=str)
@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 7), (3, 4), (16, 8)])
def test_pages_equal_the_selectors(quest, queries, group):
    q, index, length = summaries(LENGTHS, queries, group, quest=quest)
    found = triton_choose.pages(quest, q, index, length, 0.125)
    same(found, quest.pages(q, index, length, 0.125))


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(BF16, dim) for dim in (64, 80, 96, 128, 256, 512)] + [(HALF, 128), (SINGLE, 128)],
)
def test_every_head_dim_and_dtype(dtype, dim):
    q, index, length = summaries((64 * 40, 64 * 7 + 1), dim=dim, dtype=dtype)
    quest = Quest(0.2, 2)
    found = triton_choose.pages(quest, q, index, length, dim**-0.5)
    same(found, quest.pages(q, index, length, dim**-0.5))


def test_a_choice_is_read_again_until_refresh():
    """Pages, and how many keys they hold, over steps of ragged rows."""
    quest = Quest(0.3, 3, refresh=5)
    q, index, length = summaries((64 * 21 + 20, 64 * 9 - 3, 300), group=4, room=3)
    ways = []
    for _ in range(2):
        width = quest.budget.width(index["low"].shape[2], PAGE)
        choice = Choice.none(3, 2, width, torch.device(DEVICE))
        ways.append((choice, torch.zeros(2, dtype=torch.int64, device=DEVICE)))
    for step in range(14):
        length = length + 1 + step % 2
        q = q.roll(1, -1)  # another query
        (own, read), (plain, keys) = ways
        found = triton_choose.pages(quest, q, index, length, 0.125, choice=own, read=read)
        expected = plain.renew(quest.pages(q, index, length, 0.125), length, quest.refresh)
        keys += expected.keys(length).sum(0)
        same(found, expected)
        assert torch.equal(own.length, plain.length)
    assert torch.equal(read, keys)


@pytest.mark.parametrize("top_p", [0.0, 0.5])
@pytest.mark.parametrize("unit", [8, 64])
@pytest.mark.parametrize("units", [1000, 2000, 4000, 8000, 16384, 16392])
def test_every_size_of_cache(units, unit, top_p):
    quest = Quest(unit=unit, top_p=top_p)
    q, index, length = summaries((units * unit - 5,), group=4, dtype=BF16, quest=quest)
    found = triton_choose.pages(quest, q, index, length, 0.125)
    same(found, quest.pages(q, index, length, 0.125))


@pytest.mark.parametrize("lengths", [(64 * 9 + 1, 130), (64 * 1000, 64 * 700 - 3)], ids=str)
def test_room_for_more_pages_changes_nothing(lengths):
    quest = Quest(0.3, 2)
    q, *held = summaries(lengths, dtype=BF16)
    expected = triton_choose.pages(quest, q, *held, 0.125)
    for room in (100, 1100, 2200, 5000, 9000):  # the last four are other sizes
        q, *held = summaries(lengths, dtype=BF16, room=room)
        found = triton_choose.pages(quest, q, *held, 0.125)
        assert torch.equal(found.count, expected.count)
        for b in range(2):
            n = int(found.count[b, 0])
            assert torch.equal(found.pages[b, :, :n], expected.pages[b, :, :n])


@pytest.mark.parametrize("unit", [64, 8])
def test_equal_votes_go_to_the_lower_pages(unit):
    """Bounds are whole numbers; of many units all may be alike."""
    quest = Quest(unit=unit)
    q, index, length = summaries((64 * 3000,), group=1, dtype=BF16, quest=quest)
    whole = {name: t.round() for name, t in index.items()}
    alike = {name: torch.ones_like(t) for name, t in index.items()}
    for share in (0.06, 0.3, 0.7):
        for index in (whole, alike):
            found = triton_choose.pages(replace(quest, share=share), q.sign(), index, length, 0.125)
            expected = replace(quest, share=share).pages(q.sign(), index, length, 0.125)
            assert torch.equal(found.count, expected.count)
            n = int(found.count[0, 0])
            assert torch.equal(found.pages[..., :n], expected.pages[..., :n])


@pytest.mark.parametrize("quest", CHOICES, ids=str)
def test_the_selector_chooses_the_same_whatever_rounds(quest):
    q, index, length = summaries(LENGTHS, quest=quest)
    expected = quest.pages(q, index, length, 0.125)
    with rounding():
        same(quest.pages(q, index, length, 0.125), expected)


def test_rows_too_short_for_a_choice_name_pages_all_the_same():
    """Memory that holds anything: a kernel that masks what it gathers reads what lists name."""
    q, index, length = summaries((64 * 40, 9))
    for _ in range(3):
        unwritten((2, 2, Quest(0.3, 2).budget.width(40, 1)), torch.float64)
        found = triton_choose.pages(Quest(0.3, 2), q, index, length, 0.125, below=PAGE)
        assert found.count.tolist() == [[12, 12], [0, 0]]
        assert ((found.pages >= 0) & (found.pages < 40)).all()


def test_a_new_length_compiles_nothing_within_a_size():
    found = []
    for pages in (1, 2, 30, 1001):
        q, index, length = summaries((pages * PAGE - 5,))
        triton_choose.pages(Quest(), q, index, length, 0.125)
        found.append(compiled(triton_choose))
    assert found == [found[0]] * 4
