"""What a CPU's own kernels of steps read and choose, in any list and of any selector.

`test_mixed_layers.py` has them in layers of every kind.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from hfsparse.kernels import Need, cpu_choose, cpu_decode, plain
from hfsparse.kernels.positions import NewTokens
from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.lengths import Lengths
from tests.helpers import close, truth
from tests.kernels.stores import one
from tests.kernels.test_reference import paged, readable
from tests.selectors.test_selectors import SETTINGS, bound, drawn, index_of, same

CHOSEN = [
    name
    for name in SETTINGS
    if cpu_choose.why_not(Need(torch.device("cpu"), torch.float32, 8, 8, chooser=SETTINGS[name]))
    is None
]


@pytest.mark.parametrize("below", [0, 400])
@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("lengths", [[64 * 21 + 5, 64 * 9, 300, 17, 0], [390, 390]], ids=repr)
@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_chosen_is_what_the_selector_chooses(name, lengths, queries, below):
    """NaN in each page that no row has."""
    selector = bound(name)
    q, k, length = drawn(lengths, queries)
    given = q, index_of(selector, k, length, room=3, queries=queries), length, 0.7
    heads = slice(0, 6)
    same(
        cpu_choose.pages(selector, *given, heads, below),
        plain.select(selector, *given, heads, below),
    )


@pytest.mark.parametrize("unit", [8, PAGE])
@pytest.mark.parametrize(("queries", "group"), [(1, 3), (3, 1), (16, 8)])
@pytest.mark.parametrize("lengths", [[200, 130], [190, 190]], ids=repr)
def test_any_lists_are_read_as_plain_attention_reads_them(lengths, queries, group, unit):
    """Not the newest unit, none at all, other ones in each head; NaN behind the rows."""
    made = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2 * group, queries, 16, generator=made)
    k, v = torch.randn(2, 2, 2, max(lengths), 16, generator=made)
    length, slot = torch.tensor(lengths), torch.arange(max(lengths))
    dead = (slot >= length[:, None])[:, None, :, None]
    k, v = (t.masked_fill(dead, torch.nan) for t in (k, v))
    query = length[:, None] - queries + torch.arange(queries)
    lists = PageLists(
        torch.tensor([[[0, 1, 2], [1, 2, 2]], [[0, 2, 2], [0, 1, 1]]]),
        torch.tensor([[0, 2], [3, 2]]),
        unit,
    )
    lists.pages[1, 0] = torch.tensor([0, 1, lengths[1] // unit])
    same_count = PageLists(torch.tensor([[[0, 1], [0, 2]]] * 2), torch.full((2, 2), 2), unit)
    padded = (pad(t, (0, 0, 0, -len(slot) % PAGE), value=torch.nan) for t in (k, v))
    new = NewTokens(Lengths([n - queries for n in lengths], [queries] * 2, queries), length, query)
    places = one(*padded, listed=True)
    for given in (lists, same_count):
        out = cpu_decode.decode(q, places, new, [given], scale=0.3)
        key = torch.where(dead[:, 0, :, 0], -1, slot)
        kept = readable(query, key, 2 * group) & paged(given, len(slot), group)
        assert close(out, truth(q, k, v, kept, 0.3))
