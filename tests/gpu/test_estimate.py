"""Blocks chosen by the fused estimators on the GPU, against the plain patterns there."""

from __future__ import annotations

import pytest

from hfsparse.kernels import triton_estimate
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.vertical_slash import VerticalSlash
from tests.gpu.common import HALF, SINGLE, compiled, on_gpu

PATTERNS = (VerticalSlash(45, 130), BlockTopK(0.25, 2), Antidiagonal(0.6), Antidiagonal(0.9, 0.2))
SHORT = dict(past=45, rows="left_padded")
CASES = {
    **{f"heads_of_{dim}": dict(length=2000, dim=dim) for dim in (64, 80, 96, 128, 256)},
    "float16": dict(length=1037, dtype=HALF, **SHORT),
    "float32": dict(length=1037, dtype=SINGLE, dim=64, **SHORT),
    "padded_rows": dict(length=1037, **SHORT),
    "an_empty_row": dict(length=300, rows="empty_row"),
    "a_window": dict(length=700, past=1017, window=600, rows="left_padded"),
    "one_q_head_a_group": dict(length=517, group=1),
    "wide_groups": dict(length=517, group=7, kv_heads=1),
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_fused_lists_are_the_plain_ones(case, pattern):
    """But for a few blocks whose scores tie up to rounding."""
    it = on_gpu(**CASES[case])
    assert triton_estimate.why_not(pattern, it.q, it.grid) is None
    found = triton_estimate.lists(pattern, it.q, it.k, it.grid, it.scale).mask()
    expected = pattern.lists(it.q, it.k, it.grid, it.scale).mask()
    assert expected.any()
    assert (found != expected).sum() <= 0.01 * expected.sum()


def test_a_new_length_compiles_nothing():
    found = []
    for length in (517, 300, 1024, 2000):
        it = on_gpu(length, rows="equal")
        for pattern in PATTERNS:
            triton_estimate.lists(pattern, it.q, it.k, it.grid, it.scale)
        found.append(sum(compiled(m) for m in (triton_estimate, triton_estimate.triton_select)))
    assert found == [found[0]] * 4
