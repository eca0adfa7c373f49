"""The `duo` method: gates, what they learn, resumed training, proxies, budgets."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler.job import Job
from hfsparse.profiler.measure import proxies
from hfsparse.profiler.measure.gates import distil
from hfsparse.profiler.methods import duo
from hfsparse.profiler.parts import Parts
from hfsparse.profiler.progress import silent
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.profiler.prompts.passkeys import hide
from hfsparse.profiler.solve.allocation import Budget
from tests import tiny
from tests.profiler.test_capture import lively, state

L, GROUPS, DIM = 300, 2, 16
STREAM = Streaming(4, 40)
IDS = torch.randint(400, (1, L), generator=torch.Generator().manual_seed(1))
ROWS = [100, 170, 250, 298]
SHARES = dict(prefill_density=1.0, cache_share=0.75, decode_share=1.0)
SETTINGS = dict(lengths=(512,), samples=2, method="duo", verify=False, **SHARES)


def hidden(model) -> Tensor:
    with torch.no_grad():
        return model.model(input_ids=IDS, use_cache=False).last_hidden_state[0, ROWS]


# ---- gates


@pytest.mark.parametrize("kept", [[[0, 0], [0, 0]], [[1, 0], [0, 1]]])
def test_gates_of_0_and_1_are_the_plan_with_those_heads_streaming(kept):
    model = lively()
    words = [["full" if gate else "s" for gate in row] for row in kept]
    layers = [
        Layer(
            tuple(w for w in row for _ in range(2)),
            tuple(row),
            tuple("full" if w == "full" else "ring" for w in row),
        )
        for row in words
    ]
    dense = hidden(model)
    with hfsparse.patch(model, Plan(ModelId.of(model), {"s": STREAM}, tuple(layers))):
        wanted = float((hidden(model) - dense).square().mean())
    gates = torch.tensor(kept, dtype=torch.float32, requires_grad=True)
    assert distil(model, gates, IDS, ROWS, STREAM) == pytest.approx(wanted, rel=1e-4)
    assert wanted > 1e-3


def test_the_gradient_of_gates_is_the_slope_of_the_distance():
    model = lively().double()
    gates = torch.tensor([[0.3, 0.8], [0.6, 0.45]], dtype=torch.float64, requires_grad=True)
    distil(model, gates, IDS, ROWS, STREAM)
    for at in np.ndindex(2, GROUPS):
        ends = []
        for step in (0.01, -0.01):
            moved = gates.detach().clone()
            moved[at] += step
            ends.append(distil(model, moved.requires_grad_(), IDS, ROWS, STREAM))
        assert float(gates.grad[at]) == pytest.approx((ends[0] - ends[1]) / 0.02, rel=2e-3)
    assert gates.grad.abs().min() > 1e-4


def test_the_model_is_given_back_exactly():
    model = lively()
    list(model.parameters())[3].requires_grad_(False)
    before, was = hidden(model), state(model)
    with torch.inference_mode():
        distil(model, torch.ones(2, GROUPS, requires_grad=True), IDS, ROWS, STREAM)
    assert state(model) == was
    assert torch.equal(hidden(model), before)


# ---- what they learn


def copier():
    """Layer 0, kv head 0 tells each token its predecessor; layer 1, kv head 1 copies what followed
    the same token before (an induction head). The other heads read everything and write nothing.
    """
    model = tiny.llama(1024, head_dim=32, attention_bias=True, rope_theta=1e8)
    bits = torch.arange(400)[:, None] >> torch.arange(12) & 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :12] = 2.0 * bits - 1  # the hidden state: token,
        first, second = (layer.self_attn for layer in model.model.layers)  # predecessor, copy
        eye, speed = torch.eye(12), 1e8 ** (-torch.arange(16) / 16)
        first.k_proj.bias[:16] = 1.0
        first.q_proj.bias[:16], first.q_proj.bias[16:32] = (
            300 * speed.cos(),
            -300 * speed.sin(),  # nearest to a key at distance 1
        )
        first.v_proj.weight[:12, :12] = eye
        first.o_proj.weight[12:24, :12] = 0.5 * eye
        slow = torch.tensor([*range(10, 16), *range(26, 32)])  # dims that RoPE hardly turns
        second.q_proj.weight[64 + slow, :12] = 8 * eye
        second.k_proj.weight[32 + slow, 12:24] = eye
        second.v_proj.weight[32:44, :12] = eye
        second.o_proj.weight[24:36, 64:76] = eye
    return model


@pytest.fixture
def short(monkeypatch):
    """Few steps, and windows that texts of 512 tokens go far beyond."""
    monkeypatch.setattr(duo, "TRAINED", Streaming(16, 64))
    monkeypatch.setattr(duo, "DEPLOYED", Streaming(8, 64))
    monkeypatch.setattr(duo, "STEPS", 20)
    monkeypatch.setattr(duo, "PIECE", 5)


def job(model, parts=None) -> Job:
    prompts = {512: make_prompts(tiny.tokenizer(), 512, 4, 0)}
    budget = Budget(1.0, 0.75, 1.0)
    return Job(model, tiny.tokenizer(), prompts, budget, parts or Parts(None, ""), silent)


def test_the_head_that_copies_keeps_its_gate_and_heads_that_stream_alike_lose_theirs(
    short, tmp_path
):
    work = job(copier(), Parts(tmp_path / "plan.yaml", ""))
    *_, (trained, _) = duo.train_gates(work)
    gates, fallen = trained["gates"], 1 - duo.RATE * sum(map(duo.scale_rate, range(20)))
    assert gates[1, 1] > 0.9
    np.testing.assert_allclose(gates.ravel()[:3], fallen, atol=1e-3)  # L1 alone moved them
    told = duo.measure_proxies(work)
    assert told["copy"].argmax() == told["error"].argmax() == 3
    assert told["error"][1, 0] == 0
    plan = duo.plan(work).plan
    assert plan.layers[1].cache[1] == "full"


def test_training_ends_when_the_ranking_is_stable_after_the_warm_up(monkeypatch):
    def advance(work, state, end):
        assert state["step"] == end - duo.PIECE
        return state | {"gates": np.arange(4.0).reshape(2, 2), "step": np.array(end)}

    monkeypatch.setattr(duo, "advance", advance)
    ends = [int(state["step"]) for state, _ in duo.train_gates(job(lively()))]
    warm = duo.STEPS // 5
    assert ends == list(range(duo.PIECE, warm + duo.TIMES * duo.PIECE + 1, duo.PIECE))


# ---- proxies


def test_proxies_are_what_plain_attention_says(monkeypatch):
    model = lively(attn_implementation="eager", window=1024)
    text = make_prompts(tiny.tokenizer(), 640, 3, 0)[2].ids[0].tolist()
    keys, ring = hide(tiny.tokenizer(), text, Random(0)), Streaming(4, 100)
    monkeypatch.setattr(proxies, "ROWS", 1000)
    found = proxies.measure_proxies(model, keys, ring)
    ids, rows, sources = keys.ids[0], torch.tensor(keys.rows), torch.tensor(keys.sources)
    assert torch.equal(ids[rows + 1], ids[sources])
    assert len(ids) == 640
    query, key = rows[:, None], torch.arange(640)
    near = (key < ring.sink) | (query - key < ring.recent)
    values = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda m, args, out: values.append(out))
    with torch.no_grad():
        attentions = model(keys.ids, output_attentions=True).attentions
        for i, (mass, v) in enumerate(zip(attentions, values, strict=True)):
            mass = mass[0][:, rows]  # [Hq, R, L]
            v = v.view(640, GROUPS, DIM).transpose(0, 1).repeat_interleave(2, 0)
            kept = mass * near
            out, ringed = mass @ v, kept / kept.sum(-1, keepdim=True) @ v
            copied = mass[:, range(len(rows)), sources].mean(1).view(GROUPS, 2).amax(1)
            outside = 1 - kept.sum(-1).mean(1).view(GROUPS, 2).amin(1)
            np.testing.assert_allclose(found["copy"][i], copied, rtol=1e-4)
            np.testing.assert_allclose(found["mass"][i], outside, rtol=1e-4)
            project = model.model.layers[i].self_attn.o_proj
            whole = project(out.transpose(0, 1).flatten(1))
            for g in range(GROUPS):
                mixed = out.clone()
                mixed[2 * g : 2 * g + 2] = ringed[2 * g : 2 * g + 2]
                moved = project(mixed.transpose(0, 1).flatten(1)) - whole
                error = (moved.norm(dim=1) / whole.norm(dim=1)).mean()
                assert found["error"][i, g] == pytest.approx(float(error), rel=1e-3)


# ---- plans


@pytest.mark.parametrize("budget", ["prefill_density", "cache_share", "decode_share"])
def test_a_plan_keeps_as_many_heads_full_as_every_budget_allows(short, budget):
    model = lively(window=1024)
    shares = dict(prefill_density=1.0, cache_share=1.0, decode_share=1.0) | {budget: 0.6}
    plan = hfsparse.profile(model, tiny.tokenizer(), **{**SETTINGS, **shares}, proxy="error")
    plan.check(model)
    expected = plan.expected[512]
    costs = duo.price_ring(512, duo.DEPLOYED)
    name = {"prefill_density": "pair_density"}.get(budget, budget)
    assert expected[name] <= 0.6 < expected[name] + (1 - costs[name]) / 4
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        model(make_prompts(tiny.tokenizer(), 512, 1, 0)[0].ids)
        stats = handle.stats()
    assert stats.pair_density == pytest.approx(expected["pair_density"], abs=1e-3)
    assert stats.cache_share == pytest.approx(expected["cache_share"], abs=1e-3)


def test_a_killed_run_goes_on_at_its_checkpoint_and_ends_in_the_same_plan(
    short, tmp_path, monkeypatch
):
    model, own, done = lively(window=1024), duo.distil, []

    def killed(*args):
        if len(done) == 12:
            raise KeyboardInterrupt
        return done.append(1) or own(*args)

    whole = hfsparse.profile(model, tiny.tokenizer(), **SETTINGS)
    monkeypatch.setattr(duo, "distil", killed)
    out = tmp_path / "plan.yaml"
    with pytest.raises(KeyboardInterrupt):
        hfsparse.profile(model, tiny.tokenizer(), out=out, **SETTINGS)
    again = []
    monkeypatch.setattr(duo, "distil", lambda *args: again.append(1) or own(*args))
    resumed = hfsparse.profile(model, tiny.tokenizer(), out=out, **SETTINGS)
    assert len(again) == 10  # the first ten of twenty steps were kept
    assert resumed.hash() == whole.hash() == Plan.load(out).hash()
    timed = {"seconds", "train_seconds", "peak_gib"}
    for key in resumed.made.keys() - timed:
        assert resumed.made[key] == whole.made[key]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(proxy="magic"), "no proxy magic: there is copy, mass, error"),
        (dict(proxy="copy", method="minference"), "ranks heads for duo, not for minference"),
        (dict(cache_share=0.2), "a ring of 64 .* has cache_share .* Give larger budgets"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_in_a_sentence(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        hfsparse.profile(tiny.llama(1024), tiny.tokenizer(), **{**SETTINGS, **settings})


def test_a_text_too_short_to_hide_passkeys_is_refused():
    with pytest.raises(UsageError, match=r"a text of 200 tokens is too short .* --lengths"):
        hide(tiny.tokenizer(), [7] * 200, Random(0))
