"""The user's own questions: what a file may hold, and that every flip is listed."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import hfsparse
from hfsparse.errors import UsageError
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse_eval.cli import app
from hfsparse_eval.run import generate, runner
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.samples import OwnSuite
from hfsparse_eval.tasks.own_questions import read

GOOD = {"prompt": "Where is the sea?", "answers": ["here", "there"]}
TALK = {**GOOD, "id": "talk", "turns": [{"prompt": "And the sky?", "answers": ["above"]}]}


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "qa.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_prompts_are_run_as_they_are_and_turns_follow(file, tokenizer):
    items, mark = read(file(GOOD, "", TALK), new_tokens=5)
    assert mark.startswith("qa.jsonl, sha256:")
    assert [(item.id, item.line) for item in items] == [("1", 1), ("talk", 3)]
    plain = OwnSuite(items, Prompter(tokenizer, "never", known=True), 2048)
    one, talk = map(plain.sample, plain.cases)
    assert tokenizer.decode(one.ids) == "<|bos|>Where is the sea?"
    assert (one.answers, one.metric, one.turns) == (("here", "there"), "part", ())
    assert one.length >= one.real == len(one.ids) - 1 + 5 > one.length // 2
    assert tokenizer.decode(talk.ids) == "<|bos|>Where is the sea?"
    assert [tokenizer.decode(turn.ids) for turn in talk.turns] == ["", "\n\nAnd the sky?"]
    chat = OwnSuite(items, Prompter(tokenizer, known=True), 2048)
    one, talk = map(chat.sample, chat.cases)
    asked = "<|bos|><|user|>\nWhere is the sea?<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(one.ids) == tokenizer.decode(talk.ids) == asked
    said = "<|end|>\n<|user|>\nAnd the sky?<|end|>\n<|assistant|>\n"
    assert [tokenizer.decode(turn.ids) for turn in talk.turns] == ["", said]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[]", "expected an object with answers, id, prompt, turns"),
        ({**GOOD, "answer": "x"}, "expected an object with answers, id, prompt, turns"),
        ({"answers": ["x"]}, "prompt is missing, empty or no string"),
        ({**GOOD, "prompt": " "}, "prompt is missing, empty or no string"),
        ({**GOOD, "answers": "x"}, "answers is no list with an answer in it"),
        ({**GOOD, "answers": []}, "answers is no list with an answer in it"),
        ({**GOOD, "answers": ["x", ""]}, "answers holds something that is empty or no string"),
        ({**GOOD, "turns": ["x"]}, "turns is no list of objects"),
        ({**GOOD, "turns": [{"prompt": "x"}]}, "answers is no list with an answer in it"),
        ({**GOOD, "id": 1}, "id 1 is that of line 1, too"),
    ],
)
def test_a_bad_line_is_one_error_with_its_number(row, told, file):
    with pytest.raises(UsageError, match=r"qa\.jsonl, line 2: ") as error:
        read(file(GOOD, row, GOOD))
    assert told in str(error.value)


def test_files_without_questions_and_prompts_beyond_the_window_are_refused(file, tmp_path):
    with pytest.raises(UsageError, match="holds no question"):
        read(file(""))
    with pytest.raises(UsageError, match=r"absent\.jsonl: can't read: No such file"):
        read(tmp_path / "absent.jsonl")


def test_a_prompt_beyond_the_window_names_its_line(file, tokenizer):
    items, _ = read(file(GOOD, {**GOOD, "prompt": "word " * 300}))
    with pytest.raises(UsageError, match=r"line 2 \(id 2\) needs \d+ tokens .* window is 256"):
        OwnSuite(items, Prompter(tokenizer), 256)


def test_a_failure_is_noted(file, folder, tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError("none left")

    monkeypatch.setattr(runner, "answer", fail)
    words = ["custom", str(folder), "--data", str(file(GOOD)), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert "1 rounds failed, the first at 1 under dense (MemoryError: none left)" in result.stderr
    told = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 of 1 | MemoryError: none left |" in told


def test_a_prompt_of_ones_own_has_no_part_before_the_question(file):
    words = ["custom", "absent", "--data", str(file(GOOD)), "--arm", "kvpress:SnapKV:0.5:agnostic"]
    assert "leave out :agnostic" in CliRunner().invoke(app, words).stderr


def test_a_question_without_turns_leaves_no_answer_for_the_next(file):
    words = ["custom", "absent", "--data", str(file(GOOD)), "--answers", "gold"]
    assert "qa.jsonl has none: leave it out" in CliRunner().invoke(app, words).stderr


def test_the_report_lists_each_flipped_id_with_both_answers(
    file, folder, model, tokenizer, tmp_path
):
    """Right is what the dense model says, so that every change of the sparse one is a flip."""
    rows = [{"prompt": f"{n} " + "the sea and the sky, " * 20, "answers": ["?"]} for n in range(4)]
    layer = Layer(("s",) * 4, ("s",) * 2, ("ring",) * 2)
    full = Plan.full(ModelId.of(model))
    plan = replace(full, patterns={"s": Streaming(sink=4, recent=8)}, layers=(layer,) * 2)
    items, _ = read(file(*rows), new_tokens=6)
    suite = OwnSuite(items, Prompter(tokenizer), 2048)
    samples = [suite.sample(case) for case in suite.cases]
    dense = {s.id: generate.answer(model, tokenizer, s).text for s in samples}
    with hfsparse.patch(model, plan):
        sparse = {s.id: generate.answer(model, tokenizer, s).text for s in samples}
    changed = {i for i in dense if dense[i] not in sparse[i]}
    assert changed
    path = file(*({**row, "answers": [dense[str(n)]]} for n, row in enumerate(rows, 1)))
    plan.save(tmp_path / "plan.yaml")
    words = ["custom", str(folder), "--data", str(path), "-o", str(tmp_path / "out")]
    words += ["--plan", str(tmp_path / "plan.yaml"), "--max-new-tokens", "6"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    told = (tmp_path / "out" / "report.md").read_text().split("## Flipped: plan")[1]
    listed = {line.split(" | ")[0].strip("| ") for line in told.split("##")[0].splitlines()[4:]}
    assert listed - {""} == changed
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    refused = CliRunner().invoke(app, [*words, "--metric", "all"])
    assert "holds results with metric part, this run has all" in refused.stderr
