import sys

import pytest

from hfsparse_eval.tasks import haystack as text


@pytest.fixture
def fresh():
    yield text.prose.cache_clear(), text.prose_source.cache_clear()
    text.prose.cache_clear()
    text.prose_source.cache_clear()


def test_prose_is_plain_sentences_each_once():
    sentences = text.prose()
    assert len(sentences) == len(set(sentences)) > 500
    assert all(s[0].isupper() and s[-1] == "." for s in sentences)
    assert not any(mark in s for s in sentences for mark in ("::=", ">>>", "\n", "magic number"))


def test_prose_names_cpython_and_its_size():
    words = len(" ".join(text.prose()).split())
    assert text.prose_source().startswith("CPython 3.")
    assert f"pydoc_data.topics, {words} words, sha256:" in text.prose_source()


def test_docstrings_take_over_where_pydoc_data_is_missing(monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "standard-library docstrings" in text.prose_source()
    assert len(text.prose()) > 500


def test_keys_are_many_distinct_and_adjective_noun():
    spelled = {text.key(number) for number in text.KEYS}
    assert len(spelled) == len(text.KEYS) > 100_000
    assert len(set(text.ADJECTIVES)) == len(text.ADJECTIVES) >= 100
    assert len(set(text.NOUNS)) == len(text.NOUNS) >= 150
    assert all(word.isalpha() and word.islower() for word in (*text.ADJECTIVES, *text.NOUNS))
    assert text.key(0) == "able-acorn"
