"""The scripts of examples/ run from the top to the bottom, and say what they did."""

import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from hfsparse.plan import ModelId, Plan
from tests import tiny
from tests.patcher.families import plan_of

EXAMPLES = Path(__file__).parents[2] / "examples"
RULES = "\n".join(f"Rule {n}: whoever is late brings {n} cakes." for n in range(40))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder beside a plan under which half of the heads are rings."""
    folder = tiny.save(tmp_path_factory.mktemp("models") / "llama", window=4096)

    def words(index, windowed):
        return ["s", "s", "full", "full"], ["s", "full"], ["ring", "full"]

    pattern = ("streaming", {"sink": 4, "recent": 64})
    plan_of(tiny.llama(window=4096), words, s=pattern).save(folder / "plan.yaml")
    Plan.full(ModelId.of(tiny.llama(window=4096))).save(folder / "full.yaml")
    return folder


@pytest.fixture
def example(model, monkeypatch, capsys):
    """What a script prints for these words, after the model and a plan for it."""

    def run(name: str, *words: str, plan="plan.yaml", script=None) -> str:
        line = [name, model, model / plan, *words, "--max-new-tokens", 6]
        monkeypatch.setattr(sys, "argv", [str(word) for word in line])
        runpy.run_path(str(script or EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_script_is_tested_here():
    named = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert {file.name for file in EXAMPLES.glob("*.py")} == named


def test_a_document_is_read_once_for_all_questions(example, tmp_path):
    rules = tmp_path / "rules.txt"
    rules.write_text(RULES)
    first = example("long_document.py", rules, "Who brings cakes?", "Why?")
    read = re.match(r"read ([\d,]+) tokens once: computed (\d+)% of the pairs", first)
    assert int(read[1].replace(",", "")) > 500
    assert int(read[2]) < 70
    assert re.search(r"each new token read (\d+)% of the keys", first)
    pair = re.findall(r"Q: (.*)\nA: (.*)", first)
    assert [question for question, _ in pair] == ["Who brings cakes?", "Why?"]
    # The second question alone: the first one left nothing in the cache.
    assert re.findall(r"Q: (.*)\nA: (.*)", example("long_document.py", rules, "Why?")) == pair[1:]


def test_documents_are_read_once_for_all_days(example, tmp_path):
    for n, name in enumerate(("cakes", "tea")):
        (tmp_path / f"{name}.txt").write_text(RULES.replace("cakes", name)[n:])
    first = example("library.py", tmp_path, "Who brings it?")
    assert re.findall(
        r"(\w+)\.txt: [\d,]+ tokens, read now; its cache takes [\d.]+ MiB", first
    ) == [
        "cakes",
        "tea",
    ]
    (tmp_path / "tea.txt").write_text(RULES[7:])
    later = example("library.py", tmp_path, "Why?", "Who brings it?")
    assert re.findall(r"(\w+)\.txt: [\d,]+ tokens, read (\w+)", later) == [
        ("cakes", "before"),
        ("tea", "now"),
    ]
    said = [re.findall(r"Q: (.*)\nA: (.*)", text) for text in (first, later)]
    assert said[1][1] == said[0][0]
    assert [question for question, _ in said[1]] == ["Why?", "Who brings it?"] * 2


def test_a_chat_reads_only_what_is_new(example):
    said = example("chat.py", "My name is Ada.", "I live in a house by the sea.", "Who am I?")
    assert said.count("you: ") == said.count("model: ") == 3
    counts = re.findall(r"\(read (\d+) new tokens, (\d+) so far; cache: \d+% of dense\)", said)
    turns = [(int(new), int(whole)) for new, whole in counts]
    assert len(turns) == 3
    for (_, before), (new, after) in pairwise(turns):
        assert 0 <= after - before - new <= 6  # the answer's own tokens


def test_a_chat_that_keeps_its_cache_says_what_one_says_that_reads_all_again(example, tmp_path):
    """Under the full plan: what rings drop is read again, too, where all is."""
    text = (EXAMPLES / "chat.py").read_text()
    keeps = "cache, answer = out.past_key_values,"
    assert keeps in text
    forgetful = tmp_path / "chat.py"
    forgetful.write_text(text.replace(keeps, "cache, answer = None,"))
    turns = "My name is Ada.", "I live by the sea.", "Who am I?"
    kept = example("chat.py", *turns, plan="full.yaml")
    assert kept == example("chat.py", *turns, plan="full.yaml", script=forgetful)


def test_files_in_a_batch_get_the_answers_that_they_get_alone(example, tmp_path):
    files = []
    for n in (3, 40, 11):
        files.append(tmp_path / f"{n}.txt")
        files[-1].write_text("\n".join(RULES.split("\n")[:n]))
    together = example("batch.py", *files, "--batch", "2")
    assert len(re.findall(r"\(\d at once; so far \d+% of the pairs", together)) == 2
    for file in files:
        alone = example("batch.py", file)
        assert alone.splitlines()[0].startswith(f"{file}: ")
        assert alone.splitlines()[0] in together.splitlines()
