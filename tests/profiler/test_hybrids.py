"""Hybrids: layers without attention stay as they are, and all is measured on the others."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import cache_utils

import hfsparse
from hfsparse import bench
from hfsparse.errors import UsageError
from hfsparse.models.layers import layer_shapes
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler.job import Found
from hfsparse.profiler.measure import influence, proxies
from hfsparse.profiler.measure.capture import Seen, capture, checkpoint_layers
from hfsparse.profiler.measure.gates import distil
from hfsparse.profiler.methods import METHODS, duo, minference, moa, one_pass
from hfsparse.profiler.prompts.calibration import Prompt, make_prompts
from hfsparse.profiler.prompts.passkeys import Passkeys
from hfsparse.profiler.report import describe_budgets
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.verify import give_back, key_tokens, reader, trials
from tests import tiny
from tests.patcher.oracle import oracle, whole_cache
from tests.profiler.test_verify import believe, far

pytestmark = pytest.mark.skipif(
    not hasattr(cache_utils, "LinearAttentionLayer"),
    reason="hybrids are followed from transformers 5.17 on",
)
SIZES = dict(
    vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    initializer_range=0.12, bos_token_id=0, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16, head_dim=16,
)  # fmt: skip
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=64)
LINEAR = ["linear_attention", "full_attention", "full_attention"]
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
SHARED = "gemma4 of shared keys"
FAMILIES = {  # name: prefix of its classes, and more of its config
    "qwen3_5": ("Qwen3_5", dict(DELTA, layer_types=LINEAR)),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        dict(MAMBA, layer_types=LINEAR, num_local_experts=4, shared_intermediate_size=64),
    ),
    "lfm2": ("Lfm2", dict(layer_types=["conv", *LINEAR[1:]])),
    "bamba": ("Bamba", dict(MAMBA, attn_layer_indices=[1, 2])),
    "jamba": (
        "Jamba",
        dict(
            attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=8,
            mamba_dt_rank=4,
        ),
    ),
    "zamba2": (
        "Zamba2",
        dict(
            layers_block_type=LINEAR[:1] + ["hybrid"] * 2, n_mamba_heads=4, mamba_d_state=16,
            chunk_size=64,
        ),
    ),
    "nemotron_h": (
        "NemotronH",
        dict(
            EXPERTS, layers_block_type=["moe", "attention", "mamba"], head_dim=16,
            mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=64,
            n_routed_experts=4, moe_shared_expert_intermediate_size=32,
        ),
    ),
    "gemma4": (  # its windowed layers have other heads than the layers that a plan may change
        "Gemma4",
        dict(
            layer_types=["sliding_attention", "full_attention", "full_attention"], head_dim=16,
            global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True,
            num_kv_shared_layers=0, vocab_size_per_layer_input=400, sliding_window=64,
            hidden_size_per_layer_input=0,
        ),
    ),
    SHARED: (  # layer 4 reads the keys of layer 2
        "Gemma4",
        dict(
            layer_types=["sliding_attention", *["full_attention"] * 2, "sliding_attention",
                         "full_attention"],
            num_hidden_layers=5, head_dim=16, num_kv_shared_layers=2, sliding_window=64,
            global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True,
            vocab_size_per_layer_input=400, hidden_size_per_layer_input=8,
        ),
    ),
    "llama4": (  # its first layer attends in chunks
        "Llama4",
        dict(
            layer_types=["chunked_attention", "full_attention", "full_attention"], head_dim=16,
            attention_chunk_size=200, num_local_experts=2, intermediate_size_mlp=64,
            no_rope_layers=[1, 0, 1],
        ),
    ),
    "laguna": (
        "Laguna",
        dict(
            EXPERTS, layer_types=["sliding_attention", "full_attention", "full_attention"],
            num_attention_heads_per_layer=[6, 4, 4], sliding_window=64, head_dim=16, num_experts=4,
            shared_expert_intermediate_size=32, mlp_layer_types=["dense", "sparse", "sparse"],
        ),
    ),
}  # fmt: skip
SETTINGS = dict(
    lengths=(512,), samples=1, prefill_density=0.6, cache_share=0.7, decode_share=0.6, seed=3,
    verify=False,
)  # fmt: skip
WIDE = dict(prefill_density=0.95, cache_share=0.95, decode_share=0.95)


@cache
def build(family: str):
    torch.manual_seed(0)
    prefix, more = FAMILIES[family]
    made = getattr(transformers, f"{prefix}ForCausalLM", None)
    if made is None:
        pytest.skip(f"this transformers has no {prefix}")
    return made(made.config_class(**{**SIZES, **more})).eval()


@pytest.fixture(scope="module")
def model():
    return build("qwen3_5")


def check(model, plan: Plan) -> None:
    """The plan fits, drops something, leaves layer 0 alone, and does what it says it does."""
    plan.check(model)
    words = [{*layer.prefill, *layer.cache, *layer.decode} for layer in plan.layers]
    assert words[0] == {"full"}
    assert {"full"} != words[1] | words[2]
    length = min(plan.expected)
    expected = plan.expected[length]
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        ids = make_prompts(tiny.tokenizer(), length, 1, SETTINGS["seed"])[0].ids
        model(ids, use_cache=True)
        prompt = handle.stats()
        cache = model(ids[:, :-1], use_cache=True)
        model(ids[:, -1:], **{name: cache[name] for name in whole_cache()})
        step = handle.stats()
    assert prompt.pair_density == pytest.approx(expected["pair_density"], abs=1e-3)
    assert prompt.block_density == pytest.approx(expected["block_density"], abs=1e-3)
    assert prompt.cache_share == pytest.approx(expected["cache_share"], abs=1e-4)
    assert step.decode_share == pytest.approx(expected["decode_share"], rel=0.01)


@pytest.mark.parametrize("family", ["qwen3_5", "granitemoehybrid", "lfm2"])
def test_a_plan_does_what_it_expects_within_its_budgets(family):
    model = build(family)
    plan = hfsparse.profile(model, tiny.tokenizer(), **SETTINGS)
    check(model, plan)
    assert plan.expected[512]["pair_density"] <= 0.6 + 1e-3
    assert plan.expected[512]["cache_share"] <= 0.7 + 1e-3
    assert plan.expected[512]["decode_share"] <= 0.6 + 1e-3
    assert 0.3 < plan.expected[512]["recall"] < 1
    assert plan.without_attention == {0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_equals_the_dense_model_under_its_mask(family):
    model = build(family)
    plan = hfsparse.profile(
        model, tiny.tokenizer(), **{**SETTINGS, "method": "streaming-llm", "cache_share": 0.5}
    )
    check(model, plan)
    ids = torch.randint(2, 400, (1, 300), generator=torch.Generator().manual_seed(1))
    with hfsparse.patch(model, plan), torch.no_grad():
        found = model(ids).logits
    with oracle(model, plan), torch.no_grad():
        wanted = model(ids, **whole_cache(model)).logits
    with torch.no_grad():
        dense = model(ids).logits
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    assert (dense - wanted).norm() > 1e-3 * wanted.norm()


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="minference"),
        dict(method="minference-error", prefill_method="streaming-llm"),
        dict(method="streaming-llm"),
        dict(method="moa", **WIDE),
        dict(method="duo", **WIDE),
        dict(method="duo", proxy="error", prefill_method="minference", **WIDE),
    ],
    ids=lambda settings: "-".join(str(x) for x in settings.values() if isinstance(x, str)),
)
def test_every_method_plans_a_hybrid(model, monkeypatch, settings):
    monkeypatch.setattr(duo, "STEPS", 2)
    monkeypatch.setattr(duo, "PIECE", 1)
    monkeypatch.setattr(influence, "ANSWER", 4)
    monkeypatch.setattr(moa, "STEPS", 2)
    check(model, hfsparse.profile(model, tiny.tokenizer(), **{**SETTINGS, **settings}))


@pytest.mark.parametrize("method", ["balanced", "minference", "moa", "duo"])
def test_every_method_plans_a_model_whose_layers_share_keys(monkeypatch, method):
    monkeypatch.setattr(duo, "STEPS", 2)
    monkeypatch.setattr(duo, "PIECE", 1)
    monkeypatch.setattr(influence, "ANSWER", 4)
    monkeypatch.setattr(moa, "STEPS", 2)
    model, together = build(SHARED), METHODS[method].one_pass
    budgets = dict(prefill_density=0.4, cache_share=0.5, decode_share=0.3) if together else WIDE
    plan = hfsparse.profile(model, tiny.tokenizer(), **{**SETTINGS, **budgets, "method": method})
    check(model, plan)
    full = Plan.full(plan.model).layers
    changed = [index for index in range(5) if plan.layers[index] != full[index]]
    assert changed == ([1, 2, 4] if together else [1])
    for name, share in dict(pair_density=0.4, cache_share=0.5, decode_share=0.3).items():
        assert not together or plan.expected[512][f"{name}_free"] <= share + 1e-3
    said = describe_budgets(plan, Settings(method=method, prefill_density=0.1), model)
    assert "0.10 not met" in said
    left = ": layers 2 and 4 share keys and stay full, the others keep the budgets"
    assert said.endswith(left) != together


def test_heads_that_share_keys_are_given_back_together():
    model = build(SHARED)
    ring, few = (Layer(("r",) * 4, (word,), ("ring",)) for word in ("r", "r4"))
    words = {"r": Streaming(64, 1024), "r4": Streaming(64, 1024, bits=4)}
    full, bound = Plan.full(ModelId.of(model)), give_back.find_bound(model)
    layers = [*full.layers]
    layers[1], layers[2], layers[4] = ring, few, few
    plan = replace(full, patterns=words, layers=tuple(layers))
    plan.check(model)
    wider = give_back.restore(plan, [(2, 0, 16)], bound)
    assert wider.layers == (full.layers[0], ring, ring, full.layers[0], ring)

    class WithoutRings:
        def rejects(self, plan):
            return any(plan.layers[at] != full.layers[at] for at in (2, 4))

        def wins_back(self, plan):
            return lambda other, label: not self.rejects(other)

    job = SimpleNamespace(model=model, budget=None)
    final, given, _ = give_back.keep_within(job, Found(plan), [WithoutRings()])
    assert given == [(2, 0)]
    assert final.layers == (full.layers[0], ring, *full.layers[2:])
    final.check(model)


# ---- measurements


def test_gradients_are_those_of_plain_autograd(model):
    ids = torch.randint(2, 400, (1, 200), generator=torch.Generator().manual_seed(1))
    kept: dict[int, Seen] = {}

    def keep(seen: Seen) -> dict[str, np.ndarray]:
        kept[seen.layer] = seen
        return {"layer": np.array(seen.layer)}

    short = one_pass.short_sighted_plan(model, minference.candidates(200))
    found = capture(model, ids, short, keep)
    assert [int(each["layer"]) for each in found] == [1, 2]
    assert [shape.free for shape in layer_shapes(model)] == [False, True, True]

    plain, outs, gates = deepcopy(model).requires_grad_(), {}, {}
    plain.set_attn_implementation("eager")
    for at in kept:
        attention = plain.model.layers[at].self_attn

        def note_gate(module, args, made, at=at):  # queries and gates, head by head
            gates[at] = made.detach().view(1, 200, 4, 32)[..., 16:].sigmoid()

        def note_output(module, args, at=at):
            args[0].retain_grad()
            outs[at] = args[0]

        attention.q_proj.register_forward_hook(note_gate)
        attention.o_proj.register_forward_pre_hook(note_output)
    p = plain(ids, use_cache=False).logits[0, :-1].softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    (torch.log(p) - torch.log1p(-p))[kept[1].keys].mean().backward()
    for at, seen in kept.items():
        wanted = (outs[at].grad.view(1, 200, 4, 16) * gates[at]).transpose(1, 2)
        assert float(wanted.norm()) > 1e-5
        assert (seen.grad - wanted).norm() < 1e-3 * wanted.norm()


def test_gradients_of_keys_that_are_shared_are_those_of_plain_autograd():
    model = build(SHARED)
    ids = torch.randint(2, 400, (1, 90), generator=torch.Generator().manual_seed(1))
    short = one_pass.short_sighted_plan(model, minference.candidates(90))
    found = capture(model, ids, short, lambda seen: {"seen": seen})
    seen = {at: each["seen"] for at, each in zip((1, 2, 4), found, strict=True)}
    assert [each.layer for each in seen.values()] == [1, 2, 2]

    plain, outs = deepcopy(model).requires_grad_(), {}
    plain.set_attn_implementation("eager")
    for at in seen:

        def note(module, args, at=at):
            args[0].retain_grad()
            outs[at] = args[0]

        plain.model.layers[at].self_attn.o_proj.register_forward_pre_hook(note)
    p = plain(ids, use_cache=False).logits[0, :-1].softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    (torch.log(p) - torch.log1p(-p))[seen[1].keys].mean().backward()
    for at, each in seen.items():
        wanted = outs[at].grad.view(1, 90, 4, -1).transpose(1, 2)
        assert float(wanted.norm()) > 1e-5
        assert (each.grad - wanted).norm() < 1e-3 * wanted.norm()


def test_gates_and_proxies_have_a_row_a_layer_with_attention(model):
    ids = torch.randint(2, 400, (1, 300), generator=torch.Generator().manual_seed(1))
    stream = Streaming(4, 32)
    gates = torch.nn.Parameter(torch.ones(2, 2))
    assert distil(model, gates, ids, [250, 299], stream) < 1e-9
    gates = torch.nn.Parameter(torch.full((2, 2), 0.5))
    assert distil(model, gates, ids, [250, 299], stream) > 0
    assert (gates.grad != 0).all()
    found = proxies.measure_proxies(model, Passkeys(ids, [250, 298], [10, 20]), stream)
    assert {each.shape for each in found.values()} == {(2, 2)}


# ---- verification


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "bamba", "jamba"])
def test_a_text_read_in_pieces_is_read_as_in_one(family):
    """Stock Bamba numbers each piece from 0; stock Jamba forgets its state where one follows."""
    model = build(family)
    ids = torch.randint(2, 400, (1, 100), generator=torch.Generator().manual_seed(0))
    with hfsparse.patch(model):
        found = key_tokens.measure_losses(model, Prompt("x", ids, None))["loss"]
        assert reader.begins_anew(model) == (family == "jamba")
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="none")
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_a_trial_is_read_as_one_text(model):
    drawn = torch.randint(2, 400, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    text, value, given, second = drawn[:70], drawn[70:75], drawn[75:100], drawn[100:]
    trial = trials.Trial("by hand", text, [([], value), (given, second)])
    with hfsparse.patch(model):
        found = trials.run_trial(model, trial)["loss"]
    with torch.no_grad():
        scores = model(torch.tensor([drawn]), use_cache=False).logits[0, :-1].log_softmax(-1)
    losses = -scores.gather(1, torch.tensor(drawn[1:])[:, None])[:, 0]
    wanted = [float(losses[69:74].mean()), float(losses[99:].mean())]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)


def test_a_verified_run_that_was_killed_goes_on_and_gives_back_what_is_needed(
    model, tmp_path, monkeypatch
):
    far(monkeypatch, set())
    log = believe(monkeypatch, {(2, 1)})
    monkeypatch.setattr(duo, "DEPLOYED", Streaming(4, 64))
    settings = {**SETTINGS, "method": "duo", "proxy": "error", "verify": True, "verify_samples": 2}
    settings |= {"prefill_density": 0.25, "cache_share": 0.2, "out": tmp_path / "plan.yaml"}
    measured, measure, run = [], proxies.measure_proxies, trials.run_trial
    monkeypatch.setattr(
        proxies, "measure_proxies", lambda *args: measured.append(1) or measure(*args)
    )

    def killed(*args):
        if len(log) == 20:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(trials, "run_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        hfsparse.profile(model, tiny.tokenizer(), **settings)
    monkeypatch.setattr(trials, "run_trial", run)
    plan = hfsparse.profile(model, tiny.tokenizer(), **settings)
    assert len(measured) == SETTINGS["samples"]  # not again
    assert plan.verified["given_back"] == ["layer 2 kv head 1"]
    assert plan.verified["drop"] == 0
    check(model, plan)
    assert list(tmp_path.iterdir()) == [settings["out"]]


def test_every_layer_is_recomputed_where_gradients_flow():
    """Zamba2's attention lies deeper than its layers, and not in all of them."""
    model = build("zamba2")
    with hfsparse.patch(model), checkpoint_layers(model):
        assert all("forward" in vars(layer) for layer in model.model.layers)


# ---- what has nothing to measure, and bench


def test_a_hybrid_whose_attention_is_all_windowed_is_refused():
    sizes = {**SIZES, "layer_types": ["conv", "sliding_attention", "conv"], "head_dim": 16}
    if not hasattr(transformers, "Lfm3ForCausalLM"):
        pytest.skip("this transformers has no LFM3")
    config = transformers.Lfm3Config(**sizes, sliding_window=64)
    with pytest.raises(UsageError, match="every attention layer of this Lfm3ForCausalLM has a"):
        hfsparse.profile(transformers.Lfm3ForCausalLM(config).eval(), tiny.tokenizer(), **SETTINGS)


def test_stats_say_what_states_hold_beside_the_cache(model):
    with hfsparse.patch(model) as handle, torch.no_grad():
        assert handle.stats().state_bytes == 0
        model(torch.arange(40)[None], use_cache=True)
        stats = handle.stats()
    columns, kernel, state = 2 * 2 * 16 + 2 * 16, model.config.linear_conv_kernel_dim, 2 * 16 * 16
    assert [layer.state_bytes for layer in stats.layers] == [4 * (columns * kernel + state), 0, 0]
    assert stats.kv_bytes_dense == 2 * 2 * 2 * 40 * 16 * 4
    assert "states of linear layers 0.0 MiB" in str(stats)


def test_bench_has_a_stand_in_for_a_hybrid(model):
    plan = bench.stand_in(model)
    plan.check(model)
    words = [{*layer.cache} for layer in plan.layers]
    assert words == [{"full"}, {"full", "stream"}, {"full", "stream"}]
