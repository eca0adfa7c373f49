"""A choice that is read again, against its definition row by row; in PyTorch and in Triton."""

from functools import partial
from math import ceil

import pytest
import torch
from torch.nn.functional import pad

from hfsparse.kernels import plain
from hfsparse.lists import PAGE
from hfsparse.lists.choice import Choice
from hfsparse.selectors.quest import Quest
from tests.kernels.interpreter import interpreter
from tests.selectors.test_quest import chosen, rows


@pytest.fixture(scope="module")
def ways():
    more = {"triton__choose__TOGETHER": 1, "triton__many__CHUNK": 8, "triton__many__CHUNKS": 128}
    with interpreter() as run, interpreter(**more) as other:
        yield {
            "torch": plain.select,
            "triton": partial(run, "triton.choose.pages"),
            "triton, many programs": partial(other, "triton.choose.pages"),
        }


@pytest.mark.parametrize("way", ["torch", "triton", "triton, many programs"])
@pytest.mark.parametrize(("group", "refresh"), [(1, 3), (3, 2), (4, 70), (8, 200)])
def test_a_choice_is_read_until_the_row_has_grown_by_refresh(ways, way, group, refresh):
    """Steps of 1 to 3 tokens on ragged rows, one of them short at first; other rows are new in
    between; the buffers grow."""
    quest = Quest(share=0.3, min_pages=3, refresh=refresh)
    length, choice = torch.tensor([64 * 9 + 63, 640, 1]), Choice.none(3, 2, 6, torch.device("cpu"))
    last, read, total = [None] * 3, torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    for step in range(8):
        Q = 1 + step % 3
        length = length + Q + (step == 4) * torch.tensor([100, 0, 64])  # a prompt in between
        if step == 5:
            choice.forget([0, 0, 0])
            last = [None] * 3
        room = 14 + step  # pages
        choice = choice.longer(quest.budget.width(room, PAGE))
        q, _, _, index, _ = rows(length.tolist(), Q, group, seed=step)
        more = (0, 0, 0, room - index["low"].shape[2])
        index = {name: pad(t, more, value=torch.nan) for name, t in index.items()}
        more = dict(below=70, choice=choice, read=read)
        found = ways[way](quest, q, index, length, 0.7, **more)
        fresh = Quest(0.3, 3).pages(q, index, length, 0.7)
        for b, n in enumerate(length.tolist()):
            if n < 70:
                assert found.count[b].tolist() == choice.length[b].tolist() == [0, 0]
                continue
            if last[b] is None or n - last[b][0] >= refresh:
                last[b] = n, [chosen(fresh, b, h) for h in (0, 1)]
            then, pages = last[b]
            for h in (0, 1):
                expected = pages[h] + [*range(ceil(then / PAGE), ceil(n / PAGE))]
                assert chosen(found, b, h) == expected, (step, b, h)
                total[h] += len(expected) * PAGE - -n % PAGE
        assert bool(((found.pages >= 0) & (found.pages < room)).all())
    assert read.tolist() == total.tolist()


@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 3), (3, 4), (2, 8)])
@pytest.mark.parametrize("quest", [Quest(0.9, 2, top_p=0.5), Quest(0.4, 4, top_p=0.9)], ids=str)
def test_pages_up_to_top_p_equal_the_selectors_in_triton(ways, quest, queries, group):
    q, _, _, index, length = rows([64 * 41 + 5, 64 * 9, 300, 17, 0], queries, group)
    found = ways["triton"](quest, q, index, length, 0.7)
    expected = quest.pages(q, index, length, 0.7)
    assert torch.equal(found.count, expected.count)
    assert found.count[0, 0] != found.count[1, 0], "not the same number everywhere"
    for b, h in torch.cartesian_prod(torch.arange(5), torch.arange(2)).tolist():
        assert chosen(found, b, h) == chosen(expected, b, h)


def test_equal_votes_fill_top_p_from_the_lower_pages(ways):
    q, _, _, index, length = rows([64 * 20], 1, 2)
    index = {name: torch.ones_like(t) for name, t in index.items()}
    for way in ("torch", "triton"):
        found = ways[way](Quest(0.9, 2, top_p=0.29), q, index, length, 1.0)
        assert chosen(found, 0, 0) == [0, 1, 2, 3, 4, 19]
