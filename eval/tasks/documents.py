"""Questions about documents: RULER's qa_1 (SQuAD) and qa_2 (HotpotQA), from their published files.

Unlike RULER, the documents are shuffled anew for each sample, so an answer may stand at any depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random

from hfsparse import reading
from hfsparse.errors import UsageError
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.draft import Draft, mean_depth, spans_of

WITH_DATA = {"qa_1": "squad", "qa_2": "hotpotqa"}  # and the options that give their data
HUB = "datasets"  # in place of a file: take the data set of that name from the Hugging Face hub
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]  # any of them will do
    needed: tuple[int, ...]  # documents shown with it, by their place in the book
    gold: tuple[int, ...]  # those of them that answer it


@dataclass(frozen=True)
class Book:
    documents: tuple[str, ...]  # each once
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class DocumentQA:
    """A question, the documents that answer it, and others from the same book."""

    name: str
    book: Callable[[], Book]
    new_tokens: int = 32
    metric: str = "part"
    suite, ruler, default, placed = "ruler", True, True, True

    def step(self, length: int) -> int:
        """A document, not RULER's ten: those would leave a third of 4096 tokens empty."""
        return 1

    def fitted(self, tokens: Callable[[str], int], length: int) -> DocumentQA:
        return self

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        """`size` counts the documents beside the needed ones; few are repeated to be enough."""
        book = self.book()
        question = rng.choice(book.questions)
        others = [i for i in range(len(book.documents)) if i not in question.needed]
        rng.shuffle(others)
        shown = [*question.needed, *islice(cycle(others), size)]
        rng.shuffle(shown)
        blocks = [f"Document {at}:\n{book.documents[i]}" for at, i in enumerate(shown, 1)]
        places = sorted(shown.index(i) for i in question.gold)
        spans = spans_of(blocks, "\n\n")
        return Draft(
            before=f"{INSTRUCTION}\n\nThe following are given documents.\n\n",
            context="\n\n".join(blocks),
            after=f"\n\n{INSTRUCTION}\n\nQuestion: {question.text}",
            prefix=" Answer:",
            answers=question.answers,
            gold=tuple(spans[place] for place in places),
            depth=mean_depth(places, len(blocks)),
        )


def name_stand_in(name: str) -> str:
    """The task of invented questions that is run where the data of `name` is not given."""
    return f"{name}_invented"


def read_books(squad_source: str | None, hotpotqa_source: str | None) -> tuple[dict, dict]:
    """The books that are given, by the option that gives them, and which data each is of."""
    given = {"squad": (squad, squad_source), "hotpotqa": (hotpotqa, hotpotqa_source)}
    found = {name: read(source) for name, (read, source) in given.items() if source is not None}
    books = {name: book for name, (book, _) in found.items()}
    return books, {name: mark for name, (_, mark) in found.items()}


def squad(source: str) -> tuple[Book, str]:
    """SQuAD's answerable questions, and which data they are of: a file, or the hub's squad_v2."""
    if source == HUB:
        rows = _hub("rajpurkar/squad_v2")
        found = [(row["question"], row["answers"]["text"], row["context"]) for row in rows]
        return _checked(_squad_book(found), source), "rajpurkar/squad_v2, validation, by datasets"

    def read(content) -> Book:
        return _squad_book(
            [
                (qa["question"], [answer["text"] for answer in qa["answers"]], paragraph["context"])
                for article in content["data"]
                for paragraph in article["paragraphs"]
                for qa in paragraph["qas"]
            ]
        )

    return _file("SQuAD", source, read)


def hotpotqa(source: str) -> tuple[Book, str]:
    """HotpotQA's questions, each with its ten paragraphs, and which data they are of."""
    if source == HUB:
        rows = _hub("hotpotqa/hotpot_qa", "distractor")
        found = [
            (
                row["question"],
                row["answer"],
                zip(row["context"]["title"], row["context"]["sentences"], strict=True),
                set(row["supporting_facts"]["title"]),
            )
            for row in rows
        ]
        mark = "hotpotqa/hotpot_qa, distractor validation, by datasets"
        return _checked(_hotpot_book(found), source), mark

    def read(content) -> Book:
        return _hotpot_book(
            [
                (
                    item["question"],
                    item["answer"],
                    item["context"],
                    {title for title, _ in item["supporting_facts"]},
                )
                for item in content
            ]
        )

    return _file("HotpotQA", source, read)


def _squad_book(found: list) -> Book:
    """Of (question, its answers, none if it can't be answered, paragraph)."""
    place = _places(context for _, _, context in found)
    questions = [
        Question(text, tuple(dict.fromkeys(answers)), (place[context],), (place[context],))
        for text, answers, context in found
        if answers
    ]
    return Book(tuple(place), tuple(questions))


def _hotpot_book(found: list) -> Book:
    """Of (question, answer, (title, sentences) of each paragraph, titles that support it)."""
    shown = [
        {title: f"{title}\n{''.join(sentences)}" for title, sentences in paragraphs}
        for _, _, paragraphs, _ in found
    ]
    place = _places(document for documents in shown for document in documents.values())
    questions = [
        Question(
            text,
            (answer,),
            tuple(dict.fromkeys(place[document] for document in documents.values())),
            tuple(place[document] for title, document in documents.items() if title in support),
        )
        for (text, answer, _, support), documents in zip(found, shown, strict=True)
        if support & documents.keys()
    ]
    return Book(tuple(place), tuple(questions))


def _places(documents: Iterable[str]) -> dict[str, int]:
    return {document: i for i, document in enumerate(dict.fromkeys(documents))}


def _checked(book: Book, source: str) -> Book:
    if not book.questions:
        raise UsageError(f"{source}: no question with an answer and its documents")
    if len(book.documents) <= max(len(question.needed) for question in book.questions):
        raise UsageError(f"{source}: no document beside a question's own: give a larger file")
    return book


def _file(form: str, source: str, read: Callable[[object], Book]) -> tuple[Book, str]:
    """The book that `read` makes of this JSON file, and the file's name and hash."""
    content, mark = text.read(Path(source))
    try:
        book = read(reading.parse(content))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UsageError(
            f"{source} is not {form}'s published JSON ({type(problem).__name__}: {problem}): "
            f"give its development file, or {HUB}"
        ) from None
    return _checked(book, source), mark


def _hub(*name: str):
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{name[0]} needs the datasets package: pip install datasets, or give a JSON file"
        ) from None
    try:
        return datasets.load_dataset(*name, split="validation")
    except Exception as problem:  # its kinds of network and cache errors have no common parent
        raise UsageError(f"can't load {name[0]} by datasets: {problem}; give a JSON file") from None
