"""RULER's thirteen tasks (arXiv 2404.06654), by their names and exact wording, and its two scores.

A task draws one `Draft` from a random generator and a haystack size; it knows no tokenizer.
Unlike RULER, keys and values are never repeated inside a sample, so an answer has one place.
"""

from __future__ import annotations

from hfsparse_eval.tasks import invented_documents as invented
from hfsparse_eval.tasks.documents import Book, DocumentQA
from hfsparse_eval.tasks.needles import Niah
from hfsparse_eval.tasks.variable_tracking import VariableTracking
from hfsparse_eval.tasks.word_counting import CommonWords, FrequentWords

Task = Niah | VariableTracking | CommonWords | FrequentWords | DocumentQA
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Niah("niah_single_1", "noise"),
        Niah("niah_single_2", "prose"),
        Niah("niah_single_3", "prose", value="uuid"),
        Niah("niah_multikey_1", "prose", keys=4),
        Niah("niah_multikey_2", "needles"),
        Niah("niah_multikey_3", "needles", key="uuid", value="uuid"),
        Niah("niah_multivalue", "prose", values=4),
        Niah("niah_multiquery", "prose", keys=4, queries=4),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
        DocumentQA("qa_1_invented", invented.one_hop),
        DocumentQA("qa_2_invented", invented.two_hops),
    )
}


def with_books(squad: Book | None = None, hotpotqa: Book | None = None) -> dict[str, Task]:
    """TASKS, and the real qa_1 and qa_2 where their questions are given."""
    books = {"qa_1": squad, "qa_2": hotpotqa}
    real = {name: DocumentQA(name, lambda b=book: b) for name, book in books.items() if book}
    return TASKS | real
