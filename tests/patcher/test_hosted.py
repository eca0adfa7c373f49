"""Keys in host memory, in whole models: bit for bit what a cache gives that the device holds.

A host without a GPU stands for both: `host.why_not` would refuse it.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

import hfsparse
from hfsparse.errors import CacheError, PatchError, PlanError, UsageError
from hfsparse.kernels.fetch import fetch
from hfsparse.lists import PAGE, PageLists
from hfsparse.lists.lengths import Lengths
from hfsparse.patcher import memory
from hfsparse.plan.kept import Full
from hfsparse.runtime.cache import host, store
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.host import HostFull
from hfsparse.selectors.centroids import Centroids
from hfsparse.selectors.quest import Quest
from tests import latents
from tests.patcher.families import hosted, left_padded, tiny, tokens
from tests.patcher.runs import close, continue_with, forward, generate
from tests.support import models

LENGTH = 400


@pytest.fixture
def anywhere(monkeypatch):
    """A CPU does."""
    monkeypatch.setattr(host, "why_not", lambda device: None)


def on_device(plan):
    """The same plan with every key where kernels read it."""
    return replace(plan, patterns=plan.patterns | {"host": Full(plan.patterns["host"].bits)})


def same(model, plan, run):
    """`run` gives the same under both, which other kernels read; the stats of the hosted one."""
    with hfsparse.patch(model, on_device(plan)):
        wanted = run(model)
    with hfsparse.patch(model, plan) as handle:
        found = run(model)
        stats = handle.stats()
    for pair in zip(found, wanted, strict=True):
        close(*pair)
    return stats


def talk(m, cache, back=-130):
    """A left-padded prompt, a chunk, steps of one token and of more, and some of them again."""
    ids, mask = (t.to(m.device) for t in left_padded(LENGTH))
    out = forward(m, ids, mask, **cache)
    found = [out.logits[:, -1]]
    for seed, new in enumerate((40, 1, 16, back, 3, 1, 90, 1, -1, 2)):
        if new < 0:
            out.past_key_values.crop(new)
            mask = mask[:, :new]
            continue
        mask = continue_with(ids, mask, new)
        ids = tokens(3, new, seed=seed).to(m.device)
        out = forward(m, ids, mask, cache=out.past_key_values)
        found.append(out.logits)
    return found


@pytest.mark.parametrize(
    ("family", "below", "quest"),
    [
        ("llama", 0, dict(beside="full")),
        ("qwen2", 420, dict(unit=16, bound=16, beside="full")),
        ("qwen3", 0, dict(refresh=3)),
        ("mistral", 0, dict(unit=8, top_p=0.7, beside="mean")),
        ("llama", 0, dict(bits=4, beside="full")),
        ("qwen2", 420, dict(bits=8, bound=16, beside="full")),
        ("mistral", 0, dict(bits="fp8", refresh=3)),
    ],
    ids=["gqa2", "gqa3-below", "gqa1", "gqa4", "int4", "int8-below", "fp8"],
)
def test_what_lies_in_host_memory_is_read_as_if_it_did_not(anywhere, family, below, quest):
    model = tiny(family)
    plan = hosted(model, below, **quest)
    back = -130 if quest.get("beside") else -30  # rings can't go back further
    stats = same(model, plan, lambda m: talk(m, {}, back))
    assert 0.3 < stats.hit_rate < 1
    assert stats.layers[0].units.done[0] < stats.layers[0].units.dense[0]


@pytest.mark.parametrize("kept", [dict(unit=16), dict(bits=8)], ids=str)
def test_chunks_beams_and_drafts_are_those_of_any_cache(anywhere, monkeypatch, kept):
    monkeypatch.setattr(store, "TOGETHER", 1)  # a head is brought back at a time
    model, (ids, mask) = tiny("llama"), left_padded(LENGTH)
    plan = hosted(model, **kept)
    ways = (
        dict(prefill_chunk_size=150),
        dict(num_beams=2, new=40),
        dict(prompt_lookup_num_tokens=4, new=20),
    )

    def run(m):
        found = []
        for way in ways:
            rows = slice(0, 1 if "prompt_lookup_num_tokens" in way else 3)
            out = generate(m, ids[rows, 13:], mask[rows, 13:], **way)
            found += [out.sequences, *out.logits]
        return found

    same(model, plan, run)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_copy_goes_on_as_the_cache_does_and_reset_forgets_it(anywhere, bits):
    model, ids = tiny("llama"), tokens(1, LENGTH)
    plan = hosted(model, beside="full", bits=bits)

    def run(m):
        cache = forward(m, ids).past_key_values
        kept = copy.deepcopy(cache)
        found = [forward(m, ids[:, i : i + 1], cache=cache).logits for i in range(70)]
        found += [forward(m, ids[:, i : i + 1], cache=kept).logits for i in range(70)]
        assert all(map(torch.equal, found[:70], found[70:]))
        held = cache.layers[0].keys
        cache.reset()
        return [*found, held, forward(m, ids[:, :200], cache=cache).logits]

    same(model, plan, run)


def test_no_slot_holds_what_was_taken_back(anywhere):
    """Pages that were fetched, then lost to a crop, and hold other tokens now."""
    group = Group((0,), selector=Quest(0.5, 2), hot=0.6)
    kept, drawn = copy.deepcopy(HostFull(group, 0)), torch.Generator().manual_seed(0)

    def append(past, n):
        k = torch.randn(1, 1, n, 8, generator=drawn)
        kept.append(k, k, Lengths([past], [n], n))

    def read():
        hot, length = kept.place().hot, torch.tensor([640])
        for pages in (torch.arange(6), torch.arange(4, 10)):
            found = fetch(hot, PageLists(pages[None, None], torch.tensor([[6]])), length)
            for page, lies in zip(pages, found.lies[0, 0], strict=True):
                at, lies = (slice(n * PAGE, (n + 1) * PAGE) for n in (page, lies))
                assert torch.equal(hot.k[..., lies, :], hot.host_k[..., at, :])

    kept.create(*[torch.zeros(1, 1, 1, 8)] * 2)
    append(0, 640)
    read()
    kept.forget([300])
    append(300, 340)
    read()


@pytest.mark.parametrize("bits", [16, 4])
def test_memory_that_is_refused_leaves_a_cache_that_says_it_is_broken(anywhere, monkeypatch, bits):
    """For the last slots of the second layer: no other of its buffers may be longer then."""
    model, made = tiny("llama"), []
    with hfsparse.patch(model, hosted(model, bits=bits)):
        cache = forward(model, tokens(1, 130)).past_key_values
        hosting = [next(s for s in x.stores if s.outside()) for x in cache.layers]
        second, real = hosting[1], host.lengthen
        before, room = dict(vars(second)), second.capacity

        def refusing(*given):
            made.append(given)
            if len(made) == 2 * (3 + (2 if bits == 16 else 6)):  # tables, and what is held
                raise torch.OutOfMemoryError("refused")
            return real(*given)

        monkeypatch.setattr(host, "lengthen", refusing)
        with pytest.raises(torch.OutOfMemoryError):
            forward(model, tokens(1, 300), cache=cache)
        assert hosting[0].capacity > second.capacity == room
        assert all(vars(second)[name] is t for name, t in before.items() if name != "exact")
        with pytest.raises(CacheError, match="this cache is broken: a forward pass was"):
            forward(model, tokens(1, 3), cache=cache)


@pytest.mark.parametrize("bits", [16, 4])
def test_what_is_predicted_is_held_by_each_memory(anywhere, bits):
    model, (ids, mask) = tiny("llama"), left_padded(1900, [0, 40])
    plan = hosted(model, bits=bits)
    with hfsparse.patch(model, plan) as handle:
        cache = forward(model, ids, mask).past_key_values
        stats, told = handle.stats(), handle.explain()
    held = sum(layer.bytes() for layer in cache.layers)
    outside = sum(layer.host_bytes() for layer in cache.layers)
    assert (held, outside) == (stats.kv_bytes, stats.host_bytes)
    assert memory.cache_bytes(model.config, plan, 1900, 2, 4) == (held, stats.kv_bytes_dense)
    assert memory.predict(model.config, plan, 1900, batch=2, itemsize=4).host == outside
    # Layers, rows, tokens, keys and values; of packed pages, ends of values beside them.
    page = 2 * 64 * 16 * 4 if bits == 16 else 64 * 16 + 2 * 64 * 4
    assert outside == 3 * 2 * 30 * page
    # A hot set of 9 pages of 30, the newest two, quest's bounds, and numbers of 4 bytes a page.
    page = 1 if bits == 16 else (page + 2 * 16 * 4) / (2 * 64 * 16 * 4)
    share = (9 * page + 2) / 29.7 + 1 / 64
    assert stats.layers[0].cache.shares[0] == pytest.approx(share, abs=0.003)
    how = "" if bits == 16 else " in 4 bits"
    assert f"1 selected{how} in host memory by reference (PyTorch)" in told
    every = f"every key,{how}{'' if bits == 16 else ','} in host memory, 0.3 of each row on the GPU"
    assert f"host (full), cache: {every}" in told
    assert "pages there: fetched by PyTorch (not Triton: needs a CUDA device" in told
    assert f"{outside / 2**20:.1f} MiB in host memory" in str(stats)


def test_what_lies_in_host_memory_takes_fewer_bits_where_whole_pages_are_read():
    model = tiny("llama")
    found = hosted(model).with_bits(4, model)
    assert found.patterns["host-int4"] == Full(4, host=True, hot=0.3)
    assert [x.cache[0] for x in found.layers] == ["host-int4"] * 3
    parts = hosted(model, unit=16, beside="full").with_bits(4, model)
    assert {x.cache for x in parts.layers} == {("host", "full-int4")}


def test_what_cannot_lie_in_host_memory_is_refused_in_a_sentence(monkeypatch):
    model = tiny("llama")
    plan = hosted(model)
    with pytest.raises(
        PatchError, match=r"layer 0 keeps keys in host memory.*a host without a GPU"
    ):
        hfsparse.patch(model, plan)
    with monkeypatch.context() as once:
        once.setattr(host, "why_not", lambda device: None)
        handle = hfsparse.patch(model, plan)
    with handle, pytest.raises(CacheError, match=r"keeps keys in host memory.*without a GPU"):
        forward(model, tokens(1, 20))

    def refused(why, word="quest", selector=None, **kept):
        patterns = plan.patterns | {"host": Full(host=True, **kept)}
        patterns |= {} if selector is None else {"quest": selector}
        layers = [replace(x, decode=(word, *x.decode[1:])) for x in plan.layers]
        with pytest.raises(PlanError, match=f"cache host, in host memory, and decode {why}"):
            replace(plan, patterns=patterns, layers=tuple(layers)).validate()

    refused("full, which reads every page at each step: give a selector", "full")
    refused("quest, with means of whole rows", selector=Quest(0.1, means=True))
    refused("quest, which clusters keys anew", selector=Centroids(0.1, segment=256))
    refused("quest, which reads units of 16 tokens, where", selector=Quest(0.1, unit=16), bits=8)
    refused(r"quest, which reads a share of 0.3 .*keeps 0.12: give hot 0.3", selector=Quest(0.3))
    for given, why in (
        (dict(host=True, hot=1.5), "hot is 1.5: give more than 0"),
        (dict(hot=0.2), "hot is 0.2, host false"),
    ):
        with pytest.raises(UsageError, match=re.escape(why)):
            Full(**given)
    if models.exists("gemma4_shared"):
        shared = models.fresh("gemma4_shared")
        with pytest.raises(PlanError, match=r"layer 2 shares its keys with other layers, and host"):
            hosted(shared).check(shared)
    if latents.exists("deepseek_v3"):
        latent = latents.fresh("deepseek_v3")
        with pytest.raises(PlanError, match=r"layer 0-2 keeps latents.*host is in host memory"):
            hosted(latent).check(latent)
