"""What each pattern reads of one fixed prompt, so that no change of a definition goes unseen.

The masks are those that the oracles of `tests/patterns/matrix.py` answer, too: `test_patterns`.
"""

from __future__ import annotations

import pytest

from hfsparse.patterns import PATTERNS
from tests.helpers import batch
from tests.patterns.matrix import SETTINGS

KEPT = {  # by setting: blocks that the last block of queries reads, by head; all pairs read
    "streaming": ([[0, 7, 8, 9], [0, 7, 8, 9]], [13272, 13272]),
    "streaming_growing": ([[0, 5, 6, 7, 8, 9], [0, 5, 6, 7, 8, 9]], [20412, 20412]),
    "streaming_without_sink": ([[9], [9]], [300, 300]),
    "vertical_slash": ([[1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 3, 4, 5, 6, 7, 8, 9]], [45126, 44678]),
    "vertical_slash_few": ([[9], [9]], [6706, 6706]),
    "block_topk": ([[0, 6, 9], [0, 3, 9]], [14814, 14814]),
    "block_topk_one": ([[0, 9], [0, 9]], [13406, 13406]),
    "antidiagonal": ([[0, 1, 3, 6, 8, 9], [0, 3, 4, 5, 6, 9]], [30302, 30302]),
    "antidiagonal_cut": ([[0, 9], [0, 9]], [13406, 13406]),
    "energy": ([[0, 8, 9], [0, 3, 4, 8, 9]], [28126, 36062]),
    "energy_cut": (
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]],
        [23646, 23646],
    ),
    "sparge": ([[0, 6, 9], [0, 3, 9]], [16862, 16862]),
    "sparge_share": ([[0, 6, 8, 9], [0, 3, 4, 9]], [20318, 20318]),
    "flexprefill": ([[0, 1, 3, 4, 5, 7, 8, 9], [0, 1, 3, 4, 5, 6, 8, 9]], [40286, 39262]),
    "flexprefill_aware": ([[0, 4, 7, 9], [0, 4, 8, 9]], [23390, 24414]),
    "sample": ([[0, 8, 9], [0, 8, 9]], [32834, 33166]),
    "sample_cut": ([[0, 8, 9], [0, 8, 9]], [22582, 22398]),
    "hip": ([[0, 1, 2, 4, 6, 7, 8, 9], [0, 1, 4, 5, 6, 7, 8, 9]], [41310, 41310]),
    "hip_one": ([[0, 4, 9], [0, 1, 9]], [20958, 20958]),
    "strided": ([[0, 1, 2, 5, 7, 8, 9], [0, 1, 2, 5, 7, 8, 9]], [36830, 36830]),
    "strided_random": ([[0, 2, 5, 6, 9], [0, 2, 5, 6, 9]], [32990, 32990]),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_fixed_prompt_is_read_as_before(name):
    it = batch(300, group=2, kv_heads=1, seed=1).row(0)
    lists = SETTINGS[name].lists(it.q, it.k, it.grid, it.scale)
    last = [head[-1].nonzero().flatten().tolist() for head in lists.kept_blocks()[0]]
    assert (last, lists.pairs()[0].tolist()) == KEPT[name]


def test_every_kind_has_its_prompt():
    assert {SETTINGS[name].kind for name in KEPT} == {*PATTERNS}
