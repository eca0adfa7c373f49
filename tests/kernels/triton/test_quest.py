"""Quest's pages chosen in Triton, interpreted, against the selector itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import pad

from hfsparse.kernels import SELECT, Need, pick
from hfsparse.lists import PAGE
from hfsparse.selectors.quest import Quest, bounds
from hfsparse.selectors.reuse import Reuse
from tests.kernels.interpreter import interpreter
from tests.kernels.launches import launched, watch
from tests.selectors.test_quest import chosen, rows


@pytest.fixture(scope="module")
def choose():
    with interpreter() as run:
        yield lambda *args: run("triton.choose.pages", *args)


@pytest.fixture
def module():
    return pytest.importorskip("hfsparse.kernels.triton.choose", exc_type=ImportError)


def assert_same(found, expected, index) -> None:
    assert found.unit == expected.unit
    room = next(iter(index.values())).shape[2] * (PAGE // found.unit)
    assert bool(((found.pages >= 0) & (found.pages < room)).all())  # unused slots too
    assert found.pages.shape == expected.pages.shape
    assert torch.equal(found.count, expected.count)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in found.count.shape)).tolist():
        assert chosen(found, b, h) == chosen(expected, b, h)


CASES = [  # of new tokens and q heads of a group
    *[(Quest(0.06, 3), *shape) for shape in ((1, 1), (1, 7), (3, 4), (16, 8))],
    *((Quest(0.3, 2), 3, 4), (Quest(0.01, 16), 1, 7), (Quest(1.0, 2), 1, 1)),
    *((Quest(0.1, 2, unit=8), 1, 4), (Quest(0.2, 3, unit=16, bound=8), 3, 2)),
    *((Quest(0.2, 2, bound=16), 1, 7), (Quest(0.5, 2, top_p=0.5, unit=32, bound=8), 1, 3)),
]


@pytest.mark.parametrize(("quest", "queries", "group"), CASES, ids=str)
def test_units_equal_the_selectors(choose, quest, queries, group):
    q, k, _, _, length = rows([64 * 21 + 5, 64 * 9, 300, 17, 0], queries, group)
    index = summed_up(quest, k, length)
    expected = quest.pages(q, index, length, 0.7)
    assert_same(choose(quest, q, index, length, 0.7), expected, index)


def summed_up(quest, k, length) -> dict[str, torch.Tensor]:
    """The index of rows of these lengths."""
    real = torch.arange(k.shape[2]) < length[:, None]
    real = real.view(len(k), 1, -1, PAGE, 1)
    return quest.summarise(k.unflatten(2, (-1, PAGE)), real)


@pytest.mark.parametrize("top_p", [0.0, 0.6])
@pytest.mark.parametrize("scored", [True, False])
def test_many_units_and_scores_of_pytorch_give_the_same(choose, scored, top_p):
    """Votes are made by many programs, or by one; scores by either."""
    quest = (Quest if scored else Scored)(0.1, 2, top_p=top_p, unit=8)
    q, k, _, _, length = rows([64 * 530 + 5, 64 * 33, 9], 1, 2)
    index = summed_up(quest, k, length)
    expected = quest.pages(q, index, length, 0.7)
    assert_same(choose(quest, q, index, length, 0.7), expected, index)
    few = {name: t[1:, :, :34] for name, t in index.items()}
    expected = quest.pages(q[1:], few, length[1:], 0.7)
    assert_same(choose(quest, q[1:], few, length[1:], 0.7), expected, few)


@dataclass(frozen=True)
class Scored(Quest):
    """A selector without a kernel of its own."""

    def scores(self, q, index, length, scale):
        low, high = (index[name].flatten(2, 3) for name in ("low", "high"))
        return bounds(q, low, high) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 256, 576])
def test_pages_equal_the_selectors_at_every_head_dim(choose, dim, dtype):
    made = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 1, dim, generator=made).to(dtype)
    k = torch.randn(2, 2, 20 * PAGE, dim, generator=made).to(dtype).unflatten(2, (20, PAGE))
    index = {"low": k.amin(3), "high": k.amax(3)}
    length = torch.tensor([20 * PAGE, 7 * PAGE + 1])
    quest, scale = Quest(0.2, 2), dim**-0.5
    expected = quest.pages(q, index, length, scale)
    assert_same(choose(quest, q, index, length, scale), expected, index)


def test_equal_votes_go_to_the_lower_pages(choose):
    q, _, _, index, length = rows([64 * 20], 1, 2)
    index = {name: torch.ones_like(t) for name, t in index.items()}
    found = choose(Quest(0.3, 2), q, index, length, 1.0)
    assert chosen(found, 0, 0) == [0, 1, 2, 3, 4, 19]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("values", [1, 2, 4])
def test_many_equal_votes_go_to_the_lower_pages(choose, share, values):
    """Bounds are whole numbers: at nearly every share some of several equal pages are kept."""
    made = torch.Generator().manual_seed(values)
    q = torch.randint(-1, 2, (3, 2, 1, 16), generator=made).float()
    k = torch.randint(0, values + 1, (3, 2, 90, 16), generator=made).float()
    index = {"low": k - 1, "high": k + 1}
    length = torch.tensor([90 * PAGE, 70 * PAGE - 3, 33 * PAGE])
    quest = Quest(share, 2)
    expected = quest.pages(q, index, length, 0.5)
    assert_same(choose(quest, q, index, length, 0.5), expected, index)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_votes_that_float32_has_as_0_are_equal(choose, share):
    q, _, _, index, length = rows([64 * 30, 64 * 21 + 5], 1, 2, spread=1000.0)
    quest = Quest(share, 2)
    expected = quest.pages(q, index, length, 1.0)
    found = choose(quest, q, index, length, 1.0)
    assert_same(found, expected, index)
    assert chosen(found, 0, 0)[:-4] == list(range(found.count[0, 0] - 4))  # few are above 0


def test_one_page_can_have_the_whole_vote(choose):
    q, low = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 40, 16)
    low[:, :, 17] = 100
    found = choose(Quest(0.01, 3), q, {"low": low, "high": low}, torch.tensor([40 * PAGE]), 1.0)
    assert chosen(found, 0, 0) == [0, 17, 39]


@pytest.mark.parametrize(
    ("queries", "quest"), [(1, Quest(0.06, 3)), (3, Quest(0.3, 2)), (1, Quest(1.0, 2))]
)
def test_room_for_more_pages_changes_nothing(choose, quest, queries):
    """A buffer that has room for more pages than any row holds, whatever is in there."""
    q, _, _, index, length = rows([64 * 21 + 5, 64 * 9 + 1, 130, 0], queries, 2)
    tight = choose(quest, q, index, length, 0.7)
    for more in (1, 100, 1100, 2200, 4500, 9000):  # from 1100 on, other sizes
        roomy = {n: pad(t, (0, 0, 0, more), value=torch.nan) for n, t in index.items()}
        found = choose(quest, q, roomy, length, 0.7)
        assert bool(((found.pages >= 0) & (found.pages < roomy["low"].shape[2])).all())
        assert torch.equal(found.count, tight.count)
        for b, h in torch.cartesian_prod(torch.arange(4), torch.arange(2)).tolist():
            assert chosen(found, b, h) == chosen(tight, b, h)


@pytest.mark.parametrize("share", [0.06, 1.0])
def test_more_than_a_million_tokens_are_served(choose, share):
    """As many pages as there can be, half of them equal, so that no count of them overflows."""
    pages = (1 << 15) - 1
    q, low = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, pages, 16)
    low[:, :, ::2, 0] = 1
    quest, length = Quest(share, 2), torch.tensor([pages * PAGE])
    index = {"low": low, "high": low}
    expected = quest.pages(q, index, length, 1.0)
    assert_same(choose(quest, q, index, length, 1.0), expected, index)


def test_a_new_length_compiles_nothing_within_a_size(module, monkeypatch):
    seen = watch(monkeypatch, module, module.quest)
    found = []
    for pages in (1, 2, 30, 1001):
        q, summary = torch.zeros(1, 8, 1, 64), torch.zeros(1, 2, pages, 64)
        length = torch.tensor([pages * PAGE - 5])
        module.pages(Quest(), q, {"low": summary, "high": summary}, length, 0.7)
        found.append(set(seen))
    assert len(found[0]) == 2
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize(("pages", "launches"), [(30, 2), (5000, 5)])
def test_a_new_length_launches_the_same(module, monkeypatch, pages, launches):
    """What a CUDA graph holds on to: grids, compiled forms and numbers; lengths it reads."""
    calls = launched(monkeypatch, module, module.quest, module.many)
    q, summary = torch.zeros(2, 8, 1, 64), torch.zeros(2, 2, pages, 64)
    found = []
    for lengths in ([1, 0], [pages * PAGE - 5, 700]):
        module.pages(Quest(), q, {"low": summary, "high": summary}, torch.tensor(lengths), 0.7)
        found.append(list(calls))
        calls.clear()
    assert len(found[0]) == launches
    assert found[0] == found[1]


def test_what_is_not_fused_is_said(module):
    need = Need(torch.device("cpu"), torch.float32, 64, 64, chooser=Quest())
    assert "reuse is not fused" in module.why_not(need._replace(chooser=Reuse()))
    assert "head dim 2048" in module.why_not(need._replace(head_dim=2048))
    need = need._replace(tokens=((1 << 15) - 1) * PAGE)
    assert "float64" in module.why_not(need._replace(dtype=torch.float64))
    assert "float16" in module.why_not(need._replace(index_dtype=torch.float16))
    assert "262136 units of 8" in module.why_not(need._replace(chooser=Quest(unit=8, top_p=0.5)))
    assert "262144 units of 64" in module.why_not(need._replace(tokens=(1 << 18) * PAGE))
    assert "reuse has no scores" in module.why_not_scored(need._replace(chooser=Reuse()))
    assert module.why_not(need) is None


def test_the_selector_itself_serves_where_triton_cannot():
    q, _, _, index, length = rows([64 * 20], 1, 2)
    select = pick(SELECT, Need.of(q, q, q, chooser=Quest())).run
    found = select(Quest(0.3, 2), q, index, length, 0.7)
    expected = Quest(0.3, 2).pages(q, index, length, 0.7)
    assert torch.equal(found.count, expected.count)
    assert torch.equal(found.pages, expected.pages[..., : found.pages.shape[-1]])
