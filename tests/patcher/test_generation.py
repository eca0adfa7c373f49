"""Ways of generating that reorder, repeat, copy or take back cached rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig

import hfsparse
from hfsparse.patcher.generation import NUMBERED
from hfsparse.runtime.cache.full import Full
from hfsparse.runtime.cache.ring import SLACK
from tests.patcher.families import (
    SCALED,
    SIZES,
    growing,
    left_padded,
    mixed,
    rotated,
    streaming,
    tiny,
    tokens,
)
from tests.patcher.oracle import CACHE
from tests.patcher.runs import both, close, forward, generate, same_generation

PLANS = {"streaming": streaming, "growing": growing, "mixed": mixed}
every_plan = pytest.mark.parametrize("plan", PLANS)


@every_plan
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beam_search_equals_the_oracle(family, plan):
    model = tiny(family)
    ids, mask = left_padded(230)
    got, want, _ = both(
        model, PLANS[plan](model), lambda m, cache: generate(m, ids, mask, num_beams=3, **cache)
    )
    assert got.sequences.tolist() == want.sequences.tolist()
    assert len(set(got.beam_indices.flatten().tolist())) > 3  # beams really changed places
    close(torch.stack(got.logits, 1), torch.stack(want.logits, 1))


@every_plan
def test_several_returned_sequences_equal_the_oracle(plan):
    model = tiny("llama")
    ids, mask = left_padded(230)
    got, want, _ = both(
        model,
        PLANS[plan](model),
        lambda m, cache: generate(m, ids, mask, do_sample=True, num_return_sequences=3, **cache),
    )
    assert len(got.sequences) == 9
    same_generation(got, want)


@pytest.mark.parametrize("plan", ["streaming", "growing"])
def test_prompt_lookup_takes_tokens_back_and_equals_greedy(plan):
    model = tiny("llama")
    ids = tokens(1, 20).repeat(1, 4)
    with hfsparse.patch(model, PLANS[plan](model)):
        want = generate(model, ids, new=40, eos_token_id=1)
        got = generate(model, ids, new=40, eos_token_id=1, prompt_lookup_num_tokens=5)
    assert want.sequences.shape[1] > 80 + SLACK // 2
    kept = got.sequences[:, : want.sequences.shape[1]]  # transformers 5.0 overshoots by a candidate
    assert kept.tolist() == want.sequences.tolist()


def test_taking_back_more_than_a_ring_keeps_is_an_error():
    model = tiny("llama")
    with hfsparse.patch(model, streaming(model)):
        cache = forward(model, tokens(1, 100)).past_key_values
        with pytest.raises(ValueError, match="a ring keeps 32 tokens beyond its window"):
            cache.crop(-60)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="5.0 leaves the cache to forward"
)
def test_generate_reserves_room_for_the_whole_answer(monkeypatch):
    """A full head's buffer is made once, with the prompt."""
    model, grown = tiny("llama"), []
    grow = Full._grow
    monkeypatch.setattr(Full, "_grow", lambda s, n: (grown.append(s.group.heads), grow(s, n)))
    with hfsparse.patch(model, streaming(model)):
        generate(model, tokens(1, 60), new=80)
    assert len(grown) == 3  # layers


def test_embeddings_as_input_equal_tokens():
    model, ids = tiny("llama"), tokens(1, 90)
    with hfsparse.patch(model, streaming(model)):
        want = generate(model, ids)
        torch.manual_seed(0)
        got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=12)
    assert got.tolist() == want.sequences[:, 90:].tolist()


def test_threads_share_a_patched_model():
    model = tiny("llama")
    prompts = [tokens(1, 60 + 7 * n, seed=n) for n in range(4)]
    with hfsparse.patch(model, mixed(model)):
        want = [generate(model, ids).sequences.tolist() for ids in prompts]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda ids: generate(model, ids).sequences.tolist(), prompts))
    assert got == want


def checkpointing(model, on):
    """5.24 renamed gradient to activation checkpointing."""
    new = hasattr(model, "activation_checkpointing_enable")
    kind = "activation" if new else "gradient"
    getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")()


def test_training_gradients_equal_the_oracles():
    """With the default cache, without one, and with gradient checkpointing."""
    model, ids = tiny("llama"), tokens(2, 260)

    def gradients(m, cache):
        m.zero_grad(set_to_none=True)
        m(ids, labels=ids, **cache).loss.backward()
        return torch.cat([p.grad.flatten() for p in m.parameters()])

    try:
        got, want, _ = both(model, mixed(model), gradients)
        assert want.abs().max() > 1e-3
        close(got, want)
        with hfsparse.patch(model, mixed(model)):
            close(gradients(model, {"use_cache": False}), want)
            model.train()
            checkpointing(model, True)
            close(gradients(model, {}), want)
    finally:
        checkpointing(model, False)
        model.eval().zero_grad(set_to_none=True)


def test_generation_steps_with_gradients_on_give_the_same_logits():
    model, ids = tiny("llama"), tokens(1, 260)
    with hfsparse.patch(model, mixed(model)):
        with torch.no_grad():
            first = model(ids)
            want = model(ids[:, :1], **{CACHE: first.past_key_values}).logits
        first = model(ids)
        got = model(ids[:, :1], **{CACHE: first.past_key_values}).logits
    close(got.detach(), want)


def test_attention_dropout_is_refused():
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.attention_dropout = 0.1
    try:
        with hfsparse.patch(model):
            model.train()
            with pytest.raises(ValueError, match=r"dropout is 0\.1.*call model\.eval"):
                model(tokens(1, 9))
    finally:
        model.eval()
        attention.attention_dropout = 0.0


def test_very_long_prompts_come_in_chunks_unless_told_otherwise(monkeypatch):
    model, seen = tiny("llama"), []
    monkeypatch.setattr("hfsparse.patcher.generation.LONG", 200)
    monkeypatch.setattr("hfsparse.patcher.generation.CHUNK", 64)
    with hfsparse.patch(model, streaming(model)):
        hook = model.model.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            for length, more in ((200, {}), (210, {}), (210, {"prefill_chunk_size": 150})):
                said = generate(model, tokens(1, length), new=2, **more)
            longer = torch.cat([said.sequences, tokens(1, 30)], 1)  # one more turn comes whole
            generate(model, longer, cache=said[CACHE], new=1)
        finally:
            hook.remove()
    assert seen == [200, 1, 64, 64, 64, 18, 1, 150, 60, 1, 31]


def calls(model) -> list[int]:
    """Tokens of each call of the text decoder from now on."""
    seen: list[int] = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
@pytest.mark.parametrize("rope", SCALED)
def test_very_long_prompts_are_read_in_chunks_only_where_one_call_says_the_same(
    rope, padded, monkeypatch
):
    ids, mask = left_padded(210) if padded else (tokens(2, 210), None)
    want = generate(rotated(rope), ids, mask)
    monkeypatch.setattr("hfsparse.patcher.generation.LONG", 200)
    monkeypatch.setattr("hfsparse.patcher.generation.CHUNK", 64)
    model = rotated(rope)  # dynamic rope remembers the longest call
    seen = calls(model)
    with hfsparse.patch(model) as handle:
        same_generation(generate(model, ids, mask), want)
        told = handle.explain()
    alike = rope not in ("dynamic", "longrope")
    assert (max(seen) <= 64) == (alike and (NUMBERED or not padded))
    assert f"in generate: {'in chunks' if alike else f'in one call (rope {rope} may'}" in told
    assert model.generation_config.prefill_chunk_size is None


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "LinearAttentionLayer"), reason="refused there"
)
def test_a_very_long_prompt_of_a_hybrid_is_read_in_one_call(monkeypatch):
    """Jamba's mamba layers forget at a chunk's end what came before it."""
    torch.manual_seed(0)
    more = dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)
    sizes = dict(SIZES, num_attention_heads=4, num_key_value_heads=2, **more)
    config = transformers.JambaConfig(**{n: x for n, x in sizes.items() if n != "head_dim"})
    model, ids = transformers.JambaForCausalLM(config).eval(), tokens(1, 210)
    want = generate(model, ids)
    monkeypatch.setattr("hfsparse.patcher.generation.LONG", 200)
    monkeypatch.setattr("hfsparse.patcher.generation.CHUNK", 64)
    with hfsparse.patch(model) as handle:
        same_generation(generate(model, ids), want)
        assert "in generate: in one call (its linear layers may" in handle.explain()


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_chunks_that_are_asked_for_are_those_of_the_stock_model(rope):
    run = partial(generate, ids=tokens(2, 210), prefill_chunk_size=64)
    want = run(rotated(rope), cache=DynamicCache())
    with hfsparse.patch(model := rotated(rope)):
        same_generation(run(model, cache=DynamicCache()), want)
    assert model.generation_config.prefill_chunk_size is None


def test_a_settings_object_of_the_callers_own_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr("hfsparse.patcher.generation.LONG", 200)
    model, own = rotated("default"), GenerationConfig(max_new_tokens=2, do_sample=False)
    before, theirs = own.to_dict(), model.generation_config.to_dict()
    with hfsparse.patch(model):
        model.generate(tokens(1, 210), generation_config=own)
    assert (own.to_dict(), model.generation_config.to_dict()) == (before, theirs)


def test_hidden_states_that_are_asked_for_are_those_of_the_whole_prompt(monkeypatch):
    monkeypatch.setattr("hfsparse.patcher.generation.LONG", 200)
    monkeypatch.setattr("hfsparse.patcher.generation.CHUNK", 64)
    model = rotated("default")
    with hfsparse.patch(model):
        said = generate(model, tokens(1, 210), output_hidden_states=True)
    assert said.hidden_states[0][-1].shape[1] == 210


@pytest.mark.skipif(NUMBERED, reason="chunks keep positions of one's own")
def test_positions_of_ones_own_are_kept(monkeypatch):
    ids, own = tokens(1, 210), torch.arange(0, 420, 2)[None]
    want = generate(rotated("default"), ids, position_ids=own, new=1)
    monkeypatch.setattr("hfsparse.patcher.generation.LONG", 200)
    with hfsparse.patch(model := rotated("default")):
        same_generation(generate(model, ids, position_ids=own, new=1), want)
