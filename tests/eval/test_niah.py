import re
from random import Random

import pytest

from hfsparse_eval.tasks import TASKS
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.haystack import SLOTS
from tests.eval.drafting import NEEDLE, NUMBER, draft

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def test_single_needle_has_rulers_words_in_the_singular():
    made = draft("niah_single_1")
    key, value = NUMBER.search(made.context).groups()
    assert made.answers == (value,)
    assert made.before == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert made.after == (
        f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    )
    assert made.prefix == (f" The special magic number for {key} mentioned in the provided text is")
    lines = made.context.split("\n")
    assert sorted(set(lines)) == sorted(
        [text.NOISE, f"One of the special magic numbers for {key} is: {value}."]
    )
    assert len(lines) == 13


def test_multiquery_asks_for_four_keys_in_the_plural():
    made = draft("niah_multiquery")
    pairs = dict(NUMBER.findall(made.context))
    assert len(pairs) == 4
    asked = re.search(r"numbers for (.*) mentioned", made.after).group(1)
    assert re.fullmatch(r"\S+, \S+, \S+, and \S+", asked)
    keys = asked.replace("and ", "").split(", ")
    assert made.answers == tuple(pairs[key] for key in keys)
    assert made.before.startswith("Some special magic numbers are hidden")
    assert made.after.startswith("\nWhat are all the special magic numbers for ")
    assert made.prefix.endswith("mentioned in the provided text are")


def test_multikey_1_hides_three_other_needles_in_prose():
    made = draft("niah_multikey_1")
    assert len(NUMBER.findall(made.context)) == 4
    assert len(made.answers) == 1


def test_multikey_2_has_needles_only_with_distinct_keys_and_values():
    made = draft("niah_multikey_2")
    pairs = [NUMBER.fullmatch(line).groups() for line in made.context.split("\n")]
    assert len(pairs) == 13
    assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == 13


def test_needles_in_prose_take_distinct_depth_slots():
    assert len(SLOTS) == len(set(SLOTS)) == 40
    assert (SLOTS[0], SLOTS[-1]) == (0, 100)
    for seed in range(40):  # in 2000 words, two needles side by side would share a slot
        made = TASKS["niah_multikey_1"].draw(Random(seed), 2000)
        assert not re.search(rf"{NUMBER.pattern} {NUMBER.pattern}", made.context)


def test_a_given_depth_halves_the_prose():
    made = draft("niah_single_2", 3, depth=50)
    before = text.split_sentences(made.context[: made.gold[0][0]].strip())
    after = text.split_sentences(made.context[made.gold[0][1] :].strip())
    assert made.depth == 50
    assert abs(len(before) - len(after)) <= 1


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2"])
def test_depth_0_comes_first_and_depth_100_last(name):
    assert draft(name, depth=0).gold[0][0] == 0
    last = draft(name, depth=100)
    assert last.gold[0][1] == len(last.context)


def test_prose_goes_on_from_the_start_past_its_end():
    words = len(" ".join(text.prose()).split())
    made = TASKS["niah_single_2"].draw(Random(0), words + 500)
    rest = made.context.replace(made.context[slice(*made.gold[0])], " ")
    assert len(rest.split()) == words + 500


def test_single_3_asks_for_a_uuid_of_version_4():
    made = draft("niah_single_3")
    key, value = NEEDLE.search(made.context).groups()
    assert re.fullmatch(UUID, value)
    assert f"One of the special magic uuids for {key} is: {value}." in made.context
    assert made.before.startswith("A special magic uuid is hidden")
    assert (
        made.after == f"\nWhat is the special magic uuid for {key} mentioned in the provided text?"
    )


def test_multikey_3_is_uuids_by_uuid_and_needles_only():
    lines = draft("niah_multikey_3").context.split("\n")
    pairs = [NEEDLE.fullmatch(line).groups() for line in lines]
    assert len(pairs) == 13
    assert all(re.fullmatch(UUID, word) for pair in pairs for word in pair)
    assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == 13


def test_multivalue_asks_for_four_numbers_of_one_key_in_the_plural():
    made = draft("niah_multivalue")
    pairs = NEEDLE.findall(made.context)
    assert len({key for key, _ in pairs}) == 1
    assert sorted(made.answers) == sorted(value for _, value in pairs)
    assert len(set(made.answers)) == 4
    key = pairs[0][0]
    assert made.after.startswith(f"\nWhat are all the special magic numbers for {key} mentioned")
    assert made.prefix == f" The special magic numbers for {key} mentioned in the provided text are"
