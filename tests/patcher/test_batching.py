"""Continuous batching: each request gets the tokens that it gets alone, under the same plan."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import GenerationConfig

import hfsparse
from hfsparse.errors import PatchError, UsageError
from hfsparse.patcher import batching
from hfsparse.patcher.state import state_of
from tests.patcher.families import (
    choosing,
    corrected,
    evicting,
    fresh,
    full,
    growing,
    heads,
    mixed,
    packing,
    plan_of,
    straddled,
    streaming,
    tiny,
    tokens,
)

known = pytest.mark.skipif(not batching.KNOWN, reason=f"transformers is before {batching.OLDEST}")
LENGTHS = 230, 17, 64, 129
NEW = 6
PLANS = {
    "mixed": mixed,
    "growing": growing,
    "straddled": straddled,  # thresholds that rows cross while they grow
    "means": corrected,
    "full": full,
}


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """Managers collect garbage when they end, which takes longer than a tiny model's answers."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def settings(**more):
    named = {"page_size": 64, "num_blocks": 80, "max_batch_tokens": 1024, **more}
    if not hasattr(transformers.ContinuousBatchingConfig(), "page_size"):
        named["block_size"] = named.pop("page_size")
    return transformers.ContinuousBatchingConfig(**named)


def prompts(*lengths: int) -> list[list[int]]:
    return [tokens(1, n, seed=n)[0].tolist() for n in lengths]


def alone(model, prompt: list[int], **more) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **more
    )
    return out[0, len(prompt) :].tolist()


def greedy(**more) -> GenerationConfig:
    made = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    for name, value in more.items():  # greedy answers are alike: several are refused at first
        setattr(made, name, value)
    return made


def together(model, asked: list[list[int]], generation=None, **more) -> list[list[int]]:
    out = model.generate_batch(
        asked,
        generation_config=generation or greedy(),
        continuous_batching_config=settings(**more),
    )
    assert not {each.error for each in out.values()} - {None}
    return [each.generated_tokens for each in out.values()]


@contextmanager
def serving(model, **more):
    with model.continuous_batching_context_manager(
        generation_config=greedy(), continuous_batching_config=settings(**more)
    ) as manager:
        yield manager


def results(manager, count: int) -> dict:
    found = (manager.get_result(timeout=20) for _ in range(count))
    return {each.request_id: each for each in found}


def work(handle) -> int:
    """Pairs of a dense prompt, of what was read since the last reset."""
    return sum(sum(layer.pairs.dense) for layer in handle.stats().layers)


@known
@pytest.mark.parametrize(
    ("plan", "tables"), [(plan, i % 2 * 8) for i, plan in enumerate((*PLANS, "mixed"))]
)
def test_requests_get_what_they_get_alone(plan, tables):
    """Steps beside prompts, by the places of all tokens, and by themselves, by tables of blocks."""
    model, asked = tiny("llama"), prompts(*LENGTHS)
    with hfsparse.patch(model, PLANS[plan](model)) as handle:
        want = [alone(model, prompt) for prompt in asked]
        read = handle.stats().decode_share
        handle.reset_stats()
        assert together(model, asked, max_blocks_per_request=tables) == want
        assert handle.stats().decode_share == pytest.approx(read)


@known
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_every_ratio_of_heads_gets_what_it_gets_alone(family):
    model, asked = tiny(family), prompts(150)
    with hfsparse.patch(model, mixed(model)):
        assert together(model, asked) == [alone(model, prompt) for prompt in asked]


SELECTORS = {
    "units": ("quest", dict(share=0.1, min_pages=2, unit=16, bound=8)),
    "top_p": ("quest", dict(share=0.5, min_pages=2, top_p=0.6)),
    "landmarks": ("landmarks", dict(share=0.1, min_pages=2)),
    "centroids": ("centroids", dict(share=0.1, min_pages=2, segment=64)),
}


@known
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_that_know_pages_by_themselves_choose_what_they_choose_alone(name):
    model, asked = tiny("llama"), prompts(190, 300)
    Hq, Hkv = heads(model)

    def layer(index, windowed):
        return ["full"] * Hq, ["full"] * Hkv, ["again" if index else "chosen"] * Hkv

    named = {"chosen": SELECTORS[name], "again": ("reuse", {})}
    with hfsparse.patch(model, plan_of(model, layer, **named)):
        assert together(model, asked) == [alone(model, prompt) for prompt in asked]


@known
def test_chunks_are_read_as_generates_own():
    """Whether a row is short is the whole prompt's to say."""
    model = tiny("llama")
    with hfsparse.patch(model, mixed(model, below=(140, 133, 129))):
        for prompt in prompts(130, 255):
            want = alone(model, prompt, prefill_chunk_size=64)
            assert together(model, [prompt], max_batch_tokens=64) == [want]


@known
def test_chunks_beside_steps_change_nothing_where_positions_decide():
    model, asked = tiny("llama"), prompts(*LENGTHS)
    with hfsparse.patch(model, streaming(model)):
        want = [alone(model, prompt) for prompt in asked]
        assert together(model, asked, max_batch_tokens=50) == want


@known
def test_answers_that_share_a_prompt_are_those_of_the_prompt():
    """Its last token, which each reads anew, is the prompt's, not a step."""
    model, asked = tiny("llama"), prompts(129, 200)
    with hfsparse.patch(model, mixed(model)):
        want = [alone(model, prompt) for prompt in asked]
        more = dict(page_size=256, num_blocks=20, max_blocks_per_request=2)
        got = together(model, asked, greedy(num_return_sequences=3), **more)
        times = len(got) // 2  # before 5.24 the others are dropped from what it returns
        assert got == [answer for answer in want for _ in range(times)]


@known
def test_a_prefix_that_another_request_has_read_is_not_read_again():
    model, (base,) = tiny("llama"), prompts(256)
    asked = [[*base, 5, 6, 7], base + [9] * 40, base[:192] + [3] * 9, base]
    with hfsparse.patch(model, streaming(model)) as handle:
        want = [alone(model, prompt) for prompt in asked]
        handle.reset_stats()
        alone(model, asked[0])
        whole = work(handle)
        with serving(model) as manager:
            for prompt, answer in zip(asked, want, strict=True):
                manager.add_request(prompt)
                (got,) = results(manager, 1).values()
                assert got.generated_tokens == answer
            handle.reset_stats()
            manager.add_request(asked[0])
            results(manager, 1)
            assert work(handle) < whole / 10


@known
def test_requests_join_late_are_cancelled_and_fail_by_themselves():
    model, asked = tiny("llama"), prompts(200, 90, 150)
    with hfsparse.patch(model, mixed(model)):
        want = [alone(model, prompt) for prompt in asked]
        with serving(model) as manager:
            manager.add_request(asked[0], "first")
            manager.add_request(asked[2], "cancelled", max_new_tokens=200)
            manager.add_request(asked[1], "wrong", temperature="warm")
            manager.cancel_request("cancelled")
            with pytest.raises(UsageError, match="no tokens"):
                manager.add_request([], "empty")
            while manager.batch_processor is None:
                pass
            manager.add_request(asked[1], "late")
            found = results(manager, 3)
        assert found["first"].generated_tokens == want[0]
        assert found["late"].generated_tokens == want[1]
        assert "temperature" in found["wrong"].error


@known
def test_undo_ends_a_manager_and_gives_the_model_back():
    model, asked = fresh("llama"), prompts(60)
    before = together(model, asked)
    handle = hfsparse.patch(model, mixed(model))
    together(model, asked)
    manager = model.init_continuous_batching(greedy(), settings())
    manager.start()
    manager.add_request(asked[0], max_new_tokens=4000)
    handle.undo()
    assert not manager.is_running()
    assert "init_continuous_batching" not in vars(model)
    assert together(model, asked) == before


@known
def test_a_manager_from_before_the_patch_is_refused():
    model = fresh("llama")
    model.generate_batch(
        prompts(20),
        generation_config=greedy(),
        continuous_batching_config=settings(),
        persistent_manager=True,
    )
    with hfsparse.patch(model, mixed(model)):
        with pytest.raises(PatchError, match=r"destroy_cached_continuous_batching_manager\(\)"):
            together(model, prompts(20))
        model.destroy_cached_continuous_batching_manager()
        assert together(model, prompts(20)) == [alone(model, *prompts(20))]


REFUSED = {
    "evicts keys": evicting,
    "fewer bits": packing,
    "refresh": choosing,
    "makes its index of many pages": lambda model: plan_of(
        model,
        lambda index, windowed: (["full"] * 4, ["full"] * 2, ["c"] * 2),
        c=("centroids", dict(segment=1024)),
    ),
}


@known
@pytest.mark.parametrize("why", REFUSED)
def test_plans_that_the_paged_cache_cant_follow_are_refused(why):
    model, said = tiny("llama"), rf"can't follow this plan: .*{why}.*model\.generate"
    with hfsparse.patch(model, REFUSED[why](model)), pytest.raises(PatchError, match=said):
        together(model, prompts(9))


@known
def test_windows_exact_mode_and_settings_are_refused():
    model = tiny("gemma3")
    with hfsparse.patch(model), pytest.raises(PatchError, match="a window or chunks of its own"):
        together(model, prompts(9))
    model = tiny("llama")
    exact = hfsparse.patch(model, mixed(model), exact=True)
    with exact, pytest.raises(PatchError, match="exact=True drafts"):
        together(model, prompts(9))
    with hfsparse.patch(model, mixed(model)):
        for more, why in (
            (dict(page_size=32), "multiple of 64"),
            (dict(cpu_offload_space=1.0), "leave it 0"),
            (dict(use_async_batching=True), "leave use_async_batching out"),
        ):
            with pytest.raises(PatchError, match=f"can't be followed: .*{why}"):
                together(model, prompts(9), **more)


@known
def test_a_call_waits_for_its_inputs(monkeypatch):
    """They are written on another stream than it runs on; tests/gpu has the streams."""
    order = []
    inputs = SimpleNamespace(synchronize=lambda: order.append("inputs"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: inputs)
    stream = SimpleNamespace(device=torch.device("cpu"))
    for held in (stream, None):  # None: on a CPU
        batching._compute(lambda: order.append("call"), SimpleNamespace(compute_stream=held))
    assert order == ["inputs", "call", "call"]


@known
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["a text"], "prompts hold 'a text'"),
        ([1, 2], "prompts hold 1"),
        (3, "prompts hold 3"),
        (torch.ones(1, 4, dtype=torch.long), "prompts hold a Tensor"),
        ([[1], []], "prompts hold a list"),
        ([[1, 10**6]], "makes token 1000000 of this text"),
    ],
)
def test_what_are_no_prompts_is_refused_before_anything_runs(given, told):
    model = tiny("llama")
    with hfsparse.patch(model), pytest.raises(UsageError, match=told):
        model.generate_batch(given)


def test_older_versions_are_refused(monkeypatch):
    monkeypatch.setattr(batching, "KNOWN", False)
    model = tiny("llama")
    with hfsparse.patch(model, mixed(model)):
        assert "it needs transformers 5.17.0 or newer" in batching.why_not(state_of(model))
        for name in ("generate_batch", "init_continuous_batching"):
            if hasattr(type(model), name):
                with pytest.raises(PatchError, match=r"can't follow this plan.*model\.generate"):
                    getattr(model, name)([[1, 2, 3]])
