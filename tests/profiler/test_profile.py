"""profile(): from a tiny model to a plan, resumed runs, refused settings."""

import json

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import hfsparse
from hfsparse.errors import PatchError, UsageError
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.profiler.measure import effects as measure
from hfsparse.profiler.measure.capture import capture
from hfsparse.profiler.methods import minference, one_pass
from hfsparse.profiler.parts import Parts, identify_run
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse.profiler.settings import Settings
from hfsparse.selectors.quest import Quest
from tests import tiny

SETTINGS = dict(lengths=(512,), samples=2, cache_share=0.7, decode_share=0.6, seed=3, verify=False)


@pytest.fixture(scope="module")
def model():
    return tiny.llama(window=1024)


@pytest.fixture(scope="module")
def plan(model):
    return hfsparse.profile(model, tiny.tokenizer(), **SETTINGS)


def test_a_plan_meets_its_budgets_and_says_what_it_expects(model, plan):
    plan.check(model)
    expected = plan.expected[512]
    assert expected["pair_density"] <= 0.4 + 1e-3
    assert expected["cache_share"] <= 0.7 + 1e-3
    assert expected["decode_share"] <= 0.6 + 1e-3
    assert 0.3 < expected["recall"] < 1
    assert plan.made["method"] == "balanced"
    assert plan.made["samples"] == 2


@pytest.mark.parametrize("given", ["HuggingFaceTB/SmolLM2-135M", None, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused_in_a_sentence(given):
    with pytest.raises(PatchError, match=f"got {type(given).__name__}: give a transformers model"):
        hfsparse.profile(given, tiny.tokenizer())


def test_prompts_too_short_for_a_choice_of_pages_make_a_plan(model):
    shares = dict.fromkeys(("prefill_density", "cache_share", "decode_share"), 0.9)
    plan = hfsparse.profile(
        model, tiny.tokenizer(), lengths=(384,), samples=1, verify=False, **shares
    )
    assert all(plan.expected[384][name.replace("prefill", "pair")] <= 0.9 + 1e-3 for name in shares)


def test_what_a_plan_expects_is_what_the_patched_model_measures(model, plan):
    expected = plan.expected[512]
    with hfsparse.patch(model, plan) as handle, torch.no_grad():
        for prompt in make_prompts(tiny.tokenizer(), 512, 2, 3):
            cache = model(prompt.ids).past_key_values
            held = handle.stats().cache_share
            model(prompt.ids[:, -1:], past_key_values=cache)
        stats = handle.stats()
    assert stats.pair_density == pytest.approx(expected["pair_density"], abs=1e-3)
    assert stats.block_density == pytest.approx(expected["block_density"], abs=1e-3)
    assert held == pytest.approx(expected["cache_share"], abs=1e-4)
    assert stats.decode_share == pytest.approx(expected["decode_share"], rel=0.01)


def test_measured_pages_are_those_that_the_patched_model_reads_at_the_key_rows(model):
    prompt, quest = make_prompts(tiny.tokenizer(), 512, 1, 3)[0], Quest(0.35, min_pages=2)
    rows, this = [], ModelId.of(model)

    def look(seen):
        rows[:] = seen.keys.tolist()
        read = measure.pages_read(quest, seen.q, seen.k, seen.keys, seen.logits.scale)
        tokens = read[:: this.q_heads // this.kv_heads].sum(2)  # [kv heads, rows]
        return (tokens / (seen.keys + 1)).mean(1).numpy()

    short = one_pass.short_sighted_plan(model, minference.candidates(512))
    shares = capture(model, prompt.ids, short, look)
    layer = Layer(("full",) * this.q_heads, ("full",) * this.kv_heads, ("q",) * this.kv_heads)
    read = []
    with torch.no_grad():
        for row in (row for row in rows if row):  # at row 0 there is no past to decode behind
            with hfsparse.patch(model, Plan(this, {"q": quest}, (layer,) * this.layers)) as handle:
                cache = model(prompt.ids[:, :row]).past_key_values
                model(prompt.ids[:, row : row + 1], past_key_values=cache)
                read.append([each.decode_share for each in handle.stats().layers])
    read += [[[1.0] * this.kv_heads] * this.layers] * (len(rows) - len(read))
    np.testing.assert_allclose(np.mean(read, 0), shares, rtol=1e-5)
    assert np.max(shares) < 0.8


def test_a_killed_run_goes_on_and_ends_in_the_same_plan(model, plan, tmp_path, monkeypatch):
    out, seen = tmp_path / "plan.yaml", []
    measure = one_pass.measure_prompt

    def killed(*args):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return measure(*args)

    monkeypatch.setattr(one_pass, "measure_prompt", killed)
    with pytest.raises(KeyboardInterrupt):
        hfsparse.profile(model, tiny.tokenizer(), out=out, **SETTINGS)
    assert not out.exists()
    again = []
    monkeypatch.setattr(one_pass, "measure_prompt", lambda *args: again.append(1) or measure(*args))
    resumed = hfsparse.profile(model, tiny.tokenizer(), out=out, **SETTINGS)
    assert len(again) == 1  # the first of two prompts was not measured twice
    assert resumed.hash() == plan.hash() == Plan.load(out).hash()
    assert list(tmp_path.iterdir()) == [out]


def test_measurements_of_other_settings_are_not_taken_up(model, tmp_path, monkeypatch):
    out = tmp_path / "plan.yaml"
    parts = Parts(out, "other settings")
    parts.get(0, lambda: {"pattern_recall": [[1.0]]})
    counted, measure = [], one_pass.measure_prompt
    monkeypatch.setattr(
        one_pass, "measure_prompt", lambda *args: counted.append(1) or measure(*args)
    )
    hfsparse.profile(model, tiny.tokenizer(), out=out, **SETTINGS)
    assert len(counted) == 2


def test_a_measurement_cut_short_on_disk_is_made_again(model, plan, tmp_path, monkeypatch):
    out, measure = tmp_path / "plan.yaml", one_pass.measure_prompt
    done = []

    def killed(*args):
        if len(done) == 1:
            raise KeyboardInterrupt
        return done.append(1) or measure(*args)

    monkeypatch.setattr(one_pass, "measure_prompt", killed)
    with pytest.raises(KeyboardInterrupt):
        hfsparse.profile(model, tiny.tokenizer(), out=out, **SETTINGS)
    (part,) = tmp_path.glob("plan.yaml.parts/[!t]*.npz")  # the others are of tables
    part.write_bytes(part.read_bytes()[:-100])
    again = []
    monkeypatch.setattr(one_pass, "measure_prompt", lambda *args: again.append(1) or measure(*args))
    assert hfsparse.profile(model, tiny.tokenizer(), out=out, **SETTINGS).hash() == plan.hash()
    assert len(again) == 2


def test_other_weights_of_the_same_shape_are_other_settings(model):
    prompts = {512: make_prompts(tiny.tokenizer(), 512, 1, 3)}
    settings = Settings(method="minference")
    own = identify_run(model, settings, prompts)
    tuned = tiny.llama(window=1024)
    assert identify_run(tuned, settings, prompts) == own
    with torch.no_grad():
        tuned.model.norm.weight[0] += 1
    assert identify_run(tuned, settings, prompts) != own
    assert identify_run(model, settings, {}) != own
    assert identify_run(model, Settings(method="moa"), prompts) != own


def test_what_identifies_a_run_is_written_as_it_ever_was_so_that_old_runs_go_on(model):
    settings = Settings(method="duo", prefill_method="moa", cache_share=0.3, drop=0.2, samples=3)
    written = json.loads(identify_run(model, settings, {}))
    assert list(written) == ["method", "model", "seen", "versions"]
    assert written["method"] == "moa and duo"
    assert json.loads(identify_run(model, Settings(), {}))["method"] == "balanced"


def test_a_model_in_training_mode_is_refused(model):
    training = tiny.llama(window=1024).train()
    with pytest.raises(UsageError, match=r"call model\.eval\(\) first"):
        hfsparse.profile(training, tiny.tokenizer(), **SETTINGS)


def test_inference_mode_around_it_changes_nothing(model, plan):
    with torch.inference_mode():
        assert hfsparse.profile(model, tiny.tokenizer(), **SETTINGS).hash() == plan.hash()


def test_budgets_of_everything_keep_everything(model):
    all_of_it = dict(prefill_density=1.0, cache_share=1.0, decode_share=1.0)
    rich = hfsparse.profile(model, tiny.tokenizer(), **{**SETTINGS, **all_of_it})
    assert {*rich.layers[0].prefill, *rich.layers[1].cache} == {"full"}
    assert rich.expected[512]["recall"] == 1


def test_profiling_leaves_the_model_as_it_was(model, plan):
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="not patched"):
        hfsparse.unpatch(model)


def gemma3(*kinds):
    sizes = dict(hidden_size=64, intermediate_size=64, vocab_size=400, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = Gemma3TextConfig(**sizes, **heads, sliding_window=64, layer_types=list(kinds))
    return Gemma3ForCausalLM(config).eval()


def test_a_model_of_window_layers_only_is_refused():
    model = gemma3("sliding_attention", "sliding_attention")
    with pytest.raises(UsageError, match="there is nothing to make sparse"):
        hfsparse.profile(model, tiny.tokenizer(), **SETTINGS)


def test_layers_with_a_window_of_their_own_stay_full():
    model = gemma3("sliding_attention", "full_attention")
    plan = hfsparse.profile(model, tiny.tokenizer(), **SETTINGS)
    assert {*plan.layers[0].prefill, *plan.layers[0].cache, *plan.layers[0].decode} == {"full"}
    assert {*plan.layers[1].cache} != {"full"}
    with hfsparse.patch(model, plan):
        pass


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(lengths=()), "no lengths given"),
        (dict(lengths=(4096,)), "the model's window is 1024"),
        (dict(lengths=(128,)), "give 256 tokens or more"),
        (dict(samples=0), "give 1 or more"),
        (dict(method="magic"), "there is balanced, minference"),
        (dict(cache_share=0.05), "Give larger budgets"),
        (dict(prefill_density=0), "prefill_density is 0: give more than 0"),
        (dict(decode_share=1.5), "decode_share is 1.5: give more than 0 and at most 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_in_a_sentence(model, settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        hfsparse.profile(model, tiny.tokenizer(), **{**SETTINGS, **settings})
