"""Conversations over one cache: their samples, and that every arm goes on where it stopped."""

import functools
import hashlib
import re
from dataclasses import replace
from random import Random

import pytest
import torch
from typer.testing import CliRunner

import hfsparse
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse_eval.cli import app
from hfsparse_eval.run import generate
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.samples import Case, Maker
from hfsparse_eval.tasks import conversations
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.conversations import ASKED
from tests.eval.running import goes_on

TALKS = {task.name: task for task in conversations.TASKS}
GOLDEN = {
    "turns_kv": "35b2f143afa7c7bd",
    "turns_prefix_suffix": "3ed1699dae186a2e",
    "turns_vt": "f5488fbe161917af",
    "turns_niah": "91f1e872e736d60d",
}


@pytest.mark.parametrize("name", TALKS)
def test_a_seed_gives_this_conversation_for_ever(name, monkeypatch):
    """Changed on purpose? Then scores before and after do not compare: say so in the changelog."""
    monkeypatch.setattr(text, "prose", lambda: tuple(f"Sentence {i} is short." for i in range(90)))
    made = TALKS[name].draw(Random(42), 60)
    assert hashlib.sha256(repr((made, made.asks)).encode()).hexdigest()[:16] == GOLDEN[name]


def sample(name, tokenizer, length=1280, index=0, **options):
    maker = Maker(TALKS[name], length, Prompter(tokenizer, **options), seed=3)
    return maker.sample(Case(name, length, None, index))


def streaming(model):
    layer = Layer(("s",) * 4, ("s",) * 2, ("ring",) * 2)
    full = Plan.full(ModelId.of(model))
    return replace(full, patterns={"s": Streaming(sink=8, recent=32)}, layers=(layer,) * 2)


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("chat", ["auto", "never"])
def test_each_question_is_answered_where_its_gold_span_says(name, chat, tokenizer):
    length = 1700
    one = sample(name, tokenizer, length, chat=chat)
    assert one == sample(name, tokenizer, length, chat=chat) != sample(name, tokenizer, length, 1)
    assert len(one.turns) == ASKED
    assert 0.75 * length < one.real <= length
    wanted = [answer for turn in one.turns for answer in turn.answers]
    assert list(one.answers) == wanted
    text = tokenizer.decode(one.ids)
    for answer, (low, high) in zip(wanted, one.gold, strict=True):
        assert answer in tokenizer.decode(one.ids[low:high])
        assert name == "turns_vt" or text.count(answer) == 1
    asked = [tokenizer.decode(turn.ids) for turn in one.turns]
    assert not any(answer in said for answer in wanted for said in asked)
    if chat == "auto":
        assert text.count("<|user|>") == 1
        assert "<|assistant|>" not in text
        assert all(said.count("<|assistant|>\n") == 1 for said in asked)
        assert [said.startswith("<|end|>\n<|user|>\n") for said in asked] == [False] + [True] * 4


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("gold", [False, True])
@pytest.mark.parametrize("arm", ["dense", "full", "streaming"])
def test_turns_over_a_cache_say_what_the_whole_conversation_read_anew_says(
    arm, gold, known, model, tokenizer
):
    one = sample("turns_niah", tokenizer, gold=gold, known=known)
    assert [bool(turn.given) for turn in one.turns] == [gold] * ASKED
    assert [bool(turn.ids) for turn in one.turns] == [not known] + [True] * 4
    plan = {"full": Plan.full(ModelId.of(model)), "streaming": streaming(model)}.get(arm)
    if plan is None:
        told = generate.answer(model, tokenizer, one, 8)
        check(model, tokenizer, one, told)
        return
    with hfsparse.patch(model, plan) as handle:
        told = generate.answer(model, tokenizer, one, 8)
        share = handle.stats().cache_share
        check(model, tokenizer, one, told)
    assert share < 0.2 if arm == "streaming" else share >= 1


@torch.inference_mode()
def check(model, tokenizer, one, told):
    ids = list(one.ids)
    assert len(told.more["turns"]) == ASKED
    for turn, record in zip(one.turns, told.more["turns"], strict=True):
        ids += turn.ids
        wanted = generate._Wanted(("no such",), "all", 8)
        (new,), _ = generate._say(model, [ids], generate._Watch(tokenizer, [wanted]))
        assert record["output"] == generate.decode(tokenizer, new)
        ids += turn.given or generate._without_end(new, tokenizer.eos_token_id)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("gold", [False, True])
def test_the_text_is_read_once(gold, known, model, tokenizer, monkeypatch):
    one = sample("turns_niah", tokenizer, gold=gold, known=known)
    forward, read = model.forward, []

    def counted(input_ids=None, **more):
        read.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "forward", functools.wraps(forward)(counted))
    generate.answer(model, tokenizer, one, 2)
    assert len([tokens for tokens in read if tokens > len(one.ids) / 2]) == 1


def test_each_turn_has_its_score_and_the_line_their_mean(model, tokenizer):
    one = sample("turns_niah", tokenizer)
    told = generate.answer(model, tokenizer, one, 12).more["turns"]
    said = told[3]["output"].strip()[:4]
    right = [
        replace(turn, answers=(said,) if i == 3 else ("no such",))
        for i, turn in enumerate(one.turns)
    ]
    again = generate.answer(model, tokenizer, replace(one, turns=tuple(right)), 12)
    assert [turn["score"] for turn in again.more["turns"]] == [0, 0, 0, 1, 0]
    assert again.score == 0.2


def test_the_command_reports_each_turn_and_goes_on_where_it_stopped(folder, model, tmp_path):
    streaming(model).save(tmp_path / "plan.yaml")
    words = [
        "turns",
        str(folder),
        "-o",
        str(tmp_path / "out"),
        "--plan",
        str(tmp_path / "plan.yaml"),
    ]
    words += ["--lengths", "1000", "--tasks", "turns_niah", "--max-new-tokens", "3", "--samples"]
    lines, report = goes_on(words, tmp_path / "out")
    assert [line["arm"] for line in lines] == ["dense", "sparse"] * 2
    assert "own answers go on; the text is read before any question is known" in report
    turns = re.findall(r"\| turns_niah \| 1000 \| (\d) \| ", report.split("## By turn: ")[1])
    assert turns == ["1", "2", "3", "4", "5"]
    refused = CliRunner().invoke(app, [*words, "2", "--answers", "gold"])
    assert "holds results with turns own answers go on" in refused.stderr


def test_an_unknown_task_is_one_clear_sentence(folder):
    result = CliRunner().invoke(app, ["turns", str(folder), "--tasks", "turns_kw"])
    assert result.stderr.startswith("error: unknown task turns_kw: did you mean turns_kv?")
