"""What a chat template puts around texts: strings, parts, or one sentence where texts get lost."""

import copy

import pytest

from hfsparse.cli.run import prompt_tokens
from hfsparse.errors import UsageError
from hfsparse.models.chat import frames
from hfsparse.profiler.prompts import calibration as prompts
from hfsparse.profiler.prompts.puzzles import Ask as Question
from hfsparse.profiler.verify import trials
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.tasks.draft import Ask, Draft
from tests import tiny

EACH = "{% for m in messages %}<{{ m['role'] }}>BODY;{% endfor %}"
ASKED = "{% if add_generation_prompt %}<assistant>{% endif %}"
PARTS = (
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
)
EITHER = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + PARTS + "{% endif %}"
ADDED = "{% for p in m['content'] %}{{ p['text'] + '' }}{% endfor %}"  # strings end it in an error


def speaking(template):
    made = copy.deepcopy(tiny.tokenizer())
    made.chat_template = template
    return made


def each(body):
    return speaking(EACH.replace("BODY", body) + ASKED)


@pytest.mark.parametrize(
    "body",
    ["{{ m['content'] }}", "{{ m['content'] | trim }}", PARTS, EITHER, ADDED],
    ids=["strings", "stripped", "parts", "either", "parts-or-error"],
)
def test_texts_reach_every_user_of_a_template(body):
    made = each(body)
    assert frames(made) == ["<user>", ";<assistant>"]
    assert frames(made, turns=3) == ["<user>", ";<assistant>", ";<user>", ";<assistant>"]
    assert made.decode(prompt_tokens(made, " a text ")) == "<user> a text ;<assistant>"

    head, tail = (made.decode(ids) for ids in prompts.frame(made, "Read.\n\n", "\n\nWhat?"))
    assert (head, tail) == ("<user>Read.\n\n", "\n\nWhat?;<assistant>")
    (prompt,) = prompts.make_prompts(made, 600, 1, seed=0)
    assert "?;<assistant>" in made.decode(prompt.ids[0])

    ask = Question("Which?", "It is", " 7")
    assert trials._join_turns(made, ask.question, first=True) == "\n\nWhich?;<assistant>"
    assert trials._join_turns(made, ask.question, first=False) == ";<user>Which?;<assistant>"

    prompter = Prompter(made)
    draft = Draft("Read.", " It was 7. ", "Which?", " It is", ("7",), ((8, 9),), None)
    assert prompter.text(draft) == "<user>Read. It was 7. Which?;<assistant> It is"
    ids, spans, question = prompter.encode(draft)
    assert "7" in made.decode(ids[slice(*spans[0])])
    assert made.decode(ids[question:]).startswith("Which?;")
    asks = (Ask("Which?", " It", ("7",)), Ask("Sure?", "", ("yes",)))
    talk = Draft("Read.", " It was 7. ", "", "", (), (), None, asks)
    assert prompter.text(talk) == "<user>Read. It was 7. "
    wanted = ["\n\nWhich?;<assistant> It", ";<user>Sure?;<assistant>"]
    assert prompter.between(talk) == wanted


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ASKED, "it loses or moves them; with texts as lists of parts it loses"),
        (EACH.replace("BODY", "{{ raise_exception('no!') }}"), "it ends in 'no!'"),
        (EACH.replace("BODY", "{{ m['content'] | upper }}"), "loses or moves"),
        (EACH.replace("BODY", "{{ m['content'] * 2 }}"), "loses or moves"),
        ("{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}", None),
        ("{% for m in messages", "it ends in "),
        ("{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
         "{{ messages[0]['content'] }}", None),
    ],
    ids=["dropped", "raised", "altered", "repeated", "moved", "broken", "one-turn"],
)  # fmt: skip
def test_a_template_that_loses_texts_is_one_sentence(template, why):
    made = speaking(template)
    if why is None:  # of one turn nothing is lost
        assert frames(made) == ["", ""]
    with pytest.raises(UsageError, match="chat template can't be used for") as told:
        frames(made, turns=3 if why is None else 1)
    assert "\n" not in str(told.value)
    assert (why or "turns of text") in str(told.value)
    if why is None:
        return
    for use in (
        lambda: prompts.make_prompts(made, 600, 1, seed=0),
        lambda: prompt_tokens(made, "a text"),
        lambda: Prompter(made),
    ):
        with pytest.raises(UsageError, match="chat template can't be used"):
            use()


def test_models_that_can_think_first_are_told_to_answer_at_once_but_by_generate():
    made = speaking(
        "{{ messages[0]['content'] }}{% if enable_thinking is not defined %}…{% endif %}"
    )
    assert frames(made) == ["", ""]
    assert frames(made, thinking=True) == ["", "…"]
