"""Exact mode: whatever a plan drafts, `generate` gives the dense model's tokens."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hfsparse
from hfsparse.errors import CacheError, PatchError
from hfsparse.lists import FULL
from hfsparse.patcher.choosing import Choosing
from hfsparse.runtime.call import drafting
from tests import hybrids
from tests.patcher import families
from tests.patcher.families import fresh, left_padded, plan_of, tiny, tokens
from tests.patcher.oracle import CACHE
from tests.patcher.runs import close, forward, generate, same_generation

GREEDY: dict = {}
SAMPLED = dict(do_sample=True)
WARPED = dict(do_sample=True, temperature=0.5, top_k=20, repetition_penalty=1.3)


def knowing(model):
    """A plan whose drafts are what the model says: its pages are all pages."""
    q, kv = families.heads(model)
    return plan_of(
        model,
        lambda index, windowed: (["full"] * q, ["full"] * kv, ["every"] * kv),
        every=("quest", dict(share=1.0)),
    )


def some_pages(model):
    """The same of one page besides the first and the newest ones."""
    q, kv = families.heads(model)
    words = [f"{'full' if windowed else 'some'}" for windowed in families.own_window(model)]
    return plan_of(
        model,
        lambda index, windowed: (["full"] * q, ["full"] * kv, [words[index]] * kv),
        some=families.QUEST,
    )


def of_cache(out):
    return getattr(out, CACHE)


@pytest.mark.parametrize(
    ("family", "plan", "rows", "chosen"),
    [
        ("llama", families.mixed, "alone", GREEDY),
        ("llama", families.mixed, "padded", WARPED),
        ("llama", families.growing, "alone", SAMPLED),
        ("llama", families.choosing, "padded", GREEDY),
        ("qwen2", families.straddled, "padded", WARPED),
        ("gemma3", some_pages, "alone", SAMPLED),
        ("gemma3", some_pages, "padded", GREEDY),
        ("qwen3", families.corrected, "alone", WARPED),
    ],
)
def test_tokens_and_logits_are_the_dense_models(family, plan, rows, chosen):
    """Of sampling, too: a seed gives the same tokens, so their distribution is the same."""
    model = tiny(family)
    ids, mask = (tokens(1, 260), None) if rows == "alone" else left_padded(260)
    want = generate(model, ids, mask, **chosen)
    with hfsparse.patch(model, plan(model), exact=True) as handle:
        got = generate(model, ids, mask, **chosen)
        drafts = handle.stats().drafts
    same_generation(got, want)
    assert of_cache(got).get_seq_length() == of_cache(want).get_seq_length()
    assert drafts.steps > 0
    assert drafts.accepted < drafts.drafted
    if rows == "alone":
        for ours, stock in zip(of_cache(got).layers, of_cache(want).layers, strict=True):
            if not stock.is_sliding:
                close(ours.keys, stock.keys), close(ours.values, stock.values)


@pytest.mark.parametrize("chosen", [GREEDY, WARPED], ids=["greedy", "warped"])
def test_drafts_that_are_right_are_taken_and_become_longer(chosen):
    """Sampled ones are drawn with the numbers that `generate` draws with."""
    model, ids, calls = fresh("llama"), tokens(1, 150), []
    want = generate(model, ids, new=30, **chosen)
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, given: calls.append(given[0].shape[1])
    )
    with hfsparse.patch(model, knowing(model), exact=True) as handle:
        same_generation(generate(model, ids, new=30, **chosen), want)
        drafts = handle.stats().drafts
    assert calls == [150, *[1] * 3, 4, *[*[1] * 7, 8] * 3, 1]
    assert (drafts.steps, drafts.drafted, drafts.accepted, drafts.acceptance) == (4, 24, 24, 1)


def test_drafts_that_are_wrong_become_shorter_and_pause():
    """So that a plan which says nothing of the model costs little."""
    model, ids, calls = fresh("llama"), tokens(1, 150), []
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, given: calls.append(given[0].shape[1])
    )
    with pytest.MonkeyPatch.context() as patch, hfsparse.patch(model, knowing(model), exact=True):
        choose = Choosing.choose
        patch.setattr(Choosing, "choose", lambda *given: (choose(*given) + 1) % families.VOCAB)
        generate(model, ids, new=14)
    assert calls == [150, *[1] * 3, 4, 1, 2, *[1] * 8, 1, 2, 1, 1]


def test_a_draft_reads_nothing_between_the_pages_of_a_rings_sink_and_of_its_window():
    model, ids, cache = fresh("llama"), tokens(1, 260), DynamicCache()
    with hfsparse.patch(model, families.streaming(model), exact=True):
        forward(model, ids, cache=cache)
        rings = [s for layer in cache.layers for s in layer.stores if s.group.reads != FULL]
        assert len(rings) == families.LAYERS
        for store in rings:
            store.k[:, :, 64:256] = store.v[:, :, 64:256] = torch.nan
        with drafting():
            assert forward(model, ids[:, :1], cache=cache).logits.isfinite().all()
        cache.crop(-1)
        assert forward(model, ids[:, :1], cache=cache).logits.isnan().any()


@pytest.mark.parametrize("seed", range(4))
def test_a_seed_gives_what_it_gives_the_dense_model(seed):
    model, ids = tiny("llama"), tokens(2, 140, seed=seed)
    want = generate(model, ids, new=10, seed=seed, do_sample=True, top_p=0.9)
    state = torch.get_rng_state()
    with hfsparse.patch(model, families.mixed(model), exact=True):
        got = generate(model, ids, new=10, seed=seed, do_sample=True, top_p=0.9)
    assert got.sequences.tolist() == want.sequences.tolist()
    assert torch.equal(torch.get_rng_state(), state)


class Watching(BaseStreamer):
    def __init__(self):
        self.said = []

    def put(self, value):
        self.said.append(value.tolist())

    def end(self):
        self.said.append("end")


class Until(StoppingCriteria):
    """Stops once a token was said."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("ends", ["eos", "criteria", "length"])
def test_what_ends_inside_an_accepted_draft_ends_there(ends):
    """What was drafted beyond is neither said nor held."""
    model, ids, found = tiny("llama"), tokens(1, 150), []
    last = int(generate(model, ids, new=8).sequences[0, -1])
    ways = {
        "eos": lambda: dict(eos_token_id=last, new=30),
        "criteria": lambda: dict(stopping_criteria=[Until(last)], new=30),
        "length": lambda: dict(new=8),
    }
    for exact in (False, True):
        streamer, handle = Watching(), None
        if exact:
            handle = hfsparse.patch(model, knowing(model), exact=True)
        out = generate(model, ids, streamer=streamer, **ways[ends]())
        found.append((out.sequences.tolist(), streamer.said, of_cache(out).get_seq_length()))
        if handle is not None:
            handle.undo()
    assert found[0] == found[1]


def test_rows_that_have_ended_do_not_hold_back_the_others():
    model, ids = tiny("llama"), tokens(2, 150)
    first, second = generate(model, ids, new=20).sequences[:, 150:].tolist()
    eos = next(token for token in second[:10] if token not in first)
    want = generate(model, ids, new=20, eos_token_id=eos)
    assert want.sequences[1, -1] == 0
    with hfsparse.patch(model, knowing(model), exact=True) as handle:
        got = generate(model, ids, new=20, eos_token_id=eos)
        assert handle.stats().drafts.acceptance > 0.5
    assert got.sequences.tolist() == want.sequences.tolist()


def test_a_cache_goes_on_in_a_second_turn_and_in_calls_of_ones_own():
    model, ids, found = fresh("llama"), tokens(1, 150), []
    for exact in (False, True):
        handle = hfsparse.patch(model, families.mixed(model), exact=True) if exact else None
        first = generate(model, ids, new=9)
        cache = of_cache(first)
        more = torch.cat([first.sequences, tokens(1, 20, seed=1)], 1)
        second = generate(model, more, cache=cache, new=9)
        step = second.sequences[:, -1:]
        by_hand = forward(model, step, torch.ones(1, more.shape[1] + 9).long(), cache)
        found.append((second.sequences.tolist(), by_hand.logits, copy.deepcopy(cache)))
        if handle is not None:
            handle.undo()
    assert found[0][0] == found[1][0]
    close(found[1][1], found[0][1])
    assert found[0][2].get_seq_length() == found[1][2].get_seq_length()


@pytest.mark.parametrize(
    "way",
    [
        dict(num_beams=3),
        dict(do_sample=True, num_return_sequences=3),
        dict(prompt_lookup_num_tokens=4, eos_token_id=3),  # 4.57 asks for one
        dict(prefill_chunk_size=64, cache_implementation="dynamic"),  # 5.0 has to be told
        dict(output_hidden_states=True),
        dict(use_cache=False),
        dict(guidance_scale=1.5),
    ],
    ids=str,
)
def test_every_way_of_generate_gives_the_dense_models_tokens(way):
    model, ids = tiny("llama"), tokens(1, 150)
    want = generate(model, ids, **way)
    with hfsparse.patch(model, families.mixed(model), exact=True):
        got = generate(model, ids, **way)
    assert got.sequences.tolist() == want.sequences.tolist()
    if states := way.get("output_hidden_states") and got.hidden_states:
        assert [len(step) for step in states] == [len(step) for step in want.hidden_states]
        assert [step[-1].shape for step in states] == [s[-1].shape for s in want.hidden_states]


def test_a_saved_cache_goes_on_in_exact_mode_alone(tmp_path):
    model, ids = tiny("llama"), tokens(1, 150)
    want = generate(model, ids, new=8).sequences.tolist()
    with hfsparse.patch(model, families.mixed(model), exact=True) as handle:
        handle.save(of_cache(generate(model, ids[:, :140], new=1)), tmp_path / "cache")
        cache = handle.load(tmp_path / "cache")
        assert generate(model, ids, cache=cache, new=8).sequences.tolist() == want
    told = pytest.raises(CacheError, match=r"was saved with plan .*, exact, and here it is")
    with hfsparse.patch(model, families.mixed(model)) as handle, told:
        handle.load(tmp_path / "cache")


def test_an_assistant_drafts_alone():
    model, ids = fresh("llama"), tokens(1, 150)
    want = generate(model, ids).sequences.tolist()
    with hfsparse.patch(model, families.mixed(model), exact=True) as handle:
        got = generate(model, ids, assistant_model=tiny("llama"))
        assert got.sequences.tolist() == want
        assert not handle.stats().drafts.steps


def test_a_processor_of_ones_own_sees_each_token_once():
    """It may keep count: drafts don't ask it."""

    class Counting(LogitsProcessor):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores):
            self.seen.append(input_ids.shape[1])
            return scores.roll(len(self.seen), -1)

    model, ids, found = tiny("llama"), tokens(1, 150), []
    for exact in (False, True):
        handle = hfsparse.patch(model, knowing(model), exact=True) if exact else None
        counting = Counting()
        found.append(
            (generate(model, ids, logits_processor=[counting]).sequences.tolist(), counting.seen)
        )
        if handle is not None:
            handle.undo()
    assert found[0] == found[1]


def test_a_draft_that_is_interrupted_leaves_the_cache_as_it_was():
    model, ids, calls = fresh("llama"), tokens(1, 150), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt

    want = generate(model, ids, new=6).sequences
    with hfsparse.patch(model, knowing(model), exact=True):
        cache = of_cache(generate(model, ids, new=1))
        model.model.layers[-1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            generate(model, want[:, :152], cache=cache, new=9)
        assert cache.get_seq_length() == 152
        assert (
            generate(model, want[:, :153], cache=cache, new=3).sequences.tolist() == want.tolist()
        )


def test_the_model_is_given_back_and_copies_go_on():
    model, ids = fresh("llama"), tokens(1, 150)
    want, before = generate(model, ids).sequences.tolist(), dict(vars(model))
    with hfsparse.patch(model, families.mixed(model), exact=True):
        assert "forward" in vars(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert generate(other, ids).sequences.tolist() == want
            hfsparse.unpatch(other)
    assert {k: v for k, v in vars(model).items() if k != "config"}.keys() == before.keys() - {
        "config"
    }
    model.forward = forward_of_hooks = model.forward  # as accelerate leaves one
    hfsparse.patch(model, families.mixed(model), exact=True).undo()
    assert vars(model)["forward"] == forward_of_hooks


def test_stats_and_explain_say_what_happened():
    model, ids = tiny("llama"), tokens(1, 260)
    with hfsparse.patch(model, families.mixed(model), exact=True) as handle:
        assert "exact: " in handle.explain()
        generate(model, ids)
        stats = handle.stats()
        assert f"({stats.drafts.accepted} of {stats.drafts.drafted} tokens" in str(stats)
        assert stats.pair_density == 1
        assert stats.cache_share > 1 > stats.decode_share
        handle.reset_stats()
        assert handle.stats().drafts.drafted == 0
    with hfsparse.patch(model, families.mixed(model)) as handle:
        assert handle.stats().drafts is None
        assert "exact: " not in handle.explain()


def hybrid(family: str):
    if not hybrids.known(family):
        pytest.skip("this transformers keeps its states elsewhere")
    return hybrids.hybrid(family)


def keeping(model, **word):
    q, kv = families.heads(model)
    return plan_of(
        model,
        lambda index, windowed: (["full"] * q, ["keeps"] * kv, ["every"] * kv),
        keeps=("full", word),
        every=families.QUEST,
    )


@pytest.mark.parametrize(
    ("model", "plan", "why"),
    [
        (lambda: tiny("llama"), lambda model: None, "read every key"),
        (lambda: tiny("llama"), families.evicting, "evicts keys"),
        (lambda: tiny("llama"), partial(keeping, bits=8), "fewer bits"),
        (lambda: tiny("llama"), partial(keeping, host=True, hot=1.0), "host memory"),
        (lambda: tiny("llama").model, some_pages, "LlamaModel has no generate"),
        (lambda: hybrid("granite"), hybrids.rings_and_pages, "take drafts back"),
    ],
)
def test_what_can_not_be_drafted_is_refused(model, plan, why):
    model = model()
    before = dict(vars(model))
    with pytest.raises(PatchError, match=f"exact=True can't be followed: .*{why}"):
        hfsparse.patch(model, plan(model), exact=True)
    assert vars(model).keys() == before.keys()
