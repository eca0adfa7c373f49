from collections import Counter

import pytest

from hfsparse_eval.tasks.invented_documents import one_hop, two_hops
from hfsparse_eval.tasks.needle_words import SPELLINGS, spell


def test_spellings_are_all_distinct():
    some = [spell(n) for n in SPELLINGS[:30_000]]
    assert len(set(some)) == len(some)
    assert spell(SPELLINGS[-1]) not in some


@pytest.mark.parametrize("book", [one_hop, two_hops])
def test_each_answer_stands_in_one_document_of_the_book_and_in_no_question(book):
    book = book()
    assert len(book.documents) == len(set(book.documents)) == 2000
    assert len(book.questions) == len({question.text for question in book.questions}) == 3200
    for question in book.questions[::41]:
        (answer,) = question.answers
        homes = [i for i, document in enumerate(book.documents) if answer in document]
        assert homes == [question.gold[-1]]
        assert answer not in question.text


def test_the_second_hop_needs_the_first():
    """The person's document names the town and lacks the answer; the town's lacks the person."""
    book = two_hops()
    for question in book.questions[::41]:
        person, town = (book.documents[i] for i in question.gold)
        name = person.split("\n")[0]
        assert name in question.text
        assert town.split("\n")[0] in person
        assert town.split("\n")[0] not in question.text
        assert name not in town
        assert question.answers[0] not in person


def test_no_name_serves_two_people_or_towns():
    titles = Counter(document.split("\n")[0] for document in one_hop().documents)
    assert max(titles.values()) == 1
