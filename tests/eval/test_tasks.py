import re
from dataclasses import asdict
from random import Random

import pytest

from hfsparse_eval import text
from hfsparse_eval.tasks import SLOTS, TASKS, clean, largest, score

SIZES = {"noise": 12, "prose": 300, "needles": 12}
NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")


def draft(name, seed=1, **more):
    task = TASKS[name]
    return task.draw(Random(seed), SIZES[getattr(task, "haystack", "noise")], **more)


def test_the_tasks_are_rulers_with_its_token_caps():
    assert {name: task.new_tokens for name, task in TASKS.items()} == {
        "niah_single_1": 128,
        "niah_single_2": 128,
        "niah_multikey_1": 128,
        "niah_multikey_2": 128,
        "niah_multiquery": 128,
        "vt": 30,
    }


@pytest.mark.parametrize("name", TASKS)
def test_a_draft_depends_on_its_generator_only(name):
    first = asdict(draft(name, 7))
    draft(name, 8)
    assert asdict(draft(name, 7)) == first
    assert asdict(draft(name, 8)) != first


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seed", range(5))
def test_each_answer_stands_in_one_gold_span_and_nowhere_else_as_an_answer(name, seed):
    made = draft(name, seed)
    golds = [made.context[a:b] for a, b in made.gold]
    assert len(golds) == len(made.answers) == len(set(made.answers))
    for gold, answer in zip(golds, made.answers, strict=True):
        assert answer in gold
        assert made.context.count(gold) == 1
    if name != "vt":
        values = [value for _, value in NEEDLE.findall(made.context)]
        assert all(values.count(answer) == 1 for answer in made.answers)


def test_single_needle_has_rulers_words_in_the_singular():
    made = draft("niah_single_1")
    key, value = NEEDLE.search(made.context).groups()
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
    pairs = dict(NEEDLE.findall(made.context))
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
    assert len(NEEDLE.findall(made.context)) == 4
    assert len(made.answers) == 1


def test_multikey_2_has_needles_only_with_distinct_keys_and_values():
    made = draft("niah_multikey_2")
    pairs = [NEEDLE.fullmatch(line).groups() for line in made.context.split("\n")]
    assert len(pairs) == 13
    assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == 13


def test_vt_is_one_chain_of_four_hops_after_a_solved_example():
    made = draft("vt")
    chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", made.context)
    value = chain[0][1]
    assert made.answers == tuple(name for name, _ in chain)
    assert [source for _, source in chain[1:]] == list(made.answers[:-1])
    assert 10000 <= int(value) <= 99998
    assert made.after == (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    assert made.prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assigned the value {value}, they are: "
    )
    example = re.findall(r"VAR ([A-Z]{3}) = ", made.before)
    assert len(example) == 5
    assert f"they are:  {' '.join(example)}\n\nMemorize and track" in made.before
    assert len(made.gold) == 5


def test_vt_never_names_a_variable_var(monkeypatch):
    class Scripted(Random):
        def choices(self, letters, k):
            return list(queue.pop(0))

    queue = ["VAR", "AAA", "AAA", "BBB", "CCC", "DDD", "EEE"]
    made = TASKS["vt"]._problem(Scripted(0), 8, letters=3)
    assert made.answers == ("AAA", "BBB", "CCC", "DDD", "EEE")


def test_needles_in_prose_take_distinct_depth_slots():
    assert len(SLOTS) == len(set(SLOTS)) == 40
    assert (SLOTS[0], SLOTS[-1]) == (0, 100)
    for seed in range(40):  # in 2000 words, two needles side by side would share a slot
        made = TASKS["niah_multikey_1"].draw(Random(seed), 2000)
        assert not re.search(rf"{NEEDLE.pattern} {NEEDLE.pattern}", made.context)


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


@pytest.mark.parametrize(
    ("output", "answers", "expected"),
    [
        (" 1234567.", ["1234567"], 1.0),
        ("1234568", ["1234567"], 0.0),
        ("", ["1234567"], 0.0),
        ("abcde, FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"], 0.5),
        ("4 1111111 and 2222222", ["2222222", "1111111"], 1.0),
        ("123\x004567", ["1234567"], 0.0),
    ],
)
def test_score_is_the_share_of_answers_found(output, answers, expected):
    assert score(output, answers) == expected


def test_clean_strips_and_turns_control_characters_into_line_breaks():
    assert clean(" \x07a\tb\x00 ") == "a\nb"


@pytest.mark.parametrize(("limit", "expected"), [(0, None), (1, 1), (6, 6), (10, 10), (99, 10)])
def test_largest_bisects_to_the_last_that_fits(limit, expected):
    assert largest(lambda n: n <= limit, 1, 10) == expected
