"""A task is one file and one line: a newcomer's, in a copy of the package, run by its commands."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hfsparse_eval
from hfsparse_eval import tasks
from hfsparse_eval.run.samples import Case, Maker
from hfsparse_eval.tasks import of_suite, own_questions
from hfsparse_eval.tasks.documents import WITH_DATA

TOWERS = '''
"""Towers: each has a height, and the tallest is asked for."""

from dataclasses import dataclass

from hfsparse_eval.tasks.draft import Draft, insert, mean_depth
from hfsparse_eval.tasks.haystack import NOISE
from hfsparse_eval.tasks.scores import METRICS, Metric

METRICS["exact"] = Metric(lambda said, answers: float(said == answers[0]), "the answer alone")


@dataclass(frozen=True)
class Towers:
    name: str = "towers"
    new_tokens: int = 8
    metric: str = "exact"
    suite, ruler, default, placed = "ruler", False, False, True

    def step(self, length):
        return 5

    def fitted(self, tokens, length):
        return self

    def draw(self, rng, size, depth=None):
        heights = rng.sample(range(100, 1000), 3)
        places = sorted(rng.sample(range(size), 3))
        lines = [f"A tower is {height} feet tall." for height in heights]
        context, spans = insert([NOISE] * size, places, lines, "\\n")
        tallest = heights.index(max(heights))
        return Draft(
            before="Read about some towers.\\n",
            context=context,
            after="\\nHow tall is the tallest tower?",
            prefix=" It is",
            answers=(str(heights[tallest]),),
            gold=(spans[tallest],),
            depth=mean_depth([places[tallest]], size),
        )


TASKS = [Towers()]
'''


@pytest.fixture
def run(tmp_path):
    """Runs commands, one after the other in one process, in a copy of the package to which towers
    were added."""
    package = tmp_path / "tree" / "hfsparse_eval"
    shutil.copytree(Path(hfsparse_eval.__file__).parent, package)
    (package / "tasks" / "towers.py").write_text(TOWERS)
    table = package / "tasks" / "__init__.py"
    table.write_text(table.read_text().replace("\nneedles\n", "\nneedles\ntowers\n", 1))
    paths = [str(tmp_path / "tree"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def call(*commands):
        given = json.dumps([[*map(str, words)] for words in commands])
        code = (
            "import json, sys; from hfsparse_eval.cli import app;"
            "[app(words, standalone_mode=False) for words in json.loads(sys.argv[1])]"
        )
        command = [sys.executable, "-c", code, given]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_a_task_of_ones_own_runs_by_name_and_is_no_part_of_ruler(run, folder, tmp_path):
    named, default = tmp_path / "named", tmp_path / "default"
    words = ["ruler", folder, "--samples", 1, "--max-new-tokens", 2]
    found = run(
        [*words, "-o", named, "--lengths", "1024,1200", "--tasks", "towers,vt,niah_single_1"],
        [*words, "-o", default, "--lengths", "1536"],
        ["recall", folder, "--help"],
    )
    assert "towers" in found
    asked, ruler = (
        [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        for out in (named, default)
    )
    assert {(line["task"], line["metric"]) for line in asked} == {
        ("towers", "exact"),
        ("vt", "all"),
        ("niah_single_1", "all"),
    }
    report = (named / "report.md").read_text()
    assert "| towers | 1024 | 1 | " in report
    assert "Means of 2 tasks run at every length; RULER's are of all 13" in report
    names = {line["task"] for line in ruler}
    assert names == {name for name, task in of_suite("ruler").items() if task.ruler}
    assert "towers" not in names


def test_every_file_of_tasks_is_listed():
    folder = Path(tasks.__file__).parent
    files = {file.stem for file in folder.glob("*.py") if "\nTASKS = [" in file.read_text("utf-8")}
    assert files == set(tasks.FILES)


def test_no_two_tasks_have_one_name():
    files = [import_module(f"hfsparse_eval.tasks.{file}") for file in tasks.FILES]
    names = [task.name for file in files for task in file.TASKS] + [*WITH_DATA]
    assert len(names) == len(set(names)) == len(tasks.TASKS) + 2


MEMBERS = ("name", "suite", "ruler", "default", "placed", "new_tokens", "metric")


@pytest.mark.parametrize("name", [*tasks.TASKS, "own"])
def test_every_task_has_what_the_protocol_asks_for(name, tmp_path, prompter):
    if name == "own":
        (tmp_path / "qa.jsonl").write_text('{"prompt": "Where?", "answers": ["here"]}\n')
        (task,), _ = own_questions.read(tmp_path / "qa.jsonl")
    else:
        task = tasks.TASKS[name]
    assert set(MEMBERS) <= set(tasks.Task.__annotations__) == set(MEMBERS)
    kinds = {member: type(getattr(task, member)) for member in MEMBERS}
    assert kinds == dict.fromkeys(("name", "suite", "metric"), str) | {
        "new_tokens": int,
        **dict.fromkeys(("ruler", "default", "placed"), bool),
    }
    with pytest.raises(AttributeError):
        task.name = "other"
    sample = Maker(task, 1536, prompter).sample(Case(task.name, 1536, None, 0))
    assert sample.real <= 1536
    assert (sample.task, sample.metric) == (task.name, task.metric)
    assert bool(sample.gold) == task.placed or task.suite == "decode"
