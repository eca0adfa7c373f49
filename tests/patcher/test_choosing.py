"""Pages that are chosen once and read by later steps and layers, in a patched model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache

import hfsparse
from hfsparse import kernels
from hfsparse.kernels import dense, reference
from hfsparse.kernels.per_store import by_store
from hfsparse.plan import Below
from hfsparse.runtime.call import use_tables
from tests.patcher.families import choosing, fresh, left_padded, tiny, tokens
from tests.patcher.runs import continue_with, forward

PADS = (0, 0, 70)
LENGTH = 600


def prompt(cache, seed=0):
    """Fill a cache with a left-padded prompt; a function that gives it a token more a row."""
    ids, mask = left_padded(LENGTH, PADS, seed=seed)
    model = tiny("qwen2")
    forward(model, ids, mask, cache=cache)

    def step(seed, order=(0, 1, 2)):
        seen = cache.get_seq_length()
        whole = continue_with(ids, mask, seen - LENGTH + 1)[list(order)]
        return forward(model, tokens(3, 1, seed=seed), whole, cache=cache).logits

    return step


def crop(cache):
    cache.crop(-1)
    return (0, 1, 2)


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    return (1, 0, 2)


@pytest.mark.parametrize("change", [None, crop, reorder], ids=["nothing", "crop", "reorder"])
def test_after_a_change_of_rows_the_next_step_chooses_anew(change):
    """The first step chooses whatever `refresh` is; so does the next, if rows change in between."""
    model, found = tiny("qwen2"), []
    plan = choosing(model)
    often = replace(plan.patterns["young"], refresh=0)
    for each in (plan, replace(plan, patterns={**plan.patterns, "young": often})):
        with hfsparse.patch(model, each):
            cache = DynamicCache(config=model.config)
            step = prompt(cache)
            step(1)
            order = change(cache) if change else (0, 1, 2)
            found.append(step(2, order))
    assert torch.equal(*found) == (change is not None)


def test_a_choice_is_read_on_other_devices():
    model = fresh("qwen2")

    def move(module, args, kwargs):
        return tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))

    for module in (*model.model.layers[1:], model.model.norm):
        module.to("meta").register_forward_pre_hook(move, with_kwargs=True)
    with torch.no_grad(), hfsparse.patch(model, choosing(model)):
        cache = DynamicCache(config=model.config)
        for n in (200, 1):
            out = model.model(tokens(1, n), past_key_values=cache).last_hidden_state
    assert (out.device.type, cache.layers[0].device.type) == ("meta", "cpu")


def test_two_caches_keep_their_own_choices():
    model, alone = tiny("qwen2"), []
    with hfsparse.patch(model, choosing(model)):
        for seed in (0, 1):
            step = prompt(DynamicCache(config=model.config), seed)
            alone.append([step(n) for n in range(5)])
        steps = [prompt(DynamicCache(config=model.config), seed) for seed in (0, 1)]
        for n in range(5):
            for step, wanted in zip(steps, alone, strict=True):
                assert torch.equal(step(n), wanted[n])


@pytest.mark.parametrize("below", [0, 603], ids=["all", "beside_a_short_row"])
def test_a_layer_reads_what_another_chose_and_stats_count_it(below):
    """Shares are counted from the lists that the decode kernel got."""
    model, lists = tiny("qwen2"), []

    def watched(run):
        def noted(*args, length, **rest):
            lists.append((args[5] if len(args) > 5 else None, length))
            return run(*args, length=length, **rest)

        return noted

    run = by_store(watched(reference.decode), watched(dense.decode))
    row = kernels.Kernel("watched", run, lambda need: None)
    plan = replace(choosing(model), below=Below(decode=below))
    with hfsparse.patch(model, plan) as handle:
        step = prompt(DynamicCache(config=model.config))
        handle.reset_stats()
        with use_tables(kernels.TABLES._replace(decode=(row,))):
            for n in range(6):
                step(n)
        shares = torch.tensor([layer.decode_share for layer in handle.stats().layers])
        handle.reset_stats()
        step(6)
        assert handle.stats().layers[0].decode_share[0] < 0.9
    paged = [(pages, length) for pages, length in lists if pages is not None]
    first, again, top = paged[::3], paged[1::3], paged[2::3]
    for (chosen, _), (read, _) in zip(first, again, strict=True):
        assert torch.equal(read.pages, chosen.pages[:, -1:])
        assert torch.equal(read.count, chosen.count[:, -1:])
    total = sum(LENGTH - pad + n + 1 for pad in PADS for n in range(6))
    short = total - sum(int(length.sum()) for _, length in first)
    assert (short > 0) == (below > 0)
    for index, read in ((0, first), (2, top)):
        keys = sum(pages.keys(length).sum(0) for pages, length in read)
        torch.testing.assert_close(shares[index], (keys + short) / total)
    assert shares[1].tolist() == [1.0, shares[0, 1].item()]
    assert len({tuple(pages.count.flatten().tolist()) for pages, _ in top}) > 1, "top_p adapts"
