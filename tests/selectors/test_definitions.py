"""What each selector chooses of one fixed row, so that no change of a definition goes unseen.

The sets are those that the oracles of `tests/patterns/matrix.py` answer, too: `test_selectors`.
"""

from __future__ import annotations

import pytest

from hfsparse.lists import PAGE
from tests.patterns.matrix import SELECTOR_ROWS
from tests.selectors.test_selectors import SCALE, SETTINGS, bound, drawn, index_of, listed

CHOSEN = {  # by setting, of either kv head
    "quest": [[0, 4, 12], [0, 6, 12]],
    "quest_16": [
        [0, 1, 2, 3, 6, 13, 16, 19, 23, 29, 38, 40, 41, 42, 48],
        [0, 1, 2, 3, 24, 28, 29, 31, 35, 36, 37, 38, 40, 47, 48],
    ],
    "quest_lserve": [[0, 4, 7, 12], [0, 6, 10, 12]],
    "lowrank": [[0, 1, 2, 3, 12, 14, 19, 41, 42, 48], [0, 1, 2, 3, 28, 30, 34, 40, 44, 48]],
    "lowrank_top_p": [
        [
            0,
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            13,
            16,
            18,
            23,
            24,
            29,
            30,
            49,
            59,
            72,
            77,
            80,
            81,
            82,
            84,
            94,
            96,
        ],
        [0, 1, 2, 3, 4, 5, 6, 7, 9, 16, 23, 52, 56, 59, 65, 69, 73, 74, 80, 88, 94, 95, 96],
    ],
    "channels": [[0, 1, 12], [0, 9, 12]],
    "channels_top_p": [
        [0, 1, 2, 3, 6, 7, 9, 15, 23, 29, 31, 41, 42, 47, 48],
        [0, 1, 2, 3, 9, 24, 29, 35, 36, 38, 40, 44, 48],
    ],
    "landmarks_16": [
        [0, 1, 2, 3, 6, 7, 9, 12, 13, 19, 24, 28, 29, 35, 38, 41, 42, 45, 46, 48],
        [0, 1, 2, 3, 8, 9, 11, 12, 15, 24, 28, 34, 35, 36, 38, 40, 44, 45, 47, 48],
    ],
    "lsh": [[0, 1, 2, 3, 8, 18, 21, 33, 36, 48], [0, 1, 2, 3, 10, 28, 31, 33, 34, 48]],
    "centroids_segments": [
        [0, 1, 2, 3, 4, 5, 6, 7, 18, 23, 29, 34, 55, 62, 72, 77, 82, 88, 93, 96],
        [0, 1, 2, 3, 4, 5, 6, 7, 49, 56, 59, 61, 67, 69, 73, 74, 77, 80, 90, 96],
    ],
    "centroids_16": [
        [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 18, 36, 37, 38, 39, 40, 41, 42, 43, 48],
        [0, 1, 2, 3, 12, 13, 14, 20, 21, 24, 25, 26, 27, 32, 33, 34, 35, 36, 37, 48],
    ],
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_fixed_row_is_read_as_before(name):
    q, k, length = drawn([PAGE * 12 + 5], queries=2, seed=1)
    selector = bound(name)
    found = selector.pages(q, index_of(selector, k, length, queries=2), length, SCALE)
    assert [listed(found, 0, h) for h in (0, 1)] == CHOSEN[name]


def test_every_kind_that_chooses_has_its_row():
    kinds = {kind for kind, row in SELECTOR_ROWS.items() if row.settings}
    assert {SETTINGS[name].kind for name in CHOSEN} == kinds
