"""A decode step of a layer with stores of several kinds: at once in Triton, and store by store."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from hfsparse import kernels
from hfsparse.evictions.h2o import H2O
from hfsparse.evictions.snapkv import SnapKV
from hfsparse.lists import PAGE, Band, HeadIndex, PageLists
from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache import host
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.counts import Counts
from hfsparse.runtime.decode import Step, decode
from hfsparse.runtime.layer_plan import Logits
from hfsparse.selectors.lowrank import LowRank
from hfsparse.selectors.quest import Quest
from tests.helpers import close
from tests.kernels.interpreter import interpreter

QUEST, OTHER = Quest(0.3, 2), Quest(0.1, 3)
NEAR, GROWING = Band(4, 9), Band(2, 50, 6554)
ALL = [  # kv heads of each kind stand apart from one another
    Group((0, 3)),
    Group((1,), selector=QUEST),
    Group((2,), NEAR),
    Group((4,), GROWING),
    Group((5,), selector=OTHER),
]
RINGS = [Group((0, 2), Band(0, 40)), Group((1,), GROWING)]
HALF_RING = [Group((1, 3), NEAR), Group((0, 2), selector=QUEST)]
TABLE = dict.fromkeys(("keys", "queries"), torch.diag(torch.arange(1.0, 65.0))[None, None])
LOW_RANK = LowRank(0.3, 2, unit=8, rank=4).bind(0, [0], TABLE)
CHOOSING = [  # a choice is read again, beside one that another layer made, by mass, and by labels
    Group((0, 3), selector=Quest(0.5, 2, refresh=3, unit=32, bound=16)),
    Group((1,), NEAR),
    Group((2,), reuses=(1,)),
    Group((4,), GROWING),
    Group((5,), selector=Quest(0.9, 2, top_p=0.6)),
    Group((6,), selector=LOW_RANK),
]
KEPT = [  # of rows that evict and rows that needn't
    Group((0, 2), eviction=SnapKV(70, 8)),
    Group((1,), selector=QUEST),
    Group((3,), eviction=SnapKV(33, 3)),
    Group((4,), NEAR),
]
PACKED = [  # beside a ring in the model's type
    Group((0, 3), selector=Quest(0.3, 2, unit=16, bound=16), bits=4),
    Group((1,), Band(70, 40, 6554), bits=8),
    Group((2,), selector=QUEST, bits="fp8"),
    Group((4,), bits=4),
    Group((5,), NEAR),
]
HOSTED = [  # in host memory, whole pages and parts of them, beside a ring
    Group((0, 3), selector=Quest(0.3, 2, unit=16, bound=16), hot=0.3),
    Group((1,), NEAR),
    Group((2,), selector=QUEST, hot=0.4),
    Group((4,), selector=LOW_RANK, hot=0.3),
    Group((5,)),
]
STEADY = [Group((1,), eviction=H2O(70, 30)), Group((0, 2))]  # steps evict, too


PLAIN = kernels.Tables(*(table[-1:] for table in kernels.TABLES))  # the reference of each
ON_CPU = kernels.TABLES._replace(
    decode=tuple(row for row in kernels.DECODE if row.name == "torch flash, store by store")
)


@pytest.fixture(scope="module")
def run():
    # More shares than a ring has pages, and fewer copies at once than pages that are missing.
    with interpreter(triton__decode__UNITS=24, triton__fetch__COPIES=2) as run:
        yield lambda *args, **more: run(f"{__name__}.both_ways", *args, **more)


def layer_of(groups, past, k, v, below) -> CacheLayer:
    """A layer's cache of rows of `past` tokens; NaN wherever it holds nothing."""
    layer = CacheLayer("plan", groups, below[0], read_below=below[1])
    with patch.object(host, "why_not", lambda device: None):  # keys may be held by a CPU, too
        layer.lazy_initialization(k, v)
        stores = layer.stores
    for store in stores:
        at = list(store.group.heads)
        given = k[:, at], v[:, at], Lengths([0] * len(past), past, max(past))
        if store.group.eviction is None:
            store.append(*given)
        else:
            store.take(*given, k[:, at, -9:], scale=0.3)
        for b, n in enumerate(rows_in(store, past)):
            for t in store.outside() or (store.k, store.v) if store.group.bits == 16 else ():
                t[b, :, n:] = torch.nan
            for t in summaries(store).values():
                t[b, :, -(-n // PAGE) :] = torch.nan if t.is_floating_point() else 99
    return layer


def rows_in(store, rows: list[int]) -> list[int]:
    """How many keys of each row a store holds, were it to hold all that it was given."""
    lost = getattr(store, "dropped", [0] * len(rows))
    return [n - less for n, less in zip(rows, lost, strict=True)]


def both_ways(
    groups, past, steps, ratio, dims, dtype, below, softcap=None, sinks=False, tables=kernels.TABLES
):
    """Steps of `steps[i][b]` new tokens, by tables and by the reference: live outputs, and what is
    held then.

    The last step is then done once more, in a cache with more room, where steps evict nothing.
    """
    made, heads = torch.Generator().manual_seed(0), sum(len(g.heads) for g in groups)

    def random(n: int, tokens: int, dim: int):
        return torch.randn(len(past), tokens, n, dim, generator=made).to(dtype).transpose(1, 2)

    k, v = (random(heads, max(past), dim) for dim in dims)
    layer = layer_of(groups, past, k, v, below)
    plain = copy.deepcopy(layer)
    plain.stores.reverse()  # none depends on another
    ours, theirs = (
        SimpleNamespace(
            groups=tuple(store.group for store in each.stores),
            counts=Counts(heads * ratio),
            kv_heads=heads,
            shared=False,
            producer=None,
            last_reader=None,
            at=HeadIndex(),
            extends=lambda tokens: None,
        )
        for each in (layer, plain)
    )
    sinks = torch.linspace(-2, 3, heads * ratio) if sinks else None
    logits, outs = Logits(dims[0] ** -0.5, softcap, sinks), []
    for new in steps:
        lengths = Lengths(past, new, max(new))
        rows, Q = lengths.rows, lengths.columns
        q, k, v = random(heads * ratio, Q, dims[0]), *(random(heads, Q, dim) for dim in dims)
        at = torch.tensor(past)[:, None] + torch.arange(Q)
        at = torch.where(at < torch.tensor(rows)[:, None], at, -1)
        step = Step(lengths, torch.tensor(rows), at)
        before = ends(step.length)
        step.chosen[:] = [before]
        found = decode(tables, ours, layer, q, k, v, step, logits)
        step.chosen[:] = [before]
        wanted = decode(PLAIN, theirs, plain, q, k, v, step, logits)
        live = (at >= 0)[:, None, :, None].expand_as(found)
        outs.append((found[live], wanted[live]))
        past = rows
    stored = list(zip(held(layer, ours, past), held(plain, theirs, past), strict=True))
    if any(group.eviction and group.eviction.adds_up for group in groups):
        return outs, stored  # what the last step evicted can't be read once more
    for store in layer.stores:
        if isinstance(store, Full):
            store._grow(1000)
    step.chosen[:] = [before]
    again = decode(tables, ours, layer, q, k, v, step, logits)
    outs.append((again[live], found[live]))
    return outs, stored


def ends(length: torch.Tensor) -> PageLists:
    """What a layer before chose for two heads: the first page of each row; that and the last."""
    pages = torch.stack([torch.zeros_like(length), (length - 1) // PAGE], 1)
    return PageLists(pages[:, None].expand(-1, 2, -1), torch.tensor([[1, 2]] * len(length)))


def summaries(store) -> dict[str, torch.Tensor]:
    return store.index if isinstance(store, Full) else {}


def held(layer: CacheLayer, plan, rows: list[int]) -> list[torch.Tensor]:
    """What the stores hold of each row, and how many keys were counted."""
    found = []
    for store in sorted(layer.stores, key=lambda store: store.group.heads):
        found.append(torch.tensor(plan.counts.keys_read(store.group.heads)))
        for b, n in enumerate(rows_in(store, rows)):
            found += [t[b, :, :n] for t in store.read(rows)]
            for name, t in summaries(store).items():
                t = t.flatten(2, 3) if t.ndim > 4 or name == "scale" else t  # parts of pages
                found.append(t[b, :, : -(-n // (store.capacity // t.shape[2]))])
        if (last := store.choice) is not None:
            used = torch.arange(last.pages.shape[2]) < last.count[..., None]
            found += [last.pages * used, last.count, last.length]
    return found


@pytest.mark.parametrize(
    ("groups", "ratio", "dims", "dtype", "most", "past", "below", "softcap", "sinks"),
    [
        (ALL, 3, (64, 64), torch.float32, 3, [5, 255], (0, 0), None, False),
        (ALL, 4, (80, 96), torch.float16, 4, [66, 200], (70, 140), 5.0, True),
        (RINGS, 7, (128, 128), torch.float32, 2, [3, 200], (0, 0), None, True),
        (RINGS, 1, (16, 16), torch.float32, 5, [90, 150], (100, 0), 5.0, False),
        (HALF_RING, 8, (32, 16), torch.float16, 16, [200], (0, 0), None, False),
        (CHOOSING, 3, (64, 64), torch.float32, 4, [395, 509, 130], (150, 400), None, False),
        (KEPT, 3, (64, 64), torch.float32, 4, [60, 255, 90], (62, 0), 5.0, True),
        (STEADY, 2, (32, 32), torch.float32, 5, [69, 200, 90], (0, 0), None, False),
        (PACKED, 3, (32, 32), torch.float32, 4, [63, 255], (0, 0), 5.0, True),
        (PACKED, 4, (20, 12), torch.float16, 5, [70, 180], (150, 72), None, False),
        (HOSTED, 3, (64, 64), torch.float32, 4, [63, 395], (0, 0), 5.0, True),
        (HOSTED, 4, (64, 48), torch.float16, 5, [330, 70], (0, 200), None, False),
    ],
    ids=[
        *("all-kinds", "below", "rings", "rings-below", "half-ring", "choosing", "kept", "steady"),
        *("packed", "packed-below", "hosted", "hosted-below"),
    ],
)
def test_all_stores_at_once_are_each_store_alone(
    run, groups, ratio, dims, dtype, most, past, below, softcap, sinks
):
    B = len(past)
    steps = [[2] + [0] * (B - 1), [most, 3, 3][:B], [1] * B]
    outs, stored = run(tuple(groups), past, steps, ratio, dims, dtype, below, softcap, sinks)
    assert all(close(found, wanted) for found, wanted in outs)
    if len(outs) > len(steps):
        assert torch.equal(*outs[-1]), "a cache with more room gives other bits"
    assert all(torch.equal(ours, theirs) for ours, theirs in stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("groups", "ratio", "dim", "most", "past", "below"),
    [
        (ALL, 3, 64, 3, [5, 255], (0, 0)),
        (ALL, 4, 80, 3, [253, 255], (0, 0)),  # rows of one length from the second step on
        (ALL, 1, 16, 4, [66, 200], (70, 140)),
        (RINGS, 8, 32, 2, [3, 200], (0, 0)),
        (RINGS, 3, 64, 5, [90, 150], (100, 0)),
        (HALF_RING, 8, 32, 16, [200], (0, 0)),
        (HALF_RING, 1, 48, 1, [700], (0, 0)),
        (CHOOSING, 3, 64, 4, [395, 509, 130], (150, 400)),
        (KEPT, 3, 64, 4, [60, 255, 90], (62, 0)),
        (STEADY, 2, 32, 5, [69, 200, 90], (0, 0)),
    ],
)
def test_on_a_cpu_each_store_is_what_the_reference_makes_of_it(
    groups, ratio, dim, most, past, below, dtype
):
    B = len(past)
    steps = [[2] + [0] * (B - 1), [most, 3, 3][:B], [1] * B]
    given = tuple(groups), past, steps, ratio, (dim, dim), dtype, below
    outs, stored = both_ways(*given, tables=ON_CPU)
    assert all(close(found, wanted) for found, wanted in outs)
    if len(outs) > len(steps):
        assert torch.equal(*outs[-1]), "a cache with more room gives other bits"
    assert all(torch.equal(ours, theirs) for ours, theirs in stored)
