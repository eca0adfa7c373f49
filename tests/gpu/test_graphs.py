"""Decode steps replayed as CUDA graphs give the tokens of eager steps, whatever happens between."""

from __future__ import annotations

import gc
import random
import threading
from functools import partial

import pytest
import torch
from transformers import DynamicCache

import hfsparse
from hfsparse.lists import PAGE
from hfsparse.models.names import text_decoder
from hfsparse.runtime.graphs.recording import Graph
from tests import worlds
from tests.frozen import Scaled, by_steps
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
    return text_decoder(model)._hfsparse.graphs


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


def to_the_cpu_and_back(model):
    model.cpu()
    torch.cuda.empty_cache()
    return [torch.full((1 << 22,), float("nan"), device=DEVICE) for _ in range(4)], model.cuda()


def new_data(model):
    for weight in model.parameters():
        weight.data = weight.data.clone()


def new_parameter(model):
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


@torch.no_grad()
@pytest.mark.parametrize("move", [to_the_cpu_and_back, new_data, new_parameter])
def test_weights_that_move_between_single_tokens_are_recorded_anew(move):
    ids, found = left_padded(200, (0,))[0].to(DEVICE), []
    for never in (None, "this test wants it eager"):
        model, seen = fresh("llama").to(DEVICE), []
        torch.manual_seed(0)
        with hfsparse.patch(model, mixed(model)):
            graphs(model).never = never
            cache = DynamicCache()
            model(ids, **{CACHE: cache})
            for step in range(16):
                kept = move(model) if step == 8 else None
                seen.append(model(ids[:, step : step + 1], **{CACHE: cache}).logits)
                del kept
                if never is None and step in (7, 15):
                    assert graphs(model).why is None
        found.append(torch.cat(seen))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_graph_reads_the_heads_that_it_was_recorded_with():
    """However many other plans were made, run and forgotten since."""
    model, other = (fresh("qwen2").to(DEVICE) for _ in range(2))
    ids, found = left_padded(300, (0,))[0].to(DEVICE), []
    for busy in (False, True):
        with hfsparse.patch(model, choosing(model)):
            cache, seen = DynamicCache(), []
            model(ids, **{CACHE: cache})
            for step in range(14):
                if busy and step == 7:
                    for plan in (mixed, choosing, streaming) * 4:
                        with hfsparse.patch(other, plan(other)):
                            generate(other, ids[:, :90], new=6)
                    gc.collect()
                    unused = [torch.full((9,), 5, device=DEVICE) for _ in range(4096)]
                    del unused
                seen.append(model(ids[:, step : step + 1], **{CACHE: cache}).logits)
            assert graphs(model).why is None
        found.append(torch.cat(seen))
    assert torch.equal(*found)


@pytest.mark.parametrize("fuse", [False, True])
def test_graphs_come_and_go_and_leave_no_memory_reserved(fuse):
    model, (ids, mask) = fresh("llama").to(DEVICE), inputs(64)
    with hfsparse.patch(model, mixed(model), fuse=fuse):
        held = []
        for _ in range(100):
            generate(model, ids, mask, new=8)
            assert graphs(model).why is None
            gc.collect()
            held.append(torch.cuda.memory_reserved())
    assert max(held) <= held[0] + (4 << 20)


def test_patches_come_and_go_and_leave_no_memory_reserved():
    model, (ids, mask), held = fresh("llama").to(DEVICE), inputs(64), []
    for _ in range(30):
        with hfsparse.patch(model, mixed(model)):
            generate(model, ids, mask, new=8)
        gc.collect()
        held.append(torch.cuda.memory_reserved())
    assert max(held) <= held[0] + (4 << 20)


def test_two_models_replay_in_turn_in_the_memory_that_they_share():
    made = [
        (fresh(family).to(DEVICE), plan) for family, plan in (("llama", mixed), ("qwen3", full))
    ]
    (ids, mask), want = inputs(120), []
    for model, plan in made:
        want.append(said(model, plan, ids, mask, replay=False, new=30)[0])
    for model, plan in made:
        hfsparse.patch(model, plan(model))

    def run(model) -> list:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                said = generate(model, ids, mask, new=30).sequences.tolist()
        return said

    torch.cuda.synchronize()
    got = worlds.at_once(*(partial(run, model) for model, _ in made))
    assert got == want


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", [full, mixed])
def test_every_graph_is_checked_bit_for_bit(monkeypatch, plan, dtype, fuse):
    """A replay gives the bits of the same step run live: no rounding is asked for, in no dtype."""
    model, (ids, mask) = fresh("llama").to(DEVICE, dtype), inputs(200, (0, 9))
    monkeypatch.setattr("hfsparse.runtime.graphs.NOISE", -1)
    with hfsparse.patch(model, plan(model), fuse=fuse):
        for _ in range(2):
            cache = DynamicCache()
            generate(model, ids, mask, cache=cache, new=8)
            assert graphs(model).why is None
            assert graphs(model).kept[cache.layers[0]][1].graph.settings is not None


def test_one_wrong_page_of_one_head_is_seen(monkeypatch):
    """Also in bfloat16, where it is far below the dtype's rounding of a whole layer."""
    model, (ids, mask) = fresh("llama").to(DEVICE, torch.bfloat16), inputs(2000)
    replay = Graph.replay

    def wrong(self, *given):
        store, _ = self.places[-1]
        first, second = (store.k[:1, :1, at : at + PAGE].clone() for at in (0, PAGE))
        store.k[:1, :1, :PAGE] = second
        try:
            return replay(self, *given)
        finally:
            store.k[:1, :1, :PAGE] = first

    with hfsparse.patch(model, full(model)):
        want = generate(model, ids, mask, new=8)
        assert graphs(model).why is None
    with hfsparse.patch(model, full(model)):
        monkeypatch.setattr(Graph, "replay", wrong)
        got = generate(model, ids, mask, new=8)
        assert "gives something else than eagerly" in graphs(model).why
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))


@torch.no_grad()
@pytest.mark.parametrize("what", ["scale", "adapter"])
def test_numbers_that_change_between_the_steps_of_a_cache_are_seen(what):
    ids, _ = inputs(80)

    def run(eager: bool) -> torch.Tensor:
        model = fresh("llama")
        attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
        mlp.up_proj = Scaled(mlp.up_proj)
        model = model.to(DEVICE)
        with hfsparse.patch(model, streaming(model)):
            graphs(model).never = "this test wants it eager" if eager else None
            act = {
                "scale": lambda: setattr(attention, "scaling", attention.scaling * 2),
                "adapter": lambda: mlp.up_proj.scaling.update(a=3.0),
            }[what]
            logits = by_steps(model, ids, 14, act, at=7)
            assert eager or graphs(model).why is None
        return logits

    assert torch.equal(run(eager=False), run(eager=True))


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
