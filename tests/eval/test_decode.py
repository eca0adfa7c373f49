"""Long answers: their samples, their score by order, and agreement counted by hand."""

import hashlib
import re
from random import Random

import pytest

from hfsparse.plan import ModelId, Plan
from hfsparse_eval.report import sections
from hfsparse_eval.report.pairs import Cell, Outcome
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.samples import Case, Maker
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks import long_answers
from hfsparse_eval.tasks.scores import score
from tests.eval.running import goes_on

DECODES = {task.name: task for task in long_answers.TASKS}
GOLDEN = {
    "decode_keys": "c4ceea07fa0082cb",
    "decode_sort": "9503e8b195400990",
    "decode_sum": "f7fab7011f2f80d9",
    "decode_copy": "e0692383693af597",
}


@pytest.mark.parametrize("name", DECODES)
def test_a_seed_gives_this_sample_for_ever(name, monkeypatch):
    """Changed on purpose? Then scores before and after do not compare: say so in the changelog."""
    monkeypatch.setattr(text, "prose", lambda: tuple(f"Sentence {i} is short." for i in range(90)))
    made = DECODES[name].draw(Random(42), 60)
    assert hashlib.sha256(repr(made).encode()).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", DECODES)
def test_the_right_answer_scores_one_and_fits_its_room(name, tokenizer):
    maker = Maker(DECODES[name], 2000, Prompter(tokenizer))
    sample = maker.sample(Case(name, 2000, None, 0))
    assert 0.75 * 2000 < sample.real <= 2000
    room = len(tokenizer("\n".join(sample.answers), add_special_tokens=False).input_ids)
    assert room < sample.new_tokens < 0.6 * 2000
    shown = "".join(tokenizer.decode(sample.ids[low:high]) for low, high in sample.gold)
    numbers = [int(n) for n in re.findall(r"\d+", shown)]
    if name == "decode_keys":
        assert re.findall(r"KEY (\S+) =", shown) == list(sample.answers)
    if name == "decode_copy":
        assert re.search("<<(.*)>>", shown)[1].split() == list(sample.answers)
    if name == "decode_sort":
        assert sorted(numbers) == [int(answer) for answer in sample.answers]
    if name == "decode_sum":
        assert sum(numbers) == int(sample.answers[-1])
        assert numbers[0] + numbers[1] == int(sample.answers[0])
    said = "\n".join(sample.answers)
    assert score(said, sample.answers, "sequence") == 1
    assert score("\n".join(reversed(sample.answers)), sample.answers, "sequence") < 0.3


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("12, 15, 19, 20", 1.0),
        (" 12\n15 and then 19 (20)", 1.0),
        ("12, 15, 20", 0.75),
        ("12, 99, 19, 20", 0.75),
        ("112, 155, 190, 201", 0.0),
        ("20 19", 0.25),
        ("", 0.0),
    ],
)
def test_a_sequence_scores_by_the_words_in_their_order(said, expected):
    assert score(said, ("12", "15", "19", "20"), "sequence") == expected


def test_agreement_is_by_position_and_counts_an_early_end_as_different():
    def line(ids):
        return {"output_ids": ids, "score": 0.0}

    dense = [*range(20)]
    other = [*range(18), 99, 19]
    short = [*range(4)]
    assert sections.first_difference(sections.agreement(dense, other)) == 18
    assert sections.first_difference(sections.agreement(dense, short)) == 4
    assert sections.first_difference(sections.agreement(dense, dense)) is None
    arms = [line(ids) for ids in (dense, other, short)]
    cell = Cell("decode_sum", "512", [line(dense)] * 3, arms)
    (row,) = sections.by_position(Outcome({}, [cell])).rows
    # positions 0 to 15: 16 + 16 + 4 of 48 equal; 16 to 19: 4 + 3 + 0 of 12; first at 18 and 4
    assert row == ["decode_sum", "512", "1 of 3", "11", "75", "58", "–", "–", "–"]


def test_a_plan_that_drops_nothing_says_the_same_tokens(folder, model, tmp_path):
    Plan.full(ModelId.of(model)).save(tmp_path / "plan.yaml")
    words = ["decode", str(folder), "-o", str(tmp_path / "out"), "--lengths", "700"]
    words += ["--plan", str(tmp_path / "plan.yaml"), "--tasks", "decode_sum,decode_keys"]
    words += ["--max-new-tokens", "24", "--samples"]
    lines, report = goes_on(words, tmp_path / "out")
    said = {(line["id"], line["arm"]): line["output_ids"] for line in lines}
    assert len(said) == len(lines) == 8
    assert all(said[i, "dense"] == said[i, "sparse"] for i, _ in said)
    assert "| decode_sum | 700 | 2 of 2 | – | 100 | " in report
