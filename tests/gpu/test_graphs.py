"""Decode steps replayed as CUDA graphs give the tokens of eager steps, whatever happens between."""

from __future__ import annotations

import gc
import random
import threading

import pytest
import torch
from transformers import DynamicCache

import hfsparse
from tests.gpu.common import DEVICE
from tests.patcher.families import (
    choosing,
    fresh,
    full,
    growing,
    left_padded,
    mixed,
    straddled,
    streaming,
)
from tests.patcher.runs import CACHE, continue_with, generate


def graphs(model):
    return model.get_decoder()._hfsparse.graphs


def said(model, plan, ids, mask, replay: bool = True, fuse: bool = False, **more):
    """Tokens and logits of one generation under a plan."""
    with hfsparse.patch(model, plan(model), fuse=fuse):
        if not replay:
            graphs(model).never = "this test wants it eager"
        out = generate(model, ids, mask, **more)
        if replay and more.get("new", 12) > 4 and not more.get("num_beams"):
            assert graphs(model).why is None
        return out.sequences.tolist(), torch.stack(out.logits, 1)


def inputs(length: int, pads=(0,)):
    return (t.to(DEVICE) for t in left_padded(length, pads))


@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)])
@pytest.mark.parametrize("plan", [full, streaming, growing, mixed, straddled])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma3"])
def test_a_replay_is_the_eager_step_bit_for_bit(family, plan, pads):
    model, (ids, mask) = fresh(family).to(DEVICE), inputs(250, pads)
    want = said(model, plan, ids, mask, replay=False, new=30)
    got = said(model, plan, ids, mask, new=30)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("pads", [(0,), (0, 7, 13)])
def test_a_replay_chooses_pages_when_the_eager_step_does(pads):
    test_a_replay_is_the_eager_step_bit_for_bit("qwen2", choosing, pads)


@pytest.mark.parametrize("more", [dict(do_sample=True, top_p=0.9, repetition_penalty=1.2)])
def test_seeded_sampling(more):
    model, (ids, mask) = fresh("llama").to(DEVICE), inputs(100, (0, 5))
    want = said(model, mixed, ids, mask, replay=False, new=40, **more)
    assert said(model, mixed, ids, mask, new=40, **more)[0] == want[0]


def test_beams_and_lookup_decoding_go_on_working():
    model, (ids, mask) = fresh("llama").to(DEVICE), inputs(100)
    for more in (dict(num_beams=3), dict(prompt_lookup_num_tokens=3)):
        want = said(model, streaming, ids, mask, replay=False, new=20, **more)
        with hfsparse.patch(model, streaming(model)):
            assert generate(model, ids, mask, new=20, **more).sequences.tolist() == want[0]


def talk(model, turns: list[int], cache=None, new: int = 20):
    """A conversation over one cache that grows: the tokens of each answer."""
    cache, answers = cache or DynamicCache(), []
    ids, mask = inputs(120)
    for at, length in enumerate(turns):
        out = generate(model, ids, mask, cache=cache, new=new)
        answers.append(out.sequences[0, ids.shape[1] :].tolist())
        more = left_padded(length, (0,), seed=at + 1)[0].to(DEVICE)
        ids = torch.cat([out.sequences, more], 1)
        mask = continue_with(ids[:, -1:], mask, new + length)
    return answers


def test_turns_over_one_cache_that_grows():
    model = fresh("llama").to(DEVICE)
    with hfsparse.patch(model, mixed(model)):
        got = talk(model, [30, 100, 3, 400, 1])
        assert graphs(model).why is None
        graphs(model).never = "this test wants it eager"
        assert talk(model, [30, 100, 3, 400, 1]) == got


@torch.no_grad()
def test_two_live_caches_in_turn():
    model = fresh("llama").to(DEVICE)
    prompts = [left_padded(n, (0,), seed=n)[0].to(DEVICE) for n in (90, 200)]

    def answers() -> list:
        caches, seen = [DynamicCache(), DynamicCache()], [[], []]
        last = [model(p, **{CACHE: c}).logits[:, -1:] for p, c in zip(prompts, caches, strict=True)]
        for _ in range(25):
            for i in (0, 1):
                last[i] = model(last[i].argmax(-1), **{CACHE: caches[i]}).logits
                seen[i].append(last[i])
        assert len(graphs(model).kept) in (0, 2)
        return seen

    with hfsparse.patch(model, mixed(model)):
        got = answers()
        assert graphs(model).why is None
        graphs(model).never = "this test wants it eager"
        want = answers()
    assert all(
        torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_threads_do_not_mix_up_their_tokens():
    model = fresh("llama").to(DEVICE)
    prompts = [[t.to(DEVICE) for t in left_padded(n, (0,), seed=n)] for n in (80, 150, 201)]
    with hfsparse.patch(model, mixed(model)):
        want = [generate(model, *p, new=60).sequences.tolist() for p in prompts]
        got = [None] * 3

        def run(i: int) -> None:
            got[i] = generate(model, *prompts[i], new=60).sequences.tolist()

        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == want


def test_rows_can_be_taken_back():
    model, (ids, _) = fresh("llama").to(DEVICE), inputs(150)

    def run():
        cache, seen = DynamicCache(), []
        with torch.no_grad():
            model(ids, **{CACHE: cache})
            for drop in (0, 0, 0, 0, 3, 0, 0, 1, 0, 0, 0, 0, 2, 0):
                if drop:
                    cache.crop(-drop)
                seen.append(model(ids[:, :1] + len(seen), **{CACHE: cache}).logits)
        return torch.cat(seen, 1)

    with hfsparse.patch(model, mixed(model)):
        got = run()
        graphs(model).never = "this test wants it eager"
        assert torch.equal(run(), got)


def test_what_changes_between_two_calls_is_seen():
    model, (ids, mask) = fresh("llama").to(DEVICE), inputs(60)
    with hfsparse.patch(model, full(model)):
        generate(model, ids, mask, new=8)
        old = model.model.layers[1].mlp.up_proj.weight
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.randn_like(old))
        got = generate(model, ids, mask, new=8).sequences.tolist()
        assert graphs(model).why is None
        hook = model.model.layers[0].register_forward_hook(lambda *args: None)
        assert generate(model, ids, mask, new=8).sequences.tolist() == got
        assert "a hook on layers.0" in graphs(model).why
        hook.remove()
        graphs(model).never = "this test wants it eager"
        assert generate(model, ids, mask, new=8).sequences.tolist() == got


def test_fused_steps_say_nearly_the_same():
    model, (ids, mask) = fresh("llama").to(DEVICE), inputs(150, (0, 9))
    want = said(model, mixed, ids, mask, replay=False, new=16)
    got = said(model, mixed, ids, mask, fuse=True, new=16)
    assert got[0] == want[0]
    assert (got[1] - want[1]).abs().max() < 1e-3


def test_memory_comes_back_and_2000_tokens_are_the_eager_ones():
    model, (ids, mask) = fresh("llama").to(DEVICE), inputs(64)
    want = said(model, mixed, ids, mask, replay=False, new=2000)
    said(model, mixed, ids, mask, new=8)  # the matrix library takes its workspace
    gc.collect()
    before = torch.cuda.memory_allocated()
    got = said(model, mixed, ids, mask, new=2000)
    assert got[0] == want[0]
    del got
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_soak():
    """200 calls of random shape, plan and length: no error, eager's tokens, no leak."""
    made = random.Random(0)
    model = fresh("llama").to(DEVICE)
    used = []
    for plan in (full, streaming, growing, mixed, straddled):
        with hfsparse.patch(model, plan(model)):
            for at in range(20):
                pads = [0] + [made.randrange(9) for _ in range(made.randrange(3))]
                ids, mask = (t.to(DEVICE) for t in left_padded(made.randrange(20, 300), pads, at))
                new = made.randrange(1, 24)
                found = []
                for never in (None, "this test wants it eager"):
                    graphs(model).never = never
                    found.append(generate(model, ids, mask, new=new).sequences.tolist())
                assert found[0] == found[1], (plan.__name__, at)
                gc.collect()
                used.append(torch.cuda.memory_allocated())
    assert max(used[-20:]) <= max(used[:20]) + (1 << 22)
