import re
from dataclasses import replace
from random import Random

import pytest

from hfsparse.errors import UsageError
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.samples import Case, Maker, Suite
from hfsparse_eval.tasks import TASKS, of_suite
from tests.eval.conftest import CHAT

SUITE = of_suite("ruler")


def short(name):
    """Tokens that fit a small sample; cwe's list and solved example need more."""
    return 1536 if name == "cwe" else 1024


def case(maker, index=0, depth=None):
    return Case(maker.task.name, maker.length, depth, index)


@pytest.mark.parametrize("length", ["short", 2048])
@pytest.mark.parametrize("name", SUITE)
def test_samples_keep_the_budget_and_come_close_to_it(name, length, prompter):
    length = short(name) if length == "short" else length
    maker = Maker(TASKS[name], length, prompter)
    for index in range(4):
        sample = maker.sample(case(maker, index))
        counted = len(sample.ids) - 1 + sample.new_tokens  # the BOS is not counted
        assert sample.ids[0] == prompter.tokenizer.bos_token_id
        assert sample.ids[1] != sample.ids[0]
        assert sample.real == counted <= length
        assert counted > (0.8 if getattr(maker.task, "haystack", "") == "prose" else 0.85) * length


@pytest.mark.parametrize("name", [name for name in SUITE if name.startswith("qa")])
def test_gold_spans_decode_to_the_documents_that_answer(name, prompter):
    maker = Maker(TASKS[name], 1024, prompter)
    sample = maker.sample(case(maker, 3))
    shown = [prompter.tokenizer.decode(sample.ids[slice(*span)]).strip() for span in sample.gold]
    assert len(shown) == int(name.split("_")[1])
    assert all(re.fullmatch(r"Document \d+:\n(.+)\n\1(, a| is) .+\.", text) for text in shown)
    assert any(sample.answers[0] in text for text in shown)


@pytest.mark.parametrize("name", [name for name in SUITE if name.startswith(("niah", "vt"))])
def test_gold_spans_decode_to_the_needles_and_nothing_else(name, prompter):
    maker = Maker(TASKS[name], 1024, prompter)
    decode = prompter.tokenizer.decode
    sample = maker.sample(case(maker, 3))
    assert len(sample.gold) == len(sample.answers)
    needle = re.compile(
        r"VAR [A-Z]{5} = (VAR [A-Z]{5}|\d{5})"
        if name == "vt"
        else r"One of the special magic (number|uuid)s for \S+ is: [0-9a-f-]+\."
    )
    for (start, end), answer in zip(sample.gold, sample.answers, strict=True):
        shown = decode(sample.ids[start:end]).strip()
        assert needle.fullmatch(shown)
        assert answer in shown
        for shorter in (sample.ids[start + 1 : end], sample.ids[start : end - 1]):
            assert shown not in decode(shorter)


@pytest.mark.parametrize("name", SUITE)
def test_a_sample_is_the_same_whatever_was_made_before(name, prompter):
    one, other = (Maker(TASKS[name], short(name), prompter, seed=5) for _ in range(2))
    expected = one.sample(case(one, 2))
    other.sample(case(other, 0))
    other.sample(case(other, 1))
    assert other.sample(case(other, 2)) == expected
    assert other.sample(case(other, 3)).ids != expected.ids
    assert (
        Maker(TASKS[name], short(name), prompter, seed=6).sample(case(one, 2)).ids != expected.ids
    )


def test_the_chat_template_wraps_the_message_and_the_prefix_follows_its_header(tokenizer):
    maker = Maker(TASKS["niah_single_1"], 1024, Prompter(tokenizer))
    shown = tokenizer.decode(maker.sample(case(maker)).ids)
    assert shown.startswith("<|bos|><|user|>\nA special magic number")
    assert "in the provided text?<|end|>\n<|assistant|>\n The special magic number for" in shown
    plain = Maker(TASKS["niah_single_1"], 1024, Prompter(tokenizer, "never"))
    shown = tokenizer.decode(plain.sample(case(plain)).ids)
    assert shown.startswith("<|bos|>A special magic number")
    assert "in the provided text? The special magic number for" in shown


def test_a_tokenizer_without_a_template_gets_plain_prompts(tokenizer):
    tokenizer.chat_template = None
    try:
        assert not Prompter(tokenizer).chat
    finally:
        tokenizer.chat_template = CHAT


def test_a_tokenizer_without_offsets_is_refused_in_a_sentence():
    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="a fast tokenizer is needed"):
        Prompter(Slow())


@pytest.mark.parametrize("name", SUITE)
def test_a_length_that_fits_nothing_is_one_error_not_a_loop(name, prompter):
    with pytest.raises(UsageError, match=f"{name} does not fit 150 tokens"):
        Maker(TASKS[name], 150, prompter)


def test_an_overlong_sample_is_drawn_again_a_step_shorter(prompter):
    maker = Maker(TASKS["niah_single_1"], 1024, prompter)
    fits = maker.sample(case(maker))
    maker.size += 2 * maker.step
    shorter = maker.sample(case(maker))
    assert shorter.real <= 1024
    assert shorter.answers == fits.answers


def test_when_no_step_fits_a_sample_the_error_says_so(prompter):
    maker = Maker(TASKS["niah_single_1"], 1024, prompter)
    maker.length = 100
    with pytest.raises(UsageError, match="does not fit 100 tokens"):
        maker.sample(case(maker))


def test_vt_fits_its_example_into_500_tokens(prompter):
    task = Maker(TASKS["vt"], 2048, prompter).task
    assert task.example_lines > 5
    longer = replace(task, example_lines=task.example_lines + 1)
    assert prompter.tokens(task._example(Random(0), task.example_lines)) <= 500
    assert prompter.tokens(longer._example(Random(0), longer.example_lines)) > 500


def test_a_suite_names_every_case_once(prompter):
    tasks = [TASKS["niah_single_1"], TASKS["niah_single_2"]]
    suite = Suite(tasks, [2048, 1024, 1024], 2, prompter, depths=[0, 50, 0.0])
    ids = [case.id for case in suite.cases]
    assert len(ids) == len(set(ids)) == 2 * 2 * 2 * 2
    assert ids[0] == "niah_single_1-1024-at0-0000"
    assert suite.sample(suite.cases[2]).depth == 50


def test_a_suite_of_no_samples_is_refused(prompter):
    with pytest.raises(UsageError, match="samples is 0: give 1 or more"):
        Suite([TASKS["vt"]], [1024], 0, prompter)
