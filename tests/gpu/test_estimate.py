"""Blocks chosen by the fused estimators on the GPU, against the plain patterns there."""

from __future__ import annotations

import pytest
import torch

from hfsparse.kernels import Need, reference
from hfsparse.kernels.triton import estimate as triton_estimate
from hfsparse.kernels.triton import prefill as triton_prefill
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.energy import Energy
from tests.gpu.common import BF16, DEVICE, HALF, SINGLE, causal, compiled, near, on_gpu, rounding
from tests.patterns.matrix import SETTINGS

PATTERNS = [pattern for pattern in SETTINGS.values() if type(pattern) in triton_estimate.FUSED]
SHORT = dict(past=45, rows="left_padded")
CASES = {
    **{f"heads_of_{dim}": dict(length=2000, dim=dim) for dim in (64, 80, 96, 128, 192, 256, 512)},
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
    need = Need.of(it.q, it.k, it.v, block=it.grid.block, chooser=pattern)
    assert triton_estimate.why_not(need) is None
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
        found.append(sum(compiled(m) for m in triton_estimate.PARTS))
    assert found == [found[0]] * 4


ENDED = [  # a pattern, and key blocks of which the last query, alone in its block, ends the last
    (BlockTopK(0.36, 2), 350),
    (BlockTopK(0.3, 2), 410),
    (Antidiagonal(1.0, max_share=0.6), 205),
    (Energy(1e-30, 0, 0, 0, max_share=0.6), 205),
]


@pytest.mark.parametrize(("pattern", "blocks"), ENDED, ids=str)
@pytest.mark.parametrize("dtype", [BF16, SINGLE], ids=str)
def test_no_list_is_wider_than_its_row(pattern, blocks, dtype):
    """A turn of 129 tokens: its last query block has no partial key block."""
    new, total, made = 129, blocks * 128, torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, n, 64, device=DEVICE, generator=made).to(dtype)
        for n in (new, total, total)
    )
    grid, kv = causal(new, total), torch.arange(2, device=DEVICE)
    found, plain = (way(pattern, q, k, grid) for way in (fused, plainly))
    assert int(found.full_count.max()) <= found.full_index.shape[-1]
    assert torch.equal(found.full_count, plain.full_count)
    assert torch.equal(found.part_count, plain.part_count)
    expected = reference.prefill(q, k, v, found, kv, scale=0.125)
    assert near(triton_prefill.prefill(q, k, v, found, kv, scale=0.125), expected)


def fused(pattern, q, k, grid):
    return triton_estimate.lists(pattern, q, k, grid, 0.125)


def plainly(pattern, q, k, grid):
    return pattern.lists(q, k, grid, 0.125)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_buffers_take_no_default_dtype(pattern):
    it = on_gpu(517, past=45, rows="left_padded", group=1)
    expected = fused(pattern, it.q, it.k, it.grid)
    torch.set_default_dtype(BF16)
    try:
        found = fused(pattern, it.q, it.k, it.grid)
    finally:
        torch.set_default_dtype(SINGLE)
    assert torch.equal(found.mask(), expected.mask())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_plain_patterns_choose_the_same_whatever_rounds(pattern):
    it = on_gpu(1037, past=45, rows="left_padded", dtype=SINGLE, dim=64)
    expected = plainly(pattern, it.q, it.k, it.grid).mask()
    with rounding():
        found = plainly(pattern, it.q, it.k, it.grid).mask()
    assert (found != expected).sum() <= 0.01 * expected.sum()
