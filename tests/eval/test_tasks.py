"""What holds of every task, and the two scores."""

import hashlib
from dataclasses import asdict
from random import Random

import pytest

from hfsparse_eval.tasks import TASKS, of_suite, with_books
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.documents import Book, DocumentQA, Question
from hfsparse_eval.tasks.needles import Niah
from hfsparse_eval.tasks.scores import clean, score
from hfsparse_eval.tasks.variable_tracking import VariableTracking
from hfsparse_eval.tasks.word_counting import CommonWords
from tests.eval.drafting import NEEDLE, draft

SUITE = of_suite("ruler")
RULERS = [name for name, task in SUITE.items() if task.ruler]
PLACED = [name for name, task in SUITE.items() if task.placed]
COUNTED = [name for name in SUITE if name not in PLACED]
GOLDEN = {  # of sentences of our own, as CPython's differ from one version to the next
    "niah_single_1": "061034cfa0067515",
    "niah_single_2": "3f412632e9d7f35e",
    "niah_single_3": "6408bd60c6b5664f",
    "niah_multikey_1": "2c4cee8da76eac74",
    "niah_multikey_2": "02f9a4972b96942c",
    "niah_multikey_3": "5fc187b1279f2c93",
    "niah_multivalue": "eb54be91b1d27cb4",
    "niah_multiquery": "f7260a46285021bf",
    "vt": "b9735f74c5d04e0e",
    "cwe": "56fd2200f3817cdf",
    "fwe": "ac5d4c2c33253b5a",
    "qa_1_invented": "2df10a66b93f33b4",
    "qa_2_invented": "026b354bad00ba98",
}


def test_the_tasks_are_rulers_with_its_token_caps_and_scores():
    assert {name: (task.new_tokens, task.metric) for name, task in SUITE.items() if task.ruler} == {
        "niah_single_1": (128, "all"),
        "niah_single_2": (128, "all"),
        "niah_single_3": (128, "all"),
        "niah_multikey_1": (128, "all"),
        "niah_multikey_2": (128, "all"),
        "niah_multikey_3": (128, "all"),
        "niah_multivalue": (128, "all"),
        "niah_multiquery": (128, "all"),
        "vt": (30, "all"),
        "cwe": (120, "all"),
        "fwe": (50, "all"),
        "qa_1_invented": (32, "part"),
        "qa_2_invented": (32, "part"),
    }


def test_given_questions_add_qa_1_and_qa_2_and_nothing_else():
    book = Book(("a", "b"), (Question("?", ("a",), (0,), (0,)),))
    assert with_books() == SUITE
    both = with_books(book, book)
    assert [name for name in both if name not in SUITE] == ["qa_1", "qa_2"]
    assert both["qa_1"].book() is book
    assert list(with_books(hotpotqa=book))[-1] == "qa_2"
    assert "qa_1" not in with_books(hotpotqa=book)


@pytest.mark.parametrize("name", TASKS)
def test_a_draft_depends_on_its_generator_only(name):
    first = asdict(draft(name, 7))
    draft(name, 8)
    assert asdict(draft(name, 7)) == first
    assert asdict(draft(name, 8)) != first


@pytest.mark.parametrize("name", RULERS)
def test_a_seed_gives_this_sample_for_ever(name, monkeypatch):
    """Changed on purpose? Then scores before and after do not compare: say so in the changelog."""
    monkeypatch.setattr(text, "prose", lambda: tuple(f"Sentence {i} is short." for i in range(90)))
    digest = hashlib.sha256(repr(draft(name, 42)).encode()).hexdigest()[:16]
    assert digest == GOLDEN[name]


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("seed", range(5))
def test_answers_stand_in_the_gold_spans_and_nowhere_else_as_answers(name, seed):
    made = draft(name, seed)
    golds = [made.context[a:b] for a, b in made.gold]
    assert len(set(golds)) == len(golds) > 0
    assert all(made.context.count(gold) == 1 for gold in golds)
    assert all(any(answer in gold for gold in golds) for answer in made.answers)
    check = GOLD.get(type(SUITE[name]))
    assert check or not SUITE[name].ruler
    if check:
        check(made, golds)


def check_needles(made, golds):
    check_each_gold_holds_its_answer(made, golds)
    values = [value for _, value in NEEDLE.findall(made.context)]
    assert all(values.count(answer) == 1 for answer in made.answers)


def check_each_gold_holds_its_answer(made, golds):
    assert len(golds) == len(made.answers) == len(set(made.answers))
    assert all(answer in gold for gold, answer in zip(golds, made.answers, strict=True))


def check_documents(made, golds):
    (answer,) = made.answers
    assert made.context.count(answer) == sum(gold.count(answer) for gold in golds) > 0


GOLD = {  # what more holds of gold spans, by the class of a task
    Niah: check_needles,
    VariableTracking: check_each_gold_holds_its_answer,
    DocumentQA: check_documents,
}


@pytest.mark.parametrize("name", SUITE)
@pytest.mark.parametrize("seed", range(5))
def test_neither_instruction_nor_question_nor_prefix_gives_an_answer_away(name, seed):
    made = draft(name, seed)
    asked = [made.after, made.prefix]
    if not isinstance(SUITE[name], CommonWords):  # its example may share a word with the list
        asked.append(made.before)
    assert [score(part, made.answers) for part in asked] == [0.0] * len(asked)
    assert made.answers
    assert all(answer in made.context for answer in made.answers)


@pytest.mark.parametrize("name", [name for name in RULERS if name in PLACED])
def test_depths_are_spread_over_the_whole_context(name):
    task = SUITE[name]
    size = 1500 if getattr(task, "haystack", "") == "prose" else 40
    drafts = [task.draw(Random(seed), size) for seed in range(80)]
    places = [low / len(made.context) for made in drafts for low, _ in made.gold]
    quarters = [sum(at / 4 <= p < (at + 1) / 4 for p in places) / len(places) for at in range(4)]
    assert all(0.12 < share < 0.4 for share in quarters), quarters
    assert all(0 <= made.depth <= 100 for made in drafts)


@pytest.mark.parametrize("name", COUNTED)
def test_counted_words_have_no_place(name):
    assert (draft(name).gold, draft(name).depth) == ((), None)


@pytest.mark.parametrize(
    ("output", "answers", "share", "part"),
    [
        (" 1234567.", ["1234567"], 1.0, 1.0),
        ("1234568", ["1234567"], 0.0, 0.0),
        ("", ["1234567"], 0.0, 0.0),
        ("abcde, FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"], 0.5, 1.0),
        ("4 1111111 and 2222222", ["2222222", "1111111"], 1.0, 1.0),
        ("123\x004567", ["1234567"], 0.0, 0.0),
        ("In the Middle Ages", ["middle ages", "the Middle Ages", "1066"], 2 / 3, 1.0),
        ("not at all", ["no"], 1.0, 1.0),  # RULER's own weakness, kept so that scores compare
    ],
)
def test_all_is_the_share_of_answers_found_and_part_whether_any_was(output, answers, share, part):
    assert score(output, answers) == score(output, answers, "all") == share
    assert score(output, answers, "part") == part


def test_clean_strips_and_turns_control_characters_into_line_breaks():
    assert clean(" \x07a\tb\x00 ") == "a\nb"
