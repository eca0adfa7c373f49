import re
from collections import Counter
from random import Random

import pytest

from hfsparse_eval.tasks.needle_words import SPELLINGS, WORDS, spell
from hfsparse_eval.tasks.word_counting import CommonWords, FrequentWords, distinct_words

NUMBERED = re.compile(r"(\d+)\. ([a-z]+)")


def count(text):
    return Counter(word for _, word in NUMBERED.findall(text))


@pytest.mark.parametrize(
    ("length", "often", "rarely", "example"),
    [(4095, 6, 1, (10, 3, 1)), (4096, 30, 3, (30, 10, 3))],
)
def test_cwe_counts_are_rulers(length, often, rarely, example):
    task = CommonWords().fitted(len, length)
    made = task.draw(Random(3), 25)
    counts = count(made.context)
    assert {word for word, n in counts.items() if n == often} == set(made.answers)
    assert sorted(counts.values()) == [rarely] * 25 + [often] * 10
    solved, shown = made.before.split("\nQuestion: ")
    others, often, rarely = example
    assert sorted(count(solved).values()) == [rarely] * others + [often] * 10
    listed = shown.split("in the list are: ")[1].split("\n\nBelow is a numbered list")[0]
    assert set(count(listed)) == {word for word, n in count(solved).items() if n == often}
    assert listed.startswith("1. ")


def test_cwe_numbers_run_through_and_the_question_is_rulers():
    made = CommonWords().draw(Random(3), 10)
    assert [int(n) for n, _ in NUMBERED.findall(made.context)] == list(range(1, 331))
    assert made.after == "\nQuestion: What are the 10 most common words in the above list?"
    assert made.prefix == " Answer: The top 10 words that appear most often in the list are:"


def test_cwe_places_differ_between_samples():
    def places(seed):
        made = CommonWords().draw(Random(seed), 20)
        words = [word for _, word in NUMBERED.findall(made.context)]
        return [i for i, word in enumerate(words) if word in made.answers]

    assert places(0) != places(1)


def test_no_common_word_is_a_part_of_another_word():
    for seed in range(30):
        made = CommonWords().draw(Random(seed), 400)
        words = count(made.context)
        assert not [(a, w) for a in made.answers for w in words if a != w and a in w]


def test_words_beyond_our_list_are_invented_and_distinct():
    words = distinct_words(Random(0), 8000)
    assert len(set(words)) == 8000
    assert set(WORDS) < set(words)
    assert all(re.fullmatch(r"[a-z]+", word) for word in words)
    assert not set(distinct_words(Random(0), 300)) - set(WORDS)


def test_no_word_of_ours_can_be_invented():
    assert {len(spell(SPELLINGS[0])), len(spell(SPELLINGS[-1]))} == {7}
    assert not {word for word in WORDS if len(word) == 7} & set(map(spell, SPELLINGS))


def test_fwe_hides_the_first_word_and_asks_for_ranks_2_to_4():
    task = FrequentWords().fitted(len, 4096)
    assert task.vocabulary == 80  # (4096 - 50) / 50
    made = task.draw(Random(1), 1000)
    ranked = Counter(made.context.split(" ")).most_common()
    assert ranked[0] == ("...", 607)  # 1000 / 1.6449
    assert [word for word, _ in ranked[1:4]] == list(made.answers)
    assert [n for _, n in ranked[1:5]] == [151, 67, 37, 24]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    assert "Please ignore the dots '....'" in made.after
    assert made.prefix.endswith("the three most frequently appeared words are:")


@pytest.mark.parametrize("size", [1, 10, 16, 30, 41, 53, 60, 100, 5000])
def test_fwe_never_ties_about_its_answers(size):
    counts = FrequentWords().counts(size)
    assert counts[0] > counts[1] > counts[2] > counts[3] > counts[4]


def test_fwe_places_differ_between_samples():
    places = [
        [word == "..." for word in FrequentWords().draw(Random(seed), 200).context.split()]
        for seed in (0, 1)
    ]
    assert places[0] != places[1]
