"""balanced: losses over lengths, and which words are offered."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.patterns.streaming import Streaming
from hfsparse.profiler.job import Job
from hfsparse.profiler.methods import balanced, minference, one_pass
from hfsparse.profiler.parts import Parts
from hfsparse.profiler.progress import silent
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.solve.allocation import Budget, allocate
from tests import latents, tiny
from tests.patterns.matrix import CANDIDATES


def test_losses_are_read_off_a_line_at_the_longest_length_and_never_fall():
    rng = np.random.default_rng(0)
    start, slope = rng.random((2, 3)), rng.normal(size=(2, 3))
    losses = {n: start + slope * np.log2(n / 1024) for n in (1024, 2048, 8192)}
    mean = start + slope * np.mean([0, 1, 3])
    wanted = np.where(slope > 0, start + slope * 3, mean)
    np.testing.assert_allclose(balanced.fit(losses), wanted)
    np.testing.assert_allclose(balanced.fit({1024: start}), start)


def test_the_patterns_it_is_known_for_are_candidates_and_streaming_heads_grow_with_the_row():
    names = balanced.candidates(2048)
    assert {p.kind for p in names.patterns.values()} >= set(CANDIDATES)
    streaming = [p for p in names.patterns.values() if isinstance(p, Streaming)]
    assert all(p.recent_per_token for p in streaming)
    assert {bool(ring.recent_per_token) for ring in names.rings.values()} == {False, True}


@pytest.mark.parametrize(
    ("device", "tokens", "kept"), [("cpu", 2048, 1), ("cpu", 4096, 3), ("cuda", 2048, 3)]
)
@pytest.mark.parametrize("method", [balanced, minference], ids=["balanced", "minference"])
def test_short_prompts_on_a_cpu_are_offered_bands_alone(method, device, tokens, kept):
    model, names = nn.Linear(2, 2, device="meta"), method.candidates(tokens)
    model._hf_hook = SimpleNamespace(execution_device=device)
    job = Job(model, None, {512: [], tokens: []}, Budget(1, 1, 1), Parts(None, ""), silent)
    found = one_pass.drop_slow(job, names)
    kinds = {pattern.kind for pattern in found.patterns.values()}
    assert len(kinds & {"streaming", "block_topk", "vertical_slash"}) == kept
    assert kept > 1 or kinds == {"streaming"}
    assert (found.rings, found.selectors) == (names.rings, names.selectors)


def equal(names):
    """Costs at 2,048 tokens, of rings that all cost the same."""
    rings = dict.fromkeys(("ring_kept", "ring_read"), [0.2] * len(names.rings))
    return one_pass.price_candidates(names, 2048) | rings


@pytest.mark.parametrize("grows", [False, True])
def test_a_ring_whose_loss_grows_with_the_length_is_passed_over(grows):
    names = balanced.candidates(2048)
    rings = {name: i for i, name in enumerate(names.rings)}
    counts = {"pattern": (len(names.patterns), 4), "ring": (len(rings), 2)}
    counts["page"] = (len(names.selectors), 2)
    means = {}
    for n in (1024, 2048):
        means[n] = {
            f"{kind}_{name}": np.full((1, *shape), 0.5)
            for kind, shape in counts.items()
            for name in ("effect", "recall", "pairs")
        }
        means[n]["ring_effect"][:, rings["last256"]] = 0.4 if n == 2048 and grows else 0.1
        means[n]["ring_effect"][:, rings["ring12"]] = 0.2
    (layer,) = allocate(balanced.options(means, names, equal(names)), Budget(1, 0.3, 1))
    assert set(layer.cache) == {"ring12" if grows else "last256"}


def test_of_two_rings_of_equal_effect_the_one_that_misses_less_attention_is_taken():
    names = balanced.candidates(2048)
    counts = {"pattern": (len(names.patterns), 4), "ring": (len(names.rings), 2)}
    counts["page"] = (len(names.selectors), 2)
    found = {
        f"{kind}_{name}": np.full((1, *shape), 0.5)
        for kind, shape in counts.items()
        for name in ("effect", "recall", "pairs")
    }
    best = list(names.rings).index("last64")
    found["ring_recall"][:, best] = 0.6
    choices = balanced.options({2048: found}, names, equal(names))
    (layer,) = allocate(choices, Budget(1, 0.3, 1))
    assert set(layer.cache) == {"last64"}
    unit = (1 - found["ring_recall"]).mean()
    wanted = 0.5 / 0.5 + balanced.MISSED * 0.5 / unit / 2
    assert choices.prefill_effect[0, 0, 0] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("decode", "loss", "settings", "kinds"),
    [
        (0.5, None, {}, ("quest", "lowrank")),
        (0.5, None, {"selector": "lsh"}, ("lsh",)),
        (1.0, 0.1, {}, ("quest", "lowrank")),
        (1.0, None, {"curves": "drawn.png"}, ("quest", "lowrank")),
        (1.0, None, {}, ()),
    ],
)
def test_selectors_compete_where_it_is_asked_what_fewer_reads_lose(decode, loss, settings, kinds):
    job = Job(None, None, {}, Budget(0.5, 0.5, decode, loss), None, silent, Settings(**settings))
    assert balanced.kinds_offered(job) == kinds


def test_without_a_limit_on_reads_no_table_is_made(monkeypatch):
    monkeypatch.setattr(one_pass, "forward", None)  # what tables take
    model, tokenizer = tiny.llama(window=1024, num_hidden_layers=2), tiny.tokenizer()
    prompts = {512: make_prompts(tokenizer, 512, 1, 0)}
    found = balanced.plan(
        Job(model, tokenizer, prompts, Budget(0.5, 0.5, 1), Parts(None, ""), silent)
    )
    assert found.plan.expected[512]["pair_density"] <= 0.5
    assert {word for layer in found.plan.layers for word in layer.decode} <= {"full", "ring"}


def test_it_chooses_anew_within_other_budgets_without_measuring():
    model, tokenizer = tiny.llama(window=1024, num_hidden_layers=2), tiny.tokenizer()
    prompts = {512: make_prompts(tokenizer, 512, 1, 0)}
    job = Job(model, tokenizer, prompts, Budget(0.5, 0.5, 0.5), Parts(None, ""), silent)
    found = balanced.plan(job)
    plan, choose = found.plan, found.choose
    job.prompts[512].clear()
    again, wider = choose(job.budget), choose(job.budget.wider(0.5))
    assert again.hash() == plan.hash()
    assert again.expected == plan.expected
    assert plan.expected[512]["cache_share"] <= 0.5 < wider.expected[512]["cache_share"] <= 0.75
    assert choose(Budget(0.001, 0.001, 0.001)) is None


def test_bits_that_a_models_keys_cannot_have_are_refused():
    odd = tiny.llama(head_dim=3)
    job = Job(odd, None, {512: []}, Budget(0.5, 0.5, 1), Parts(None, ""), silent)
    with pytest.raises(UsageError, match=r"bits are 8,4, and heads have 3 channels: .* Give 16,8"):
        balanced.in_bits(job, balanced.candidates(512), [8, 4])
    few = balanced.in_bits(job, balanced.candidates(512), [8, "fp8"])
    assert [*few.packed] == ["full-int8", "full-fp8"]
    assert {ring.bits for name, ring in few.rings.items() if name.endswith("-fp8")} == {"fp8"}
    if latents.exists("deepseek_v3"):
        job = replace(job, model=latents.fresh("deepseek_v3"))
        with pytest.raises(UsageError, match=r"bits are 8, and this model keeps latents \(MLA\)"):
            balanced.in_bits(job, balanced.candidates(512), [8])


@pytest.mark.parametrize("prompts", [None, "minference"])
def test_kv_heads_evict_beside_rings_where_it_is_asked_for(prompts):
    """Their q heads keep patterns of their own, of another method, too."""
    model, tokenizer = tiny.llama(window=1024, num_hidden_layers=2), tiny.tokenizer()
    asked = {"lengths": (512,), "samples": 1, "verify": False, "eviction": "snapkv"}
    asked |= {"prefill_density": 0.6, "cache_share": 0.5, "decode_share": 1.0}
    plan = hfsparse.profile(model, tokenizer, **asked, prefill_method=prompts)
    plan.check(model)
    assert plan.made["eviction"] == "snapkv"
    found = [
        (layer.prefill[2 * g : 2 * g + 2], plan.patterns[layer.cache[g]])
        for layer in plan.layers
        for g, word in enumerate(layer.decode)
        if word == "kept"
    ]
    assert found, "nothing evicts: give another budget"
    assert {kept.kind for _, kept in found} == {"snapkv"}
    assert any(word != "full" for words, _ in found for word in words)
    (prompt,) = make_prompts(tokenizer, 512, 1, 0)
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        model(prompt.ids)
        share = handle.stats().cache_share
    assert share == pytest.approx(plan.expected[512]["cache_share"], abs=1e-3)
    assert share <= 0.5
