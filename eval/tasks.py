"""RULER's thirteen tasks (arXiv 2404.06654), by their names and exact wording, and its two scores.

A task draws one `Draft` from a random generator and a haystack size; it knows no tokenizer.
Unlike RULER, keys and values are never repeated inside a sample, so an answer has one place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from . import invented
from .counting import CommonWords, FrequentWords
from .niah import Niah
from .qa import Book, DocumentQA
from .tracing import VariableTracking

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


WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


def with_books(squad: Book | None = None, hotpotqa: Book | None = None) -> dict[str, Task]:
    """TASKS, and the real qa_1 and qa_2 where their questions are given."""
    books = {"qa_1": squad, "qa_2": hotpotqa}
    real = {name: DocumentQA(name, lambda b=book: b) for name, book in books.items() if book}
    return TASKS | real


def score(output: str, answers: Sequence[str], metric: str = "all") -> float:
    """RULER's two scores. `all`: the share of the answers found; `part`: 1 if any was found.

    And one of long answers, `sequence`: the share of the words wanted that came in their order.

    An answer is found where the output contains it, in any case: safe for numbers, names and coded
    words, but of qa_2's answers "no" is also found in "not". Both scores only rise as text grows.
    """
    said = clean(output).lower()
    if metric == "sequence":
        match = SequenceMatcher(None, answers, WORD.findall(said), autojunk=False)
        return sum(block.size for block in match.get_matching_blocks()) / len(answers)
    found = [answer.lower() in said for answer in answers]
    return float(any(found)) if metric == "part" else sum(found) / len(found)


def clean(output: str) -> str:
    """Stripped, with control characters made line breaks, as RULER does before it scores."""
    return "".join("\n" if ord(c) < 32 else c for c in output.strip()).strip()
