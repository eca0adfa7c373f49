"""verify(): a given plan gets the proof that profile tells, and stays what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import hfsparse
from hfsparse.errors import PatchError, UsageError
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Below, Layer, ModelId, Plan, PlanMismatch
from hfsparse.profiler.prompts.calibration import Prompt, make_prompts
from hfsparse.profiler.run import prepare
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.verify import key_tokens, trials
from hfsparse.profiler.verify.given import choose_lengths
from hfsparse.selectors.quest import Quest
from tests import tiny

ASKED = dict(lengths=(512,), verify_samples=1)
MADE = {"method": "by hand", "samples": 1}


@pytest.fixture(scope="module")
def model():
    return tiny.llama(window=1024)


def plan_of(model, **more) -> Plan:
    """A pattern, a ring and chosen pages."""
    this = ModelId.of(model)
    words = {"r": Streaming(4, 64), "a": Antidiagonal(0.9), "q": Quest(0.3, min_pages=2)}
    layers = (Layer(("r", "r", "a", "full"), ("r", "full"), ("ring", "q")),) * this.layers
    return Plan(this, words, layers, Below(256, 256, 256), **{"made": MADE, **more})


@pytest.fixture
def losing(monkeypatch):
    """Under a plan one value in some of the trials is lost, and some nats of some texts' tokens."""
    log = []

    def sparse(model) -> bool:
        return any({*each.cache} != {"full"} for each in model.get_decoder()._hfsparse.plan.layers)

    def run(model, trial):
        log.append(trial)
        said = np.ones(4, bool)
        said[0] = not (sparse(model) and sum(trial.text) % 3 == 0)
        return {"said": said, "loss": np.where(said, 0.0, 1.0)}

    def losses(model, prompt):
        log.append(prompt)
        short = "r" not in (plan := model.get_decoder()._hfsparse.plan).patterns and sparse(model)
        loss = np.zeros(prompt.ids.shape[1] - 1)
        loss[10:20] = 3.0 * short or 0.01 * (int(prompt.ids.sum()) % 7) * (plan.patterns != {})
        return {"loss": loss}

    monkeypatch.setattr(trials, "run_trial", run)
    monkeypatch.setattr(key_tokens, "measure_losses", losses)
    return log


def test_a_plan_of_profile_gets_the_proof_that_it_got_there(model, losing, tmp_path):
    settings = dict(ASKED, verify_samples=3, seed=3, drop=0.9, nats=9.0)
    made = hfsparse.profile(model, tiny.tokenizer(), method="streaming-llm", samples=2, **settings)
    proved = hfsparse.verify(model, made, tiny.tokenizer(), **settings)
    told, then = proved.made["verified"], made.made["verified"]
    assert then["drop"] > 0
    assert then["key_tokens"]["nats"] > 0
    assert told | {"seconds": then["seconds"]} == then | {
        "version": hfsparse.__version__,
        "model": "unnamed",
        "seed": 3,
    }
    assert proved.expected == made.expected
    assert made.expected[512]["pair_density"] < 0.5
    assert proved.hash() == made.hash()
    assert {k: v for k, v in proved.made.items() if k != "verified"} == {
        k: v for k, v in made.made.items() if k != "verified"
    }


def test_a_plan_that_loses_too_much_is_told_so_and_stays_as_it_is(model, losing):
    plan = plan_of(model, made=MADE | {"verified": {"told": "none: asked nothing"}})
    before = plan.dumps()
    proved = hfsparse.verify(model, plan, tokenizer=tiny.tokenizer(), drop=0.0, verify_samples=9)
    verified = proved.made["verified"]
    assert plan.dumps() == before
    assert proved.hash() == plan.hash()
    assert proved.layers == plan.layers
    assert (verified["kept"], verified["lengths"]) == (False, [512, 1024])
    assert verified["drop"] > 0.05
    assert "so it loses more than its limits" in verified["told"]
    assert "given_back" not in verified
    assert proved.made["method"] == "by hand"
    assert proved.unproved is None


def test_how_a_profile_came_to_its_plan_is_kept_and_limits_are_those_given(model, losing):
    known = {"told": "old", "given_back": ["layer 0 kv head 0"], "budgets": {"cache": 0.9}, "x": 1}
    plan = plan_of(model, made=MADE | {"verified": known}, expected={512: {"recall": 0.9}, 64: {}})
    proved = hfsparse.verify(model, plan, tiny.tokenizer(), **ASKED, drop=0.9)
    verified = proved.made["verified"]
    assert (verified["kept"], verified["limit"]) == (True, 0.9)
    assert {name: verified.get(name) for name in known} == known | {
        "told": verified["told"],
        "x": None,
    }
    assert verified["told"] != "old"
    assert proved.expected[64] == {}
    assert proved.expected[512]["recall"] == 0.9


def windowed() -> Gemma3ForCausalLM:
    """A layer with a window of its own below one without."""
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    sizes = dict(vocab_size=400, hidden_size=64, intermediate_size=64, max_position_embeddings=1024)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape, **sizes, **kinds)).eval()


@pytest.mark.parametrize("windows", [False, True], ids=["full", "a window"])
def test_what_it_expects_is_what_the_patched_model_does(model, losing, windows):
    model = windowed() if windows else model
    plan = plan_of(model, made={"samples": 3})
    if windows:
        plan.layers = (Plan.full(plan.model).layers[0], plan.layers[1])
    proved = hfsparse.verify(model, plan, tiny.tokenizer(), **ASKED, seed=5)
    prompts = [prompt.ids for prompt in make_prompts(tiny.tokenizer(), 512, 3, 5)]
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        for ids in prompts:
            model(ids)
        stats = handle.stats()
        handle.reset_stats()
        model.generate(prompts[0][:, :-1], max_new_tokens=2, min_new_tokens=2)  # a step at 512
        steps = handle.stats()
    expected = proved.expected[512]
    assert 0.2 < expected["pair_density"] < 0.9
    assert stats.pair_density == pytest.approx(expected["pair_density"], abs=1e-4)
    assert stats.block_density == pytest.approx(expected["block_density"], abs=1e-4)
    assert stats.cache_share == pytest.approx(expected["cache_share"], abs=1e-4)
    assert windows == ("pair_density_free" in expected)
    free = expected.get("pair_density_free", expected["pair_density"])
    assert stats.free.pair_density == pytest.approx(free, abs=1e-4)
    assert steps.decode_share == pytest.approx(expected["decode_share"], abs=1e-4)


def test_a_killed_run_goes_on_beside_what_it_writes(model, losing, monkeypatch, tmp_path):
    file, out = tmp_path / "plan.yaml", tmp_path / "proved.yaml"
    plan = plan_of(model)
    plan.save(file)
    whole = hfsparse.verify(model, plan, tiny.tokenizer(), **ASKED)
    needed = len(losing)
    losing.clear()
    run, kills = trials.run_trial, [7, 12]

    def mortal(*args):
        if len(losing) in kills:
            kills.remove(len(losing))
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(trials, "run_trial", mortal)
    for _ in range(20):
        try:
            proved = hfsparse.verify(model, plan, tiny.tokenizer(), out=out, **ASKED)
            break
        except KeyboardInterrupt:
            assert not out.exists()
            assert (tmp_path / "proved.yaml.verify.parts").is_dir()
    assert kills == []
    assert len(losing) == needed  # nothing twice
    assert Plan.load(out) == proved
    told = proved.made["verified"] | {"seconds": whole.made["verified"]["seconds"]}
    assert told == whole.made["verified"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["plan.yaml", "proved.yaml"]
    assert Plan.load(file) == plan


def test_your_texts_that_calibrated_the_plan_do_not_prove_it(model, losing, tmp_path):
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{i} and so on, " * 200}) for i in range(8)))
    drawn = Settings(samples=2, seed=7, data=data)
    calibrated = prepare(model, tiny.tokenizer(), drawn, (512,)).prompts[512]
    plan = plan_of(model, made={"samples": 2, "seed": 7})
    hfsparse.verify(model, plan, tiny.tokenizer(), **ASKED, seed=1, data=data)
    proving = {each.name for each in losing if isinstance(each, Prompt)}
    yours = {name for name in proving if name.startswith("data-")}
    assert (len(calibrated), len(yours)) == (2, 6 - 3)  # half of those held out tell
    assert not yours & {prompt.name for prompt in calibrated}


# ---- lengths, and what is refused


def test_without_lengths_they_are_those_of_profile_at_which_the_plan_is_not_full(model):
    plan = plan_of(model)
    assert choose_lengths(model, plan, None) == (512, 1024)
    assert choose_lengths(model, replace(plan, below=Below(600, 800, 900)), None) == (1024,)
    assert choose_lengths(model, replace(plan, below=Below(600, 300, 900)), None) == (512, 1024)
    assert choose_lengths(model, Plan.full(plan.model), (256,)) == (256,)
    skips = replace(Plan.full(plan.model), skip=4.0, below=Below(600, 0, 0))
    assert choose_lengths(model, skips, None) == (1024,)


def test_a_length_at_which_nothing_can_be_lost_is_refused(model):
    plan = replace(plan_of(model), below=Below(2048, 2048, 2048))
    for lengths in (None, (512,), (4096, 1024)):
        with pytest.raises(UsageError, match=r"lengths \(.*the plan is full below 2048 tokens"):
            hfsparse.verify(model, plan, tiny.tokenizer(), lengths=lengths)


def test_what_fits_no_model_or_length_is_refused(model):
    plan, tokenizer = plan_of(model), tiny.tokenizer()
    with pytest.raises(PlanMismatch, match="plan was made for LlamaForCausalLM with 2 layers"):
        hfsparse.verify(tiny.llama(num_hidden_layers=3), plan, tokenizer)
    with pytest.raises(PlanMismatch, match="with fingerprint"):
        hfsparse.verify(tiny.llama(rope_theta=7.0, rope_parameters=None), plan, tokenizer)
    with pytest.raises(PatchError, match="got str: give a transformers model"):
        hfsparse.verify("a model", plan, tokenizer)
    with pytest.raises(UsageError, match="the model's window is 1024 tokens"):
        hfsparse.verify(model, plan, tokenizer, lengths=(2048,))
    with pytest.raises(UsageError, match="nats is -1: give 0 or more"):
        hfsparse.verify(model, plan, tokenizer, nats=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'method'"):
        hfsparse.verify(model, plan, tokenizer, method="duo")


def test_it_takes_the_settings_of_profile_that_a_proof_depends_on():
    *first, out, lengths, seed, data, drop, nats, samples, beyond, progress = signature(
        hfsparse.verify
    ).parameters.values()
    assert [each.name for each in first] == ["model", "plan", "tokenizer"]
    for each in (out, lengths, seed, data, drop, nats, samples, beyond, progress):
        assert each.default == getattr(Settings(), each.name)


def test_explain_knows_weights_on_which_a_plan_was_verified(model, losing):
    plan = plan_of(model, made=MADE | {"model": "another"})
    assert "not verified on these weights" in said(model, plan)
    named = tiny.llama(window=1024)
    named.config._name_or_path = "folder/mine"
    proved = hfsparse.verify(named, plan, tiny.tokenizer(), **ASKED)
    assert "not verified on these weights" not in said(named, proved)
    assert "not verified on these weights" in said(model, proved)


def said(model, plan) -> str:
    with hfsparse.patch(model, plan) as handle:
        return handle.explain()
