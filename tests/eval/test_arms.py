"""Peers as arms. What needs kvpress runs where that is installed (transformers below 5.3)."""

import importlib.metadata
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from hfsparse.errors import UsageError
from hfsparse.plan import ModelId, Plan
from hfsparse_eval import arms
from hfsparse_eval.arms import kvpress as presses
from hfsparse_eval.run.generate import answer
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.samples import Suite
from hfsparse_eval.tasks import TASKS
from tests import tiny
from tests.patcher.families import WINDOW, fresh, tokens


@pytest.mark.parametrize("name", ["flash:0.5", "kvpres:SnapKV:0.5", ""])
def test_an_unknown_peer_is_refused_with_the_form_of_the_known(name):
    with pytest.raises(UsageError, match=f"unknown arm {name}: give kvpress:PRESS:RATIO"):
        arms.peer(name)


@pytest.mark.parametrize("package", arms.PEERS)
def test_every_peer_has_its_file_and_class(package):
    file, kind = arms.PEERS[package].kind.split(".")
    ours = getattr(importlib.import_module(f"hfsparse_eval.arms.{file}"), kind)
    assert arms.Arm in ours.__mro__
    assert f"give {arms.FORMS}".count(arms.PEERS[package].form) == 1


def test_a_peer_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(arms, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match="kvpress is not installed: pip install kvpress"):
        arms.peer("kvpress:SnapKV:0.5")


def test_a_peer_that_wants_another_transformers_is_refused(monkeypatch):
    here = importlib.metadata.version("transformers")
    monkeypatch.setattr(arms, "find_spec", lambda package: True)
    monkeypatch.setattr(arms.metadata, "requires", lambda package: [f"transformers<{here}"])
    monkeypatch.setattr(arms.metadata, "version", lambda package: here)
    with pytest.raises(UsageError, match=f"wants transformers <{here}, here is {here}: run this"):
        arms.peer("kvpress:SnapKV:0.5")


@pytest.mark.parametrize(
    ("verified", "promise"),
    [
        (True, {}),
        ("told by hand", {}),
        (["limit"], {}),
        ({"limit": "1 %", "lengths": 512, "told": "little"}, {"told": "little"}),
        ({"limit": 0.02, "lengths": [512]}, {"limit": 0.02, "lengths": [512]}),
    ],
)
def test_of_what_a_hand_wrote_as_verified_only_what_can_be_judged_is_promised(verified, promise):
    plan = Plan.full(ModelId.of(tiny.llama()))
    plan.made = {"verified": verified}
    assert arms.Sparse(plan, "mine").facts()["promise"] == promise


@pytest.fixture
def kvpress():
    return pytest.importorskip("kvpress", exc_type=ImportError)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("kvpress", "give kvpress:PRESS:RATIO"),
        ("kvpress:SnapKV", "give kvpress:PRESS:RATIO"),
        ("kvpress:SnapKV:0.5:blind", "give kvpress:PRESS:RATIO"),
        ("kvpress:SnapKV:1.5", "1.5 is no share from 0 to below 1"),
        ("kvpress:SnapKV:half", "half is no share"),
        ("kvpress:SnapKW:0.5", r"no press SnapKW that this can run: did you mean SnapKV\?"),
        ("kvpress:AdaKV(Snap):0.5", r"no press Snap that this can run: did you mean "),
        ("kvpress:Ada(SnapKV):0.5", r"no wrapper Ada that this can run: did you mean AdaKV\?"),
    ],
)
def test_presses_that_are_none_are_refused(kvpress, name, sentence):
    with pytest.raises(UsageError, match=sentence):
        arms.peer(name)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("kvpress:Knorm:0.5", 0.5),
        ("kvpress:SnapKV:0.75", 0.25),
        ("kvpress:AdaKV(SnapKV):0.5", 1.0),  # masks, and keeps every key
        ("kvpress:StreamingLLM:0.5:agnostic", 0.56),
    ],
)
def test_a_press_answers_as_kvpress_itself_does(kvpress, name, kept, model, tokenizer):
    suite = Suite([TASKS["niah_single_2"]], [700], 2, Prompter(tokenizer))
    arm = arms.peer(name)
    for sample in map(suite.sample, suite.cases):
        with arm.on(model) as handle:
            handle.begin(sample)
            said = answer(model, tokenizer, sample, 12).text
            stats = handle.stats()
        first = sample.question if arm.agnostic else len(sample.ids)
        assert 0 < len(sample.ids) - sample.question < 80
        ids = torch.tensor([sample.ids])
        if arm.agnostic:
            pipe = kvpress.KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
            parts = {"context_ids": ids[:, :first], "questions_ids": [ids[:, first:]]}
            (want,) = pipe._forward(parts, max_new_tokens=12, press=arm._make())
        else:
            with arm._make()(model):
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
                )
            want = tokenizer.decode(out[0, len(sample.ids) :], skip_special_tokens=True)
        assert said == want
        assert stats.cache_share == pytest.approx(kept, abs=0.02)
        assert stats.decode_share < 0.58
        assert (stats.pair_density == 1) == (not arm.agnostic)
    assert "forward" not in vars(model)


def test_skip_softmax_leaves_the_model_as_it_was_even_where_nothing_can_be_skipped(tokenizer):
    """Random weights attend to everything alike: modelopt's calibration finds no threshold."""
    pytest.importorskip("modelopt.torch.sparsity.attention_sparsity", exc_type=ImportError)
    for name in ("modelopt", "modelopt:0.5:0.5", "modelopt:2"):
        with pytest.raises(UsageError, match=r"give kvpress|is no share"):
            arms.peer(name)
    model = tiny.llama(window=1024, vocab_size=len(tokenizer))
    arm = arms.peer("modelopt:0.5")
    arm.prepare(tokenizer, [300])
    before, kinds = set(vars(model)), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="calibration found no thresholds"), arm.on(model):
        pass
    assert [type(module) for module in model.modules()] == kinds
    assert set(vars(model)) == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_press_is_not_blamed_for_what_the_models_own_windows_drop(share):
    """A stand-in for a press, which halves the layers that have no window, as kvpress's do."""
    model = fresh("gemma3")
    cache = DynamicCache(config=model.config)

    @contextmanager
    def press(model):
        yield
        for layer in (x for x in cache.layers if not x.is_sliding):
            left = round(layer.keys.shape[2] * (1 - share))
            layer.keys, layer.values = layer.keys[:, :, :left], layer.values[:, :, :left]

    with presses.Pressed(model, press).on() as pressed, torch.no_grad():
        pressed.first = 300
        model(tokens(1, 300), past_key_values=cache)
        stats = pressed.stats()
    whole = 2 * 300 + WINDOW - 1
    assert stats.cache_share == pytest.approx((2 * 300 * (1 - share) + WINDOW - 1) / whole)
    assert stats.decode_share == pytest.approx(1 - 2 * 300 * share / (2 * 300 + WINDOW))
    assert stats.pair_density == 1
