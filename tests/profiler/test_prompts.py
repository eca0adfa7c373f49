"""Calibration prompts: exact length, whole questions, the same on every run, and clear refusals."""

import json
import re
from itertools import pairwise

import pytest
import torch

from hfsparse.errors import UsageError
from hfsparse.profiler.prompts import calibration as prompts
from hfsparse.profiler.prompts.calibration import make_prompts
from tests.tiny import tokenizer


def text(prompt, chat=False):
    return tokenizer(chat).decode(prompt.ids[0])


def answer(prompt, chat=False):
    return tokenizer(chat).decode(prompt.ids[0, slice(*prompt.answer_span)])


def write(path, *rows):
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("length", [1000, 1023, 2048, 5001])
def test_every_prompt_has_exactly_the_length_asked(length, chat):
    made = make_prompts(tokenizer(chat), length, 8, seed=0)
    assert [prompt.ids.shape for prompt in made] == [(1, length)] * 8
    assert all(prompt.ids.dtype == torch.long for prompt in made)


def test_kinds_come_in_turn_and_swap_their_ground_every_round():
    assert [prompt.name for prompt in make_prompts(tokenizer(), 1500, 8, seed=0)] == [
        "retrieval-prose-0",
        "multihop-code-1",
        "prose-2",
        "code-3",
        "retrieval-code-4",
        "multihop-prose-5",
        "prose-6",
        "code-7",
    ]


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("length", [1000, 3000])
def test_a_retrieval_answer_is_whole_at_the_end_and_its_facts_are_hidden_above(length, chat):
    for seed in range(10):
        for prompt in make_prompts(tokenizer(chat), length, 5, seed)[::4]:
            assert prompt.answer_span[1] == length
            before = text(prompt, chat)[: -len(answer(prompt, chat))]
            for line in answer(prompt, chat).splitlines():
                key, value = line.rstrip(".").replace(" is in room ", " is ").split(" is ")
                facts = (f"{key} = {value}\n", f"{key} has moved to room {value}.\n")
                assert sum(before.count(fact) for fact in facts) == 1
            assert before.endswith("?\n<assistant>" if chat else "?\n")


def test_a_multihop_answer_follows_from_the_facts_in_their_order():
    for seed in range(10):
        in_code, in_prose = (make_prompts(tokenizer(), 2000, 6, seed)[i] for i in (1, 5))

        names, value = answer(in_code).split(". The value of ")
        chain, before = names.split(", then "), text(in_code)
        steps = [f"{chain[0]} = {value.split(' is ')[1].rstrip('.')}\n"]
        steps += [f"{new} = {old}\n" for old, new in pairwise(chain)]
        places = [before.index(step) for step in steps]
        assert places == sorted(places)
        assert len(chain) > 2

        people, holder = answer(in_prose).split(". Now ")
        hands, before = people.split(", then "), text(in_prose)
        assert holder == f"{hands[-1]} has it."
        places = []
        for giver, taker in pairwise(hands):
            (line,) = [x for x in before.splitlines() if x.startswith(f"{giver} gave")]
            assert line.endswith(f" to {taker}.")
            places.append(before.index(line))
        assert places == sorted(places)


def test_facts_are_spread_over_the_whole_depth():
    (prompt,) = make_prompts(tokenizer(), 6000, 1, seed=3)
    body = text(prompt)
    depths = [match.start() / len(body) for match in re.finditer("^Staff note:", body, re.M)]
    assert len(depths) == 8
    assert depths[0] < 0.2
    assert depths[-1] > 0.7


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    first, again, other = (make_prompts(tokenizer(), 1200, 4, seed) for seed in (5, 5, 6))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.ids, b.ids) for a, b in zip(first, other, strict=True))


def test_more_samples_keep_the_first_ones_so_that_a_run_can_grow():
    few, more = (
        make_prompts(tokenizer(), 1200, 3, seed=0),
        make_prompts(tokenizer(), 1200, 6, seed=0),
    )
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(few, more, strict=False))


def test_the_wording_is_not_that_of_ruler():
    for prompt in make_prompts(tokenizer(), 2000, 8, seed=0):
        for phrase in ("special magic", "VAR ", "needle", "grass is green"):
            assert phrase not in text(prompt)


def test_plain_prompts_start_with_the_bos_token_only_where_the_tokenizer_adds_it():
    adding = tokenizer(chat=False)
    assert all(
        prompt.ids[0, 0] != adding.bos_token_id for prompt in make_prompts(adding, 1000, 4, 0)
    )
    assert make_prompts(tokenizer(chat=True), 1000, 1, 0)[0].ids[0, 0] == adding.bos_token_id


def test_prose_falls_back_to_docstrings_where_python_has_no_help_topics(monkeypatch):
    usual = make_prompts(tokenizer(), 1000, 3, seed=0)[2]
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    fallback = make_prompts(tokenizer(), 1000, 3, seed=0)[2]
    assert fallback.ids.shape == (1, 1000)
    assert not torch.equal(usual.ids, fallback.ids)
    assert "import " not in text(fallback).splitlines()[0]


def test_a_short_source_is_repeated_to_fill_a_long_prompt(monkeypatch):
    monkeypatch.setattr(prompts, "_read_prose", lambda: {"only": "One line, said again and again."})
    prompt = make_prompts(tokenizer(), 1000, 3, seed=0)[2]
    assert text(prompt).count("One line") > 10


def test_a_python_without_sources_asks_for_data(monkeypatch, tmp_path):
    monkeypatch.setattr(prompts, "_locate", lambda module: tmp_path / module)
    with pytest.raises(UsageError, match=r"has no code to calibrate with .* give --data"):
        make_prompts(tokenizer(), 1000, 4, seed=0)


def test_a_length_with_no_room_for_the_question_says_how_many_tokens_it_needs():
    with pytest.raises(
        UsageError, match=r"prompts of 64 tokens are too short: .* needs (\d+)"
    ) as e:
        make_prompts(tokenizer(), 64, 1, seed=0)
    needed = int(str(e.value).split("needs ")[1].split(";")[0])
    assert make_prompts(tokenizer(), needed, 1, seed=0)[0].ids.shape == (1, needed)
    with pytest.raises(UsageError, match="too short"):
        make_prompts(tokenizer(), needed - 1, 1, seed=0)


# ---- --data


def test_own_texts_lose_their_start_and_keep_their_end(tmp_path):
    body = "".join(f"line {i}\n" for i in range(400))
    file = write(tmp_path / "own.jsonl", {"text": f"{body}What is at the end?"})
    (prompt,) = make_prompts(tokenizer(), 300, 4, seed=0, data=file)
    assert prompt.name == "data-1"
    assert prompt.ids.shape == (1, 300)
    assert prompt.answer_span is None
    assert f"{body}What is at the end?".endswith(text(prompt))


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_own_prompts_keep_question_answer_and_the_chat_frame(tmp_path, chat):
    body = "".join(f"line {i}\n" for i in range(400))
    row = {"prompt": f"{body}What is 6 x 7?", "answer": "It is 42."}
    (prompt,) = make_prompts(
        tokenizer(chat), 300, 1, seed=0, data=write(tmp_path / "own.jsonl", row)
    )
    assert prompt.ids.shape == (1, 300)
    assert answer(prompt, chat) == "It is 42."
    if chat:
        assert text(prompt, chat).startswith("<s><user>")
        assert text(prompt, chat).endswith("What is 6 x 7?\n<assistant>It is 42.")


def test_own_texts_that_are_too_short_are_left_out(tmp_path):
    rows = [{"text": "short"}, {"text": "long enough " * 200}, {"text": "also long " * 300}]
    file = write(tmp_path / "own.jsonl", *rows)
    made = make_prompts(tokenizer(), 300, 8, seed=0, data=file)
    assert {prompt.name for prompt in made} == {"data-2", "data-3"}
    assert len(make_prompts(tokenizer(), 300, 1, seed=0, data=file)) == 1


LONG = {"text": "word " * 2000}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (["", "  "], "is empty"),
        ([LONG, "{not json"], "line 2 is not JSON"),
        ([LONG, "[1, 2]"], 'line 2: expected an object with "text", or "prompt"'),
        ([LONG, "", {"question": "x"}], 'line 3: expected an object with "text", or "prompt"'),
        ([{"text": 7}], "line 1: text is not a string"),
        ([{"prompt": "word " * 900, "answer": ["x"]}], "line 1: answer is not a string"),
        ([{"text": "abc"}, {"text": "abcd"}], r"no text has 300 tokens \(the longest has \d\)"),
        ([{"prompt": "a", "answer": "word " * 900}], "line 1: the answer leaves no room"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_unusable_calibration_file_is_one_sentence(tmp_path, rows, message):
    file = write(tmp_path / "own.jsonl", *rows)
    with pytest.raises(UsageError, match=message) as error:
        make_prompts(tokenizer(), 300, 4, seed=0, data=file)
    assert "own.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_unreadable_calibration_file_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="there is no calibration file"):
        make_prompts(tokenizer(), 300, 4, seed=0, data=tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="can't read the calibration file"):
        make_prompts(tokenizer(), 300, 4, seed=0, data=tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't read the calibration file"):
        make_prompts(tokenizer(), 300, 4, seed=0, data=tmp_path / "binary")
