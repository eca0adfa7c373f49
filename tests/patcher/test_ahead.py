"""Steps that run ahead of `generate`, which must not show but in time.

Here eager steps stand for replays; tests/runtime/test_graphs.py and tests/gpu have graphs.
"""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessor

import hfsparse
from hfsparse.models.names import new_tokens, text_decoder
from hfsparse.patcher import ahead
from hfsparse.patcher.choosing import _highest as highest
from hfsparse.patcher.choosing import cache_layers
from hfsparse.runtime.call import running
from hfsparse.runtime.graphs import Graphs, NotReady
from hfsparse.runtime.graphs.recording import restore_host, snapshot_host
from tests.patcher import families
from tests.patcher.families import fresh, left_padded, tiny, tokens
from tests.patcher.runs import forward, generate
from tests.patcher.test_exact import Until, Watching, of_cache

GREEDY: dict = {}
WARPED = dict(do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.3, min_new_tokens=4)


@pytest.fixture
def ran(monkeypatch):
    return stand_in(monkeypatch)


def stand_in(monkeypatch) -> SimpleNamespace:
    """Steps that ran ahead: those that were asked for then, and those that were taken back."""
    count = SimpleNamespace(taken=0, back=0, stale=False, anew=157, fails=None)

    def run(self, call, decoder, kwargs, cache):
        layers, ahead = cache_layers(cache), running().ahead
        if not layers or not layers[0].seen or new_tokens(kwargs).shape[1] > 1:
            self.why = "a prompt"
            return call(**kwargs)
        self.why, before = None, snapshot_host(layers)
        if ahead and not self.agree(layers[0].seen != count.anew):
            raise NotReady("recorded anew")
        output = call(**kwargs)
        if ahead:
            self.count(layers[0].rows, 1, -1)
            restore_host(layers, before)
            if layers[0].seen == count.fails:
                raise RuntimeError("no room for logits")
        return output

    def taken(self, layers):
        count.taken += 1
        count_ahead(self, layers)

    def back(self, layers):
        count.taken, count.back = count.taken - 1, count.back + 1
        take_back(self, layers)

    device = torch.device("cpu")
    graph = SimpleNamespace(device=device, devices=(device,), stale=lambda: count.stale)
    count_ahead, take_back = Graphs.count_ahead, Graphs.take_back_ahead
    for name, function in {"run": run, "count_ahead": taken, "take_back_ahead": back}.items():
        monkeypatch.setattr(Graphs, name, function)
    monkeypatch.setattr(Graphs, "graph_of", lambda self, layers: graph)
    return count


def two_ways(model, plan, run):
    """What `run(handle)` gives where no step runs ahead, and where they do."""
    for never in ("this test wants none", None):
        with hfsparse.patch(model, plan(model)) as handle:
            text_decoder(model)._hfsparse.ahead.never = never
            yield run(handle)


def told(handle) -> str:
    return handle.explain().split("before generate has the token: ")[1].split("\n")[0]


@pytest.mark.parametrize("numbers", [1, 7, 100, 6144])
def test_the_highest_score_is_the_first_of_the_highest(numbers):
    torch.manual_seed(numbers)
    scores = torch.randint(9, (3, numbers)).float()
    assert torch.equal(highest(scores), scores.argmax(-1, keepdim=True))


def everything(handle, out) -> tuple:
    """What a generation leaves: tokens, logits, statistics, random numbers, lengths."""
    stats, cache = handle.stats(), of_cache(out)
    counted = [layer.decode_share for layer in stats.layers], stats.kv_bytes, stats.pair_density
    lengths = [(layer.seen, layer.stored, layer.rows) for layer in cache.layers]
    state = torch.get_rng_state().tolist()
    return out.sequences.tolist(), torch.stack(out.logits).tolist(), counted, lengths, state


@pytest.mark.parametrize(
    ("plan", "pads", "chosen"),
    [
        (families.mixed, (0,), GREEDY),
        (families.mixed, (0, 9), WARPED),
        (families.choosing, (0, 9), GREEDY),
        (families.packing, (0,), WARPED),
        (families.snapkv, (0, 9), GREEDY),
        (families.growing, (0,), GREEDY),
    ],
)
def test_nothing_shows(ran, plan, pads, chosen):
    """One step is refused on the way: the buffers it needs are not there."""
    model, (ids, mask) = tiny("qwen2"), left_padded(150, pads)

    def run(handle):
        out = generate(model, ids, mask, new=14, **chosen)
        return everything(handle, out), told(handle)

    (want, why), (got, none) = two_ways(model, plan, run)
    assert got == want
    assert (why, none) == ("no (this test wants none)", "yes")
    assert (ran.taken, ran.back) == (11, 0), "all but the first one, the refused one"


@pytest.mark.parametrize(
    ("plan", "ends"),
    [
        *((families.mixed, ends) for ends in ("eos", "criteria", "length", "error")),
        *((getattr(families, n), "eos") for n in ("choosing", "packing", "snapkv", "growing")),
    ],
)
def test_what_ends_leaves_nothing_behind(ran, plan, ends):
    """Streamers see the same; the cache goes on in a turn and in steps as if none had run."""
    model, ids = fresh("qwen2"), tokens(1, 150)

    class Failing(Watching):
        def put(self, value):
            super().put(value)
            if len(self.said) == 6:
                raise RuntimeError("the line is cut")

    with hfsparse.patch(model, plan(model)):
        last = int(generate(model, ids, new=8).sequences[0, -1])
    ways = {
        "eos": dict(eos_token_id=last, new=30),
        "criteria": dict(stopping_criteria=[Until(last)], new=30),
        "length": dict(new=8),
        "error": dict(new=30),
    }

    def run(handle):
        with torch.no_grad():
            cache = of_cache(forward(model, ids[:, :-1], use_cache=True))
        streamer = Failing() if ends == "error" else Watching()
        try:
            sequences = generate(model, ids, cache=cache, streamer=streamer, **ways[ends]).sequences
        except RuntimeError:
            seen = [token for said in streamer.said[1:] for token in said[:4]]
            sequences = torch.cat([ids, torch.tensor([seen])], 1)
        shares, state = handle.stats().decode_share, copy.deepcopy(cache)
        for layer in state.layers:
            layer.take_back(4 if plan is families.snapkv else 20)
        step = forward(model, ids[:, :1], cache=state).logits
        more = torch.cat([sequences, tokens(1, 20, seed=1)], 1)
        turn = generate(model, more, cache=cache, new=6)
        return streamer.said, shares, step, turn.sequences.tolist(), torch.stack(turn.logits)

    want, got = two_ways(model, plan, run)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert ran.taken > 5
    assert ran.back == (ends != "length")


def test_rows_that_have_ended_wait_for_the_others(ran):
    model, ids = tiny("llama"), tokens(3, 60)
    first, second, _ = generate(model, ids, new=20).sequences[:, 60:].tolist()
    eos = next(token for token in second[:10] if token not in first)
    more = dict(new=20, eos_token_id=eos)
    want, got = two_ways(
        model, families.full, lambda handle: generate(model, ids, **more).sequences.tolist()
    )
    assert got == want
    assert (want[1][-1], ran.taken, ran.back) == (0, 18, 0)


class Odd(LogitsProcessor):
    """Allows odd tokens alone, while it is told to."""

    on = True

    def __call__(self, input_ids, scores):
        return (
            scores.index_fill(1, torch.arange(0, scores.shape[1], 2), -1e9) if self.on else scores
        )


@pytest.mark.parametrize("on", [True, False])
def test_a_users_processor_has_its_way(ran, on):
    """It is never asked ahead; where it changes many tokens, steps wait longer and longer."""
    model, ids, odd = tiny("llama"), tokens(1, 60), Odd()
    odd.on = on
    more = dict(logits_processor=[odd], new=24)

    def run(handle):
        return generate(model, ids, **more).sequences.tolist(), told(handle)

    want, got = two_ways(model, families.full, run)
    assert got[0] == want[0]
    assert got[1] == (f"no ({ahead.WRONG})" if on else "yes")
    assert (ran.back > 0) == on
    assert ran.back + ran.taken < 9 if on else ran.taken == 22


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (dict(num_beams=3), "generate goes on by beam_search"),
        (dict(prompt_lookup_num_tokens=4, eos_token_id=3), "generate goes on by assisted"),
        (dict(output_hidden_states=True), "generate asks for more than logits"),
        (dict(use_cache=False), "generate makes no cache"),
        (dict(do_sample=True, num_return_sequences=3), None),
        (dict(guidance_scale=1.5), ahead.WRONG),
        (dict(no_repeat_ngram_size=6), None),
    ],
    ids=str,
)
def test_every_way_of_generate_says_what_it_says(ran, way, why):
    model, ids = tiny("llama"), tokens(1, 90)

    def run(handle):
        return generate(model, ids, **way).sequences.tolist(), told(handle)

    want, got = two_ways(model, families.streaming, run)
    assert got[0] == want[0]
    assert (why or "yes") in got[1]


def test_what_changes_meanwhile_is_seen(ran):
    """Where the graph has frozen what changed, a step that ran ahead of it is taken back."""
    model, ids = fresh("llama"), tokens(1, 60)

    class Changing(Watching):
        def put(self, value):
            super().put(value)
            ran.stale = len(self.said) == 6
            if ran.stale:
                model.model.layers[1].self_attn.scaling *= 2

    def run(handle):
        said = generate(model, ids, streamer=Changing(), new=12).logits
        model.model.layers[1].self_attn.scaling /= 2
        return torch.stack(said)

    assert torch.equal(*two_ways(model, families.full, run))
    assert ran.back == 1


def test_a_step_that_fails_ahead_is_run_when_it_is_asked_for(ran):
    model, ids, ran.fails = tiny("llama"), tokens(1, 60), 64

    def run(handle):
        out = generate(model, ids, new=16)
        return everything(handle, out), told(handle)

    want, got = two_ways(model, families.streaming, run)
    assert got[0] == want[0]
    assert got[1] == "yes"
    assert (ran.taken, ran.back) == (3 + 2, 1), "eight steps go by"


def test_generations_side_by_side_keep_their_steps(ran):
    model = tiny("llama")
    prompts = [tokens(1, 90 + n, seed=n) for n in range(3)]

    def run(handle):
        said = [None] * 3

        def one(n):
            with torch.no_grad():
                said[n] = model.generate(prompts[n], max_new_tokens=12, do_sample=False).tolist()

        threads = [threading.Thread(target=one, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return said

    want, got = two_ways(model, families.streaming, run)
    assert got == want
    assert 24 < ran.taken <= 30, "a step waits where another's prompt came between"


def test_who_watches_the_head_sees_what_generate_asks_for(ran):
    model, ids, seen = fresh("llama"), tokens(1, 60), []
    model.lm_head.register_forward_hook(lambda module, given, out: seen.append(out.clone()))

    def run(handle):
        seen.clear()
        generate(model, ids, new=8)
        return torch.cat([out[:, -1] for out in seen]), told(handle)

    want, got = two_ways(model, families.full, run)
    assert torch.equal(want[0], got[0])
    assert got[1] == "no (a hook on lm_head)"
