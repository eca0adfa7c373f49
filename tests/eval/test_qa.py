"""SQuAD and HotpotQA in their published forms, by hand, and what is no such file."""

import json
import sys
from random import Random
from types import SimpleNamespace

import pytest

from hfsparse.errors import UsageError
from hfsparse_eval.tasks import documents as qa

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Boats",
            "paragraphs": [
                {
                    "context": "The Wren is a boat of oak. It was built in 1903 by Ann Lee.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "Who built the Wren?",
                            "is_impossible": False,
                            "answers": [
                                {"text": "Ann Lee", "answer_start": 51},
                                {"text": "Ann Lee", "answer_start": 51},
                                {"text": "Lee", "answer_start": 55},
                            ],
                        },
                        {"id": "2", "question": "Who?", "is_impossible": True, "answers": []},
                    ],
                },
                {
                    "context": "The Gull is a ferry.",
                    "qas": [
                        {"id": "4", "question": "Whose?", "is_impossible": True, "answers": []}
                    ],
                },
                {
                    "context": "The Teal sank off Hull.",
                    "qas": [
                        {
                            "id": "3",
                            "question": "Where did the Teal sink?",
                            "answers": [{"text": "off Hull", "answer_start": 14}],
                        }
                    ],
                },
            ],
        }
    ],
}


def _hotpot(question, answer, towns, support):
    return {
        "_id": question,
        "question": question,
        "answer": answer,
        "context": [
            [town, [f"{town} is a town.", f" Its river is the {town}a."]] for town in towns
        ],
        "supporting_facts": [[town, 0] for town in support],
    }


HOTPOT = [
    _hotpot("Which river is in Arl?", "Arla", ["Arl", "Bex"], ["Arl"]),
    _hotpot("Are Cam and Bex towns?", "yes", ["Bex", "Cam"], ["Cam", "Bex", "Cam"]),
]


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "data.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_squad_keeps_answerable_questions_with_each_answer_once(file):
    book, mark = qa.squad(file(SQUAD))
    assert [q.text for q in book.questions] == ["Who built the Wren?", "Where did the Teal sink?"]
    assert [q.answers for q in book.questions] == [("Ann Lee", "Lee"), ("off Hull",)]
    assert [q.gold for q in book.questions] == [(0,), (2,)]
    assert book.documents[2] == "The Teal sank off Hull."
    assert mark.startswith("data.json, sha256:")
    assert mark != qa.squad(file(json.dumps(SQUAD, indent=1)))[1]


def test_paragraphs_that_answer_nothing_are_documents_too(file):
    assert "The Gull is a ferry." in qa.squad(file(SQUAD))[0].documents


def test_hotpotqa_brings_all_paragraphs_and_knows_which_answer(file):
    book, _ = qa.hotpotqa(file(HOTPOT))
    assert book.documents == tuple(
        f"{town}\n{town} is a town. Its river is the {town}a." for town in ("Arl", "Bex", "Cam")
    )
    first, second = book.questions
    assert (first.answers, first.needed, first.gold) == (("Arla",), (0, 1), (0,))
    assert (second.answers, second.needed, second.gold) == (("yes",), (1, 2), (1, 2))


def test_a_draft_has_rulers_words_and_the_gold_document(file):
    task = qa.DocumentQA("qa_2", lambda: qa.hotpotqa(file(HOTPOT))[0])
    for seed in range(20):
        made = task.draw(Random(seed), 5)
        instruction = (
            "Answer the question based on the given documents. Only give me the answer and do not "
            "output any other words."
        )
        assert made.before == f"{instruction}\n\nThe following are given documents.\n\n"
        assert made.after.startswith(f"\n\n{instruction}\n\nQuestion: ")
        assert made.prefix == " Answer:"
        blocks = made.context.split("\n\n")
        assert [b.split(":\n")[0] for b in blocks] == [f"Document {i}" for i in range(1, 8)]
        golds = [made.context[low:high] for low, high in made.gold]
        assert set(golds) <= set(blocks)
        wanted = {"Arla": {"Arl"}, "yes": {"Bex", "Cam"}}[made.answers[0]]
        assert {gold.split("\n")[1] for gold in golds} == wanted


def test_few_documents_are_repeated_but_never_those_that_answer(file):
    task = qa.DocumentQA("qa_1", lambda: qa.squad(file(SQUAD))[0])
    made = task.draw(Random(0), 50)
    assert made.context.count("Document ") == 51
    assert sum(made.context.count(answer) for answer in made.answers[:1]) == 1


@pytest.mark.parametrize("read", [qa.squad, qa.hotpotqa])
@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"a": 1}', '{"data": [{"title": 1}]}', '[{"question": "?"}]', "null"],
)
def test_another_form_is_one_error_that_names_the_file(read, content, file):
    path = file(content)
    with pytest.raises(UsageError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path} is not ")
    assert "published JSON" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_form_is_not_taken_for_the_other(file):
    with pytest.raises(UsageError, match="is not SQuAD's published JSON"):
        qa.squad(file(HOTPOT))
    with pytest.raises(UsageError, match="is not HotpotQA's published JSON"):
        qa.hotpotqa(file(SQUAD))


@pytest.mark.parametrize("read", [qa.squad, qa.hotpotqa])
def test_a_missing_file_and_a_folder_are_one_error(read, tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UsageError, match=r": can't read: "):
            read(str(path))


def test_files_of_too_little_are_one_error(file):
    with pytest.raises(UsageError, match="no question with an answer"):
        qa.squad(file({"data": []}))
    with pytest.raises(UsageError, match="no question with an answer"):
        qa.hotpotqa(file("[]"))
    with pytest.raises(UsageError, match="no document beside a question's own"):
        qa.hotpotqa(file(HOTPOT[:1]))


def test_datasets_gives_the_same_books_as_the_files(file, monkeypatch):
    asked = []
    squad = [
        {
            "question": entry["question"],
            "context": paragraph["context"],
            "answers": {"text": [answer["text"] for answer in entry["answers"]]},
        }
        for paragraph in SQUAD["data"][0]["paragraphs"]
        for entry in paragraph["qas"]
    ]
    hotpot = [
        {
            **item,
            "context": {
                "title": [title for title, _ in item["context"]],
                "sentences": [sentences for _, sentences in item["context"]],
            },
            "supporting_facts": {"title": [title for title, _ in item["supporting_facts"]]},
        }
        for item in HOTPOT
    ]

    def load_dataset(*name, split):
        asked.append((*name, split))
        return squad if "squad" in name[0] else hotpot

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert qa.squad("datasets")[0] == qa.squad(file(SQUAD))[0]
    assert qa.hotpotqa("datasets")[0] == qa.hotpotqa(file(HOTPOT))[0]
    assert asked == [
        ("rajpurkar/squad_v2", "validation"),
        ("hotpotqa/hotpot_qa", "distractor", "validation"),
    ]


def test_datasets_missing_or_offline_is_one_error(monkeypatch):
    def offline(*name, split):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(UsageError, match="can't load rajpurkar/squad_v2 by datasets: no network"):
        qa.squad("datasets")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="hotpotqa/hotpot_qa needs the datasets package"):
        qa.hotpotqa("datasets")
