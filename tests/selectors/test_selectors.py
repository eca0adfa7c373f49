"""Every selector against its oracle, and what must hold of any: see `selectors.Selector`."""

from __future__ import annotations

from itertools import product
from math import isfinite

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfsparse.lists import PAGE
from hfsparse.lists.places import EXTREMES
from hfsparse.selectors import SELECTORS, DeviceTensor, segment_of, tokens_built
from hfsparse.selectors.lsh import MOST_TABLES, Lsh, log_probabilities
from tests.helpers import poison_of
from tests.patterns.matrix import SELECTOR_ROWS, oracle_pages, table_of

SETTINGS = {name: s for row in SELECTOR_ROWS.values() for name, s in row.settings.items()}
LENGTHS = [64 * 21 + 5, 64 * 9, 300, 17, 0]
SCALE = 0.7


def bound(name: str, heads=(0, 1)):
    return SETTINGS[name].bind(0, heads, table_of(SETTINGS[name]))


def drawn(lengths, queries: int = 1, group: int = 3, poison: float = torch.nan, seed: int = 0):
    """q `[B, 2 * group, Q, 8]`, k `[B, 2, P * PAGE, 8]` with poison behind each row, length."""
    made, length = torch.Generator().manual_seed(seed), torch.tensor(lengths)
    P = max(1, -(-max(lengths) // PAGE))
    q = torch.randn(len(lengths), 2 * group, queries, 8, generator=made)
    k = torch.randn(len(lengths), 2, P * PAGE, 8, generator=made)
    dead = torch.arange(P * PAGE) >= length[:, None]
    return q, k.masked_fill(dead[:, None, :, None], poison), length


def index_of(selector, k, length, room: int = 0, poison: float = torch.nan, queries: int = 1):
    """The index as a store has it: of the pages that hold tokens; poison in all others."""
    pages = k.unflatten(2, (-1, PAGE))
    at = torch.arange(k.shape[2]).view(1, 1, -1, PAGE, 1)
    found = selector.summarise(pages, at < length.view(-1, 1, 1, 1, 1))
    for b, n in enumerate((length - queries).tolist()):
        if total := tokens_built(segment_of(selector), max(n, 0)) // PAGE:
            for name, t in selector.build(pages[b : b + 1, :, :total]).items():
                found[name][b, :, :total] = t[0]
    for name, t in found.items():
        empty = torch.arange(t.shape[2]) * PAGE >= length[:, None]
        value = poison_of(t.dtype, poison)
        t = t.masked_fill(empty.view(len(t), 1, -1, *[1] * (t.ndim - 3)), value)
        found[name] = pad(t, (*[0] * 2 * (t.ndim - 3), 0, room), value=value)
    return found


def listed(found, b: int, h: int) -> list[int]:
    return found.pages[b, h, : found.count[b, h]].tolist()


def same(found, expected) -> None:
    assert torch.equal(found.count, expected.count)
    for b, h in product(*map(range, found.count.shape)):
        assert listed(found, b, h) == listed(expected, b, h)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        *product(
            [kind for kind, row in SELECTOR_ROWS.items() if row.settings],
            [*({"share": n} for n in (0, 1.1)), {"min_pages": 1}, {"refresh": -1}, {"top_p": 1}],
        ),
        *product(["quest", "lowrank", "landmarks", "lsh", "centroids"], [{"unit": 24}]),
        *product(["quest", "landmarks"], [{"unit": 1}]),
        ("quest", {"bound": 4}),
        ("centroids", {"means": True}),
        *product(["lowrank", "channels"], [{"bits": 3}]),
        *(("lowrank", {"rank": n}) for n in (0, 31)),
        *(("channels", {"channels": n}) for n in (0, 15)),
        ("lowrank", {"by": "values"}),
        *(("landmarks", {"outliers": n}) for n in (-0.1, 1.1)),
        *(("lsh", {"bits": n}) for n in (0, 33)),
        *(("lsh", {"tables": n}) for n in (1, 257)),
        *(("centroids", {"clusters": n}) for n in (0, 65)),
        *(("centroids", {"segment": n}) for n in (32, 192, 16384)),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_refused(kind, numbers):
    [(name, value)] = numbers.items()
    with pytest.raises(ValueError, match=f"^{name} is {value}: give "):
        SELECTORS[kind](**numbers)


def test_the_most_hash_tables_have_finite_probabilities():
    assert all(map(isfinite, log_probabilities(4, MOST_TABLES)))


def test_layers_share_the_planes_of_hash_tables():
    """They are drawn once, not by every layer."""
    table = SELECTOR_ROWS["lsh"].table(2, 2, 8)
    first, second, other = (
        Lsh(seed=n).bind(at, [0, 1], table) for n, at in ((1, 0), (1, 1), (2, 0))
    )
    assert first.planes is second.planes
    assert first.planes is not other.planes


@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 3), (1, 8), (3, 4), (16, 1), (16, 8)])
@pytest.mark.parametrize("name", SETTINGS)
def test_pages_equal_the_plain_definition(name, group, queries):
    selector, setting = bound(name), SETTINGS[name]
    q, k, length = drawn(LENGTHS, queries, group)
    index = index_of(selector, k, length, room=3, queries=queries)
    found = selector.pages(q, index, length, SCALE)
    P = k.shape[2] // PAGE + 3
    assert found.pages.shape == (len(LENGTHS), 2, setting.budget.width(P, queries))
    assert found.pages.dtype == found.count.dtype == torch.int64
    unit = found.unit
    assert unit == setting.budget.unit
    assert bool(((found.pages >= 0) & (found.pages < P * PAGE // unit)).all())
    for (b, n), h in product(enumerate(LENGTHS), (0, 1)):
        read = listed(found, b, h)
        assert read == sorted({*read})
        if not n:
            assert not read
            continue
        new = min(queries, n)  # a row has no more queries than tokens
        own = q[b, h * group : (h + 1) * group]
        surely, perhaps = oracle_pages(setting, own, k[b, h, :n], SCALE, table_of(setting), h)
        kept = np.isin(np.arange(len(surely)), read)
        assert (kept & surely == surely).all(), f"row {b} head {h}: a page is missing"
        assert (kept | perhaps == perhaps).all(), f"row {b} head {h}: a page too many"
        tokens = {*range(min(n, PAGE)), *range((n - new) // PAGE * PAGE, n)}
        assert {t // unit for t in tokens} <= {*read}


@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("name", SETTINGS)
def test_neither_room_nor_what_lies_there_nor_other_rows_change_a_choice(name, queries):
    selector = bound(name)
    q, k, length = drawn(LENGTHS, queries)
    index = index_of(selector, k, length, queries=queries)
    tight = selector.pages(q, index, length, SCALE)
    for room, poison in product((0, 1, 1100), (torch.nan, 1e9, 0.0)):
        _, k, _ = drawn(LENGTHS, queries, poison=poison)
        index = index_of(selector, k, length, room, poison, queries)
        same(selector.pages(q, index, length, SCALE), tight)
    for b, n in enumerate(LENGTHS[:-1]):
        mine = slice(b, b + 1), slice(None), slice(0, -(-n // PAGE))
        index = {name: t[mine] for name, t in index.items()}  # of a row by itself
        alone = selector.pages(q[b : b + 1], index, length[b : b + 1], SCALE)
        assert [listed(alone, 0, h) for h in (0, 1)] == [listed(tight, b, h) for h in (0, 1)]
        index = index_of(selector, k, length, queries=queries)


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_scores_go_to_the_lower_page(name):
    selector = bound(name)
    q, k, length = drawn([64 * 30, 64 * 7])
    k = torch.ones_like(k).masked_fill(k.isnan(), torch.nan)
    found = selector.pages(q, index_of(selector, k, length), length, SCALE)
    for b, h in product((0, 1), (0, 1)):
        read, total, each = listed(found, b, h), int(length[b]) // found.unit, PAGE // found.unit
        assert read == [*range(len(read) - each), *range(total - each, total)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_kept_of_a_page_is_told_by_its_real_keys_alone(name, dtype):
    """All pages at once or each by itself; with NaN or anything in dead slots; on meta."""
    selector, found = bound(name), []
    at = torch.arange(5 * PAGE).view(1, 1, 5, PAGE, 1)
    for poison in (torch.nan, 1e4):
        _, k, length = drawn([5 * PAGE - 3, 200], poison=poison)
        pages, real = k.to(dtype).unflatten(2, (5, PAGE)), at < length.view(-1, 1, 1, 1, 1)
        whole = selector.summarise(pages, real)
        each = [selector.summarise(pages[:, :, [p]], real[:, :, [p]]) for p in range(5)]
        for key, t in whole.items():
            assert torch.equal(t, torch.cat([part[key] for part in each], 2))
        found.append({key: t[:, :, :3] for key, t in whole.items()})
    assert all(torch.equal(*pair) for pair in zip(*(f.values() for f in found), strict=True))
    on_meta = selector.summarise(pages.to("meta"), real.to("meta"))
    assert [(*on_meta,), [t.dtype for t in on_meta.values()]] == [
        (*whole,),
        [t.dtype for t in whole.values()],
    ]
    for key, t in whole.items():
        assert on_meta[key].shape == t.shape
        assert t.shape[:3] == (2, 2, 5)
    if {*whole} == EXTREMES:  # the names that kernels write
        spans = pages[0, :, 0].unflatten(1, (-1, selector.span))
        assert torch.equal(whole["low"][0, :, 0], spans.amin(2).squeeze(1))
        assert torch.equal(whole["high"][0, :, 0], spans.amax(2).squeeze(1))


@pytest.mark.parametrize("name", SETTINGS)
def test_heads_are_bound_to_their_own_part_of_a_table(name):
    """Both kv heads together choose as each by itself, and bound in another order."""
    q, k, length = drawn(LENGTHS, group=2)
    both = bound(name)
    found = both.pages(q, index_of(both, k, length), length, SCALE)
    for h in (0, 1):
        alone = bound(name, (h,))
        index = index_of(alone, k[:, [h]], length)
        mine = alone.pages(q[:, 2 * h : 2 * h + 2], index, length, SCALE)
        assert [listed(mine, b, 0) for b in range(5)] == [listed(found, b, h) for b in range(5)]


@pytest.mark.parametrize("name", [name for name, s in SETTINGS.items() if hasattr(s, "data")])
def test_a_selector_that_needs_a_table_does_nothing_without_one(name):
    setting = SETTINGS[name]
    q, k, length = drawn([200])
    index = index_of(bound(name), k, length)
    with pytest.raises(ValueError, match=setting.kind):
        index_of(setting, k, length)
    with pytest.raises(ValueError, match=setting.kind):
        setting.pages(q, index, length, SCALE)
    for table in (None, {}):
        with pytest.raises(ValueError, match="table"):
            setting.bind(0, (0, 1), table)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_host_never_waits(name):
    """On a device without data: what asks for a value fails there. Tables are copied once."""
    selector = bound(name)
    pages = torch.zeros(2, 2, 9, PAGE, 8, device="meta")
    real = torch.ones(1, 1, 9, PAGE, 1, dtype=torch.bool, device="meta")
    q, length = torch.zeros(2, 6, 1, 8, device="meta"), torch.zeros(2, device="meta").long()
    selector.pages(q, selector.summarise(pages, real), length, SCALE)
    with OneDevice():
        index = selector.summarise(pages, real)
        if segment_of(selector) > PAGE:
            index = selector.build(pages)
        assert selector.pages(q, index, length, SCALE).pages.is_meta


class OneDevice(TorchDispatchMode):
    """No operator may see or make tensors on two devices: that is a copy, or a wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, made)) if isinstance(t, torch.Tensor)]
        assert len({t.device for t in tensors}) <= 1, f"{function} crosses devices"
        return made


def test_a_copy_or_a_wait_would_be_seen():
    there, index = torch.zeros(3, device="meta"), DeviceTensor(torch.arange(2))
    index.on(there.device)
    with OneDevice():
        assert there[index.on(there.device)].is_meta
        for wrong in (there.tolist, there.cpu, lambda: torch.ones(3).to("meta")):
            with pytest.raises((AssertionError, RuntimeError)):
                wrong()
