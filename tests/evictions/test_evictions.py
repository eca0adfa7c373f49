"""What a key is worth, against the definition written as loops in double precision."""

from math import exp, tanh

import pytest
import torch

from hfsparse.errors import UsageError
from hfsparse.evictions import EVICTIONS, attention
from hfsparse.evictions.adore import Adore
from hfsparse.evictions.alisa import Alisa
from hfsparse.evictions.h2o import H2O
from hfsparse.evictions.snapkv import SnapKV
from hfsparse.lists import Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.evicting import Evicting
from hfsparse.runtime.cache.group import Group

ROWS = {"snapkv": SnapKV(10, 4, 3), "h2o": H2O(10, 4)}  # one row a kind
ROWS |= {"alisa": Alisa(10, 4), "adore": Adore(10, 4)}
LASTS = {"alisa": 0.75, "adore": 0.0}  # what a query counts for beside the next; others: 1
Q_LEN, K_LEN, SCALE = [5, 0, 9, 9], [30, 12, 9, 41], 0.4  # of a batch of four rows
HEADS = 2


def drawn(ratio: int):
    """q and k of the batch, NaN wherever a row has none."""
    made = torch.Generator().manual_seed(0)
    q = torch.randn(4, HEADS * ratio, max(Q_LEN), 8, generator=made)
    k = torch.randn(4, HEADS, max(K_LEN), 8, generator=made)
    for t, lengths in ((q, Q_LEN), (k, K_LEN)):
        for b, n in enumerate(lengths):
            t[b, :, n:] = torch.nan
    return q, k


def attention_of(q, k, softcap, sinks, lasts=1.0) -> list[float]:
    """Weights summed over the last queries of a row `[heads, n, D]`, the mean of its heads."""
    got = [0.0] * len(k)
    for head, queries in enumerate(q):
        for i, query in enumerate(queries):
            seen = range(len(k) - len(queries) + i + 1)
            logits = [float(query.double() @ k[j].double()) * SCALE for j in seen]
            if softcap is not None:
                logits = [softcap * tanh(x / softcap) for x in logits]
            total = sum(map(exp, logits)) + (0 if sinks is None else exp(float(sinks[head])))
            for j in seen:
                got[j] += exp(logits[j]) / total / len(q) * lasts ** (len(queries) - 1 - i)
    return got


def worth(eviction, got: list[float]) -> list[float]:
    if eviction.kind != "snapkv":
        return got
    near, old = eviction.pool // 2, len(got) - eviction.window
    got = [x if j < old else 0.0 for j, x in enumerate(got)]
    return [max(got[max(j - near, 0) : j + near + 1]) for j in range(len(got))]


@pytest.mark.parametrize("kind", EVICTIONS)
@pytest.mark.parametrize(
    ("ratio", "softcap", "sinks", "tile"),
    [(1, None, False, 1 << 24), (3, 2.0, True, 300), (8, None, True, 1), (4, 5.0, False, 1 << 24)],
)
def test_scores_are_their_definition(kind, ratio, softcap, sinks, tile, monkeypatch):
    """Of rows of any length, whatever lies behind them, in tiles of any size."""
    monkeypatch.setattr(attention, "TILE", tile)
    (q, k), eviction = drawn(ratio), ROWS[kind]
    sinks = torch.linspace(-1, 2, HEADS * ratio) if sinks else None
    grid = Grid(torch.tensor(Q_LEN), torch.tensor(K_LEN), max(Q_LEN), max(K_LEN))
    found = eviction.scores(q, k, grid, SCALE, softcap, sinks)
    assert found.shape == k.shape[:3]
    for b, (n, m) in enumerate(zip(Q_LEN, K_LEN, strict=True)):
        for h in range(HEADS):
            own = slice(h * ratio, (h + 1) * ratio)
            bare = None if sinks is None else sinks[own]
            given = q[b, own, :n], k[b, h, :m], softcap, bare, LASTS.get(kind, 1.0)
            wanted = worth(eviction, attention_of(*given))
            assert found[b, h, :m].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", EVICTIONS)
def test_products_that_are_rounded_choose_the_same(kind):
    (q, k), grid = drawn(2), Grid(torch.tensor(Q_LEN), torch.tensor(K_LEN), 9, 41)
    given = q.bfloat16(), k.bfloat16(), grid, SCALE
    wanted = ROWS[kind].scores(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ROWS[kind].scores(*given), wanted)


def test_of_equal_keys_the_first_ones_stay_beside_the_newest():
    store = Evicting(Group((0,), eviction=SnapKV(4, 2)), 0, 0)
    k, v = torch.ones(1, 1, 12, 4), torch.arange(12.0).view(1, 1, 12, 1)
    store.create(k, v)
    store.take(k, v, Lengths([0], [12], 12), k[:, :, -2:], scale=1.0)
    assert store.v[0, 0, :4, 0].tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("eviction", [H2O(20, 3), Alisa(20, 3), Adore(20, 3)])
def test_scores_that_add_up_do_so_over_calls_and_follow_their_keys(eviction):
    """Each call alone, or all as one prompt: the same sums, where nothing is evicted between."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 30, 4, generator=made) for heads in (4, 2, 2))
    stores = [Evicting(Group((0, 1), eviction=eviction), 0, 0) for _ in range(2)]
    for store, ends in zip(stores, ([30], [11, 12, 18, 30]), strict=True):
        store.create(k, v)
        for first, end in zip([0, *ends], ends, strict=False):
            new = slice(first, end)
            lengths = Lengths([first] * 2, [end - first] * 2, end - first)
            store.take(k[:, :, new], v[:, :, new], lengths, q[:, :, new], scale=1.0)
    one, other = stores
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        a, b = (t[:, :, :20] if t.ndim > 1 else t for t in (a, b))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (SnapKV, {"pool": 4}),
        (H2O, {"window": 0}),
        *[(cls, {"size": size, "window": 64}) for cls in EVICTIONS.values() for size in (0, 64)],
    ],
)
def test_parameters_out_of_range_are_refused(cls, given):
    with pytest.raises(UsageError, match=f"{next(iter(given))} is .*: give"):
        cls(**given)
