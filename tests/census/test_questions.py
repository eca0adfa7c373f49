"""The census can tell: what is wrong, useless, crashed or badly explained is called so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import transformers
from transformers import CONFIG_MAPPING

import hfsparse
from hfsparse import families
from hfsparse.errors import PatchError
from tests.census import questions, record
from tests.census.entries import entries
from tests.census.questions import Answer, Wrong, ask, masked, streams
from tests.census.shrink import FIRST_MARK, shrink
from tests.patcher.families import VOCAB
from tests.support.models import tiny

pytestmark = pytest.mark.skipif(
    record.load()[0] != transformers.__version__, reason="the record is of another transformers"
)
LLAMA = next(entry for entry in entries() if entry.model_type == "llama")
REFUSAL = "LlamaForCausalLM can't be patched: {}. Supported: decoders of transformers"


def test_one_key_too_few_shows():
    model = tiny("llama")
    plan = streams(model)
    narrow = replace(plan, patterns={"s": replace(plan.patterns["s"], recent=15)})
    with hfsparse.patch(model, narrow):
        got = questions._runs(model)
    with masked(model, narrow):
        stock = questions._runs(model)  # the mask is of RING's size, not of this plan's
    with pytest.raises(Wrong, match="streams: logits differ by"):
        questions._same("streams", got, stock)


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (PatchError(REFUSAL.format("its cache holds latents (MLA), not keys per head")), "refused"),
        (PatchError(REFUSAL.format("'MambaConfig' object has no attribute 'n'")), "unexplained"),
        (PatchError("no"), "unexplained"),
        (RuntimeError("size mismatch"), "crash"),
    ],
)
def test_how_patch_refuses_is_told_apart(raised, outcome, monkeypatch):
    def refuse(*args):
        raise raised

    monkeypatch.setattr(hfsparse, "patch", refuse)
    assert ask(LLAMA).outcome == outcome


def test_a_model_that_is_accepted_and_refused_at_each_call_is_useless(monkeypatch):
    asked = []

    def runs(model):
        asked.append(model)
        if len(asked) > 1:  # the stock model ran
            raise PatchError("layer 1 has 4 q and 4 kv heads")
        return []

    monkeypatch.setattr(questions, "_runs", runs)
    assert ask(LLAMA) == Answer("useless", "layer 1 has 4 q and 4 kv heads")


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3", "gpt2", "jamba", "deepseek_v3"])
def test_configs_are_shrunk_with_every_kind_of_layer(kind):
    config = shrink(CONFIG_MAPPING[kind])
    text, whole = config.get_text_config(), CONFIG_MAPPING[kind]().get_text_config()
    assert (text.hidden_size, text.num_attention_heads) == (64, 4)
    assert 4 <= text.num_hidden_layers <= 7
    kinds = [{*(getattr(each, "layer_types", None) or ())} for each in (text, whole)]
    assert kinds[0] == kinds[1]
    marks = [v for k, v in vars(config).items() if k.endswith("token_id") and type(v) is int]
    assert all(mark >= FIRST_MARK or mark < 2 for mark in marks)
    assert FIRST_MARK > VOCAB


def test_what_is_not_asked_stays_in_the_record(tmp_path, monkeypatch):
    copy = tmp_path / "families.json"
    copy.write_text(families.RECORD.read_text())
    monkeypatch.setattr(families, "RECORD", copy)
    monkeypatch.setattr(record, "PAGE", copy.with_suffix(".md"))
    record.forget()
    try:
        version, before = record.load()
        said = Answer("refused", "because")
        assert record.write(version, {LLAMA.name: said})[0].endswith("→ refused")
        assert record.load() == (version, {**before, LLAMA.name: said})
        assert "because" in copy.with_suffix(".md").read_text()
        assert [*json.loads(copy.read_text())["answers"]] == [*before]
    finally:
        record.forget()
