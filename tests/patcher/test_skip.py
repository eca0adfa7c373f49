"""A plan's skip threshold: tiles far below the running maximum are left out of prompts."""

from __future__ import annotations

import dataclasses
from math import isnan

import pytest
import torch

import hfsparse
from hfsparse.lists import BlockLists, Grid, default_block
from hfsparse.runtime.layer_plan import observed
from tests.helpers import Batch, close, read_pairs, truth
from tests.patcher import runs
from tests.patcher.families import full, left_padded, mixed, tiny, tokens

NEVER = 1e9  # nats: no tile is so far below


def runs_of_tokens(length: int, seed: int = 0) -> torch.Tensor:
    """[1, length] ids: the queries of a tile agree on which keys are worth reading."""
    return tokens(1, length // 32 + 1, seed=seed).repeat_interleave(32, 1)[:, :length]


def skipping(plan, skip, **more):
    return dataclasses.replace(plan, skip=skip, **more)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("plan", [full, mixed])
def test_a_threshold_that_no_tile_reaches_changes_nothing(family, plan):
    model = tiny(family)
    ids, mask = left_padded(260)
    results = []
    for skip in (None, NEVER):
        with hfsparse.patch(model, skipping(plan(model), skip)) as handle:
            results.append((runs.generate(model, ids, mask, new=4), handle.stats()))
    (without, bare), (with_it, stats) = results
    runs.same_generation(with_it, without)
    assert stats.skipped < 0.02
    assert isnan(bare.skipped)
    assert stats.pair_density == pytest.approx(bare.pair_density)


def test_full_heads_skip_by_the_definition():
    model = tiny("llama")
    ids = runs_of_tokens(300)
    seen = []

    def observe(module, q, k, v, logits):
        return lambda out: seen.append((module.layer_idx, q, k, v, logits.scale, out))

    with hfsparse.patch(model, skipping(full(model), 0.1)) as handle:
        with observed(model, observe):
            runs.forward(model, ids)
        layers = handle.stats().layers
    assert len(seen) == len(layers)
    for index, q, k, v, scale, out in seen:
        length, block = torch.tensor([300]), default_block(300)
        grid = Grid(length, length, 300, 300, block)
        it, ratio = Batch(q, k, v, grid, scale), q.shape[1] // k.shape[1]
        lists = BlockLists.of(grid, q.shape[1])
        kv_heads = torch.arange(q.shape[1]) // ratio
        mask, lost, tiles = read_pairs(it, lists, kv_heads, 0.1, (block, block))
        assert 0.02 < lost / tiles < 0.98
        assert close(out, truth(q, k, v, mask, scale))
        assert sum(layers[index].skipped) / q.shape[1] == pytest.approx(lost / tiles)


def test_each_left_padded_row_skips_as_its_unpadded_run():
    model = tiny("llama")
    ids, mask = left_padded(260)
    for row, pads in enumerate((0, 7, 13)):
        ids[row, pads:] = runs_of_tokens(260 - pads, seed=row)
    with hfsparse.patch(model, skipping(mixed(model), 0.1)) as handle:
        together = runs.forward(model, ids, mask).logits
        assert 0.02 < handle.stats().skipped < 0.98
        for row, pads in enumerate((0, 7, 13)):
            alone = runs.forward(model, ids[row : row + 1, pads:]).logits
            runs.close(together[row : row + 1, pads:], alone)
    dense = runs.forward(model, ids, mask).logits
    runs.far(together, dense, mask)


def test_short_rows_and_new_tokens_skip_nothing():
    model = tiny("llama")
    plan = full(model)
    below = dataclasses.replace(plan.below, prefill=100)
    want = runs.generate(model, tokens(1, 90), new=12)
    with hfsparse.patch(model, skipping(plan, 0.1, below=below)) as handle:
        runs.same_generation(runs.generate(model, tokens(1, 90), new=12), want)
        assert isnan(handle.stats().skipped)
        runs.forward(model, runs_of_tokens(260))
        stats = handle.stats()
        assert stats.skipped > 0.02
        assert f"{stats.skipped:.3f} of the kept tiles skipped" in str(stats)
        handle.reset_stats()
        assert isnan(handle.stats().skipped)


def test_explain_says_which_kernels_know_no_threshold():
    model = tiny("llama")
    with hfsparse.patch(model, skipping(full(model), 9.0)) as handle:
        told = handle.explain()
    assert "not torch sdpa: reads every key" in told
    assert "not FA4: no skip threshold" in told
