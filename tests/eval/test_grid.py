"""Needles of a grid: several, and in a haystack of the user's own."""

import json
from random import Random

import pytest
from typer.testing import CliRunner

from hfsparse.errors import UsageError
from hfsparse_eval.cli import app
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.samples import Case, Maker
from hfsparse_eval.tasks import TASKS
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.needles import hide


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
@pytest.mark.parametrize("depth", [0, 40, 100])
def test_several_needles_follow_evenly_from_the_depth_on(name, depth):
    task, _ = hide(TASKS[name], 4, None)
    made = task.draw(Random(1), 3000 if task.haystack == "prose" else 200, depth)
    assert task.name == f"{name}_x4"
    assert len(made.answers) == len(set(made.answers)) == len(made.gold) == 4
    for (low, high), answer in zip(made.gold, made.answers, strict=True):
        assert answer in made.context[low:high]
        assert made.after.count(made.context[low:high].split(" for ")[1].split(" is")[0]) == 1
    where = sorted(100 * low / len(made.context) for low, _ in made.gold)
    wanted = [depth + (100 - depth) * i / 4 for i in range(4)]
    assert where == pytest.approx(wanted, abs=6)


def test_one_needle_is_the_task_as_it_was():
    task, marks = hide(TASKS["niah_single_2"], 1, None)
    assert (task, marks) == (TASKS["niah_single_2"], {})


def test_the_haystack_is_the_users_text_even_without_sentences(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("one two three\nfour " * 200)
    task, marks = hide(TASKS["niah_single_2"], 1, file)
    assert marks == {"prose": text.read(file)[1]}
    made = task.draw(Random(1), 600, 50)
    (low, high) = made.gold[0]
    rest = made.context[:low] + made.context[high:]
    assert set(rest.split()) == {"one", "two", "three", "four"}
    assert len(rest.split()) == 600
    assert 0.4 < low / len(made.context) < 0.6


@pytest.mark.parametrize(
    "content",
    [
        "海边的风很大，船慢慢地回来了。" * 400,
        "海边的风很大船慢慢地回来了" * 400,
        "ลมทะเลแรงมาก" * 400,
        "x" * 20_000,
    ],
    ids=["Chinese", "no sentences", "Thai", "one word"],
)
@pytest.mark.parametrize("length", [700, 4200])
def test_a_haystack_without_blanks_has_places_and_any_length(content, length, tmp_path, tokenizer):
    (tmp_path / "own.txt").write_text(content, encoding="utf-8")
    task, _ = hide(TASKS["niah_single_2"], 1, tmp_path / "own.txt")
    maker = Maker(task, length, Prompter(tokenizer))
    for depth in (0, 50, 100):
        sample = maker.sample(Case(task.name, length, depth, 0))
        assert length / 2 < sample.real <= length
    made = task.draw(Random(1), 600, 50)
    (low, high) = made.gold[0]
    assert 0.4 < low / len(made.context) < 0.6
    rest = made.context[:low] + made.context[high:]
    assert rest.replace(" ", "") in content * 4


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2"])
def test_there_is_room_for_many_needles_and_their_answers(name, tokenizer):
    task, _ = hide(TASKS[name], 45, None)
    sample = Maker(task, 6000, Prompter(tokenizer)).sample(Case(task.name, 6000, 0, 0))
    assert len(set(sample.answers)) == 45
    said = ", ".join(sample.answers)
    assert len(tokenizer(said).input_ids) < sample.new_tokens
    few, _ = hide(TASKS[name], 1, None)
    assert few.fitted(Prompter(tokenizer).tokens, 1900) == few


def test_more_needles_than_fit_a_sample_are_refused():
    with pytest.raises(UsageError, match="needles is 101: give up to 100"):
        hide(TASKS["niah_single_2"], 101, None)


def test_haystacks_that_cannot_be_used_are_one_clear_sentence(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UsageError, match=r"empty\.txt holds no words: give a text file"):
        hide(TASKS["niah_single_2"], 1, tmp_path / "empty.txt")
    with pytest.raises(UsageError, match=r"absent\.txt: can't read: No such file"):
        hide(TASKS["niah_single_2"], 1, tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="niah_single_1 makes its own haystack: --haystack goes"):
        hide(TASKS["niah_single_1"], 1, tmp_path / "empty.txt")


def test_the_command_names_haystack_and_needles_and_refuses_another(folder, tmp_path):
    (tmp_path / "own.txt").write_text("The sea is deep. The sky is high. " * 50)
    words = ["needle", str(folder), "-o", str(tmp_path / "out"), "--lengths", "700"]
    words += ["--depths", "0,50", "--samples", "1", "--max-new-tokens", "2", "--needles", "2"]
    result = CliRunner().invoke(app, [*words, "--haystack", str(tmp_path / "own.txt")])
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(x)["id"] for x in lines] == [
        f"niah_single_2_x2-700-at{d}-0000" for d in (0, 50)
    ]
    assert (tmp_path / "out" / "heatmap.png").exists()
    assert "own.txt, sha256:" in (tmp_path / "out" / "report.md").read_text()
    assert "holds results with prose own.txt" in CliRunner().invoke(app, words).stderr
    assert "needles is 0: give 1 or more" in CliRunner().invoke(app, [*words[:-1], "0"]).stderr
