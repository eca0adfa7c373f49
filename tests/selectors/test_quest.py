"""Quest's pages against its definition in plain loops."""

from math import ceil, inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from hfsparse.kernels import reference
from hfsparse.lists import PAGE
from hfsparse.selectors.quest import Quest, bounds
from tests.helpers import close, truth
from tests.patterns.matrix import SELECTOR_ROWS

SETTINGS = {n: s for n, s in SELECTOR_ROWS["quest"].settings.items() if s.span == PAGE}


def rows(lengths: list[int], queries: int = 1, group: int = 3, seed: int = 0, spread: float = 1.0):
    """q, k, v of rows of these lengths (2 kv heads), and each page's minima and maxima by name."""
    made = torch.Generator().manual_seed(seed)
    P = -(-max(lengths) // PAGE)
    q = torch.randn(len(lengths), 2 * group, queries, 8, generator=made) * spread
    k, v = torch.randn(2, len(lengths), 2, P * PAGE, 8, generator=made).unbind()
    length = torch.tensor(lengths)
    dead = (torch.arange(P * PAGE) >= length[:, None])[:, None, :, None]
    low = k.masked_fill(dead, inf).unflatten(2, (P, PAGE)).amin(3)
    high = k.masked_fill(dead, -inf).unflatten(2, (P, PAGE)).amax(3)
    none = (torch.arange(P) * PAGE >= length[:, None])[:, None, :, None]  # as new buffers: zeros
    index = {"low": low.masked_fill(none, 0), "high": high.masked_fill(none, 0)}
    return q, k, v, index, length


def chosen(pages, b: int, h: int) -> list[int]:
    return pages.pages[b, h, : pages.count[b, h]].tolist()


@given(st.integers(0, 500), st.integers(1, 200), st.sampled_from([1, 2, 4]), st.floats(0.01, 100))
def test_a_pages_bound_is_not_below_the_score_of_any_of_its_keys(seed, length, group, spread):
    q, k, _, index, _ = rows([length], 2, group, seed, spread)
    bound = bounds(q, index["low"], index["high"])
    score = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(group, 1))[..., :length]
    for page in range(index["low"].shape[2]):
        best = score[..., page * PAGE : (page + 1) * PAGE].amax(-1)
        assert (bound[..., page] >= best - 1e-5 * spread).all()


@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("name", SETTINGS)
def test_pages_equal_the_plain_definition(name, group, queries):
    """Forced pages, then the best votes: the group's largest softmax of bounds over all queries."""
    quest = SETTINGS[name]
    q, _, _, index, length = rows([64 * 21 + 5, 64 * 9, 300, 17], queries, group)
    scale = 0.7
    pages = quest.pages(q, index, length, scale)
    for b, n in enumerate(length.tolist()):
        total = ceil(n / PAGE)
        forced = {0, *range(max(n - queries, 0) // PAGE, total)}
        budget = max(ceil(round(quest.share * total, 6)), quest.min_pages, len(forced))
        for h in range(2):
            vote = torch.zeros(total, dtype=torch.float64)
            for g in range(h * group, (h + 1) * group):
                for query in q[b, g].double():
                    a, z = (query * m[b, h, :total].double() for m in index.values())
                    weight = torch.softmax(torch.maximum(a, z).sum(1) * scale, 0)
                    vote = torch.maximum(vote, weight)
            rest = sorted(set(range(total)) - forced, key=lambda page: -vote[page])
            count = min(total, budget)
            if quest.top_p:
                order = [*sorted(forced), *rest]
                mass = [float(vote[order[:n]].sum() / vote.sum()) for n in range(total)]
                enough = sum(m < quest.top_p for m in mass)
                count = min(count, max(enough, quest.min_pages))
            expected = sorted([*forced, *rest[: count - len(forced)]])
            assert chosen(pages, b, h) == expected


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 1500), min_size=1, max_size=3).filter(any),
    st.integers(1, 16),
    st.builds(Quest, st.floats(0.001, 1), st.integers(2, 30)),
)
def test_pages_keep_the_invariants(lengths, queries, quest):
    q, _, _, index, length = rows(lengths, queries, 2)
    pages = quest.pages(q, index, length, 1.0)
    assert pages.pages.shape[-1] <= index["low"].shape[2]
    assert ((pages.pages >= 0) & (pages.pages < index["low"].shape[2])).all()
    for b, n in enumerate(lengths):
        total = ceil(n / PAGE)
        for h in range(2):
            read = chosen(pages, b, h)
            assert len(read) == pages.count[b, h] <= total
            assert read == sorted(set(read))
            assert set(read) <= set(range(total))
            assert len(read) >= min(total, quest.min_pages)
            if n:
                newest = range(max(n - queries, 0) // PAGE, total)
                assert {0, total - 1, *newest} <= set(read)


def test_equal_votes_go_to_the_lower_page():
    q, _, _, index, length = rows([64 * 12])
    low = torch.ones_like(index["low"])
    index = {"low": -low, "high": low}
    pages = Quest(share=0.01, min_pages=5).pages(q, index, length, 1.0)
    assert chosen(pages, 0, 0) == [0, 1, 2, 3, 11]


@pytest.mark.parametrize(("queries", "newest"), [(1, [11]), (2, [10, 11]), (16, [10, 11])])
def test_new_queries_that_span_two_pages_keep_both(queries, newest):
    q, _, _, index, length = rows([64 * 11 + 1], queries)
    index["low"][:, :, -4:], index["high"][:, :, -4:] = 0, 0  # nothing else speaks for them
    pages = Quest(share=0.01, min_pages=2).pages(q, index, length, 1.0)
    assert chosen(pages, 0, 0)[-len(newest) :] == newest
    assert chosen(pages, 0, 0)[0] == 0


@pytest.mark.parametrize("queries", [1, 3, 16])
def test_a_share_of_1_equals_dense_decode(queries):
    q, k, v, index, length = rows([64 * 6 + 9, 200], queries)
    pages = Quest(share=1.0, min_pages=2).pages(q, index, length, 0.4)
    key = torch.arange(k.shape[2]).expand(2, -1)
    query = length[:, None] - queries + torch.arange(queries)
    mask = key[:, None, None] <= query[:, None, :, None]
    out = reference.decode(q, k, v, query, None, pages, length=length, scale=0.4)
    assert close(out, truth(q, k, v, mask.expand(-1, 6, -1, -1), 0.4))


def test_a_longer_row_beside_it_does_not_change_a_rows_pages():
    q, _, _, index, length = rows([64 * 20, 64 * 7 + 3])
    both = SETTINGS["quest"].pages(q, index, length, 1.0)
    index = {name: t[1:, :, :8] for name, t in index.items()}
    alone = SETTINGS["quest"].pages(q[1:], index, length[1:], 1.0)
    assert [chosen(both, 1, h) for h in (0, 1)] == [chosen(alone, 0, h) for h in (0, 1)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_room_for_more_pages_changes_nothing(name, queries):
    """A buffer that has room for more pages than any row holds, whatever is in there."""
    q, _, _, index, length = rows([64 * 21 + 5, 64 * 9, 17, 0], queries)
    tight = SETTINGS[name].pages(q, index, length, 0.7)
    for more in (1, 100, 1100):
        roomy = {n: pad(t, (0, 0, 0, more), value=torch.nan) for n, t in index.items()}
        found = SETTINGS[name].pages(q, roomy, length, 0.7)
        assert torch.equal(found.count, tight.count)
        for b, h in torch.cartesian_prod(torch.arange(4), torch.arange(2)).tolist():
            assert chosen(found, b, h) == chosen(tight, b, h)


@pytest.mark.parametrize(("share", "total", "count"), [(0.15, 340, 51), (0.09, 600, 54)])
def test_rounding_reads_no_page_more(share, total, count):
    """0.15 of 340 is 51, though float32 sees a little more."""
    q, _, _, index, length = rows([total * PAGE], 1, 1)
    assert Quest(share, 2).pages(q, index, length, 1.0).count.tolist() == [[count, count]]
