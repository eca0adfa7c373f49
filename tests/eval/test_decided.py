"""`--until decided`: how many samples are asked of whom, and what the report says of them.

Answers are made up: the dense model's are right, a plan loses the share of its ring.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import hfsparse.patcher
from hfsparse.anytime import anytime
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse_eval.cli import app
from hfsparse_eval.report import decided, page
from hfsparse_eval.report.pairs import Cell
from hfsparse_eval.run import runner
from hfsparse_eval.run.generate import Answer
from tests.eval.test_cli import sentence

LOST = {8: 10, 16: 0, 24: 5}  # of ten answers, by the length of the ring
TASKS = {
    "ruler": "niah_single_1",
    "needle": "niah_single_1",
    "turns": "turns_vt",
    "decode": "decode_sort",
}


@pytest.fixture
def plan(model, tmp_path):
    """Writes a plan, with its limit if one is given, and gives its option."""

    def write(ring: int, limit: float | None = None) -> list[str]:
        layer = Layer(("s",) * 4, ("s",) * 2, ("ring",) * 2)
        rings = {"s": Streaming(sink=8, recent=ring)}
        made = replace(Plan.full(ModelId.of(model)), patterns=rings, layers=(layer,) * 2)
        made.made = {} if limit is None else {"verified": {"limit": limit}}
        path = tmp_path / f"ring{ring}.yaml"
        made.save(path)
        return ["--plan", str(path)]

    return write


@pytest.fixture
def call(model, tokenizer, folder, tmp_path, monkeypatch):
    """Runs a command; `call.asked` counts the answers by ring (None: dense), `call.hopeless` are
    tasks of which all answers are wrong, `call.report` is the last report."""

    @contextmanager
    def patch(model, plan):
        call.ring = plan.patterns["s"].recent
        yield SimpleNamespace(reset_stats=lambda: None, stats=lambda: None)
        call.ring = None

    def answer(model, tokenizer, sample, cap=None) -> Answer:
        call.asked[call.ring] += 1
        kept = call.ring is None or int(sample.id[-4:]) % 10 >= LOST[call.ring]
        score = float(kept and sample.task not in call.hopeless)
        more = {"turns": [{"score": score}] * 5} if sample.turns else {"output_ids": [1, 2]}
        return Answer("x", score, 2, 1.0, 0.5, more)

    monkeypatch.setattr("hfsparse.models.loading.load", lambda *given: (model, tokenizer))
    monkeypatch.setattr("hfsparse.patcher.patch", patch)
    monkeypatch.setattr(page, "_pictures", lambda outcomes: [])
    monkeypatch.setattr(runner, "answer", answer)
    monkeypatch.setattr(runner, "together", lambda m, t, many, cap: [answer(m, t, x) for x in many])

    def call(*words, command="ruler", tasks=None):
        call.asked = Counter()
        named = ["--task" if command == "needle" else "--tasks", tasks or TASKS[command]]
        words = [
            command,
            folder,
            "-o",
            tmp_path / "out",
            "--lengths",
            1300 if command == "turns" else 600,
            *named,
            *words,
        ]
        done = CliRunner().invoke(app, list(map(str, words)))
        report = tmp_path / "out" / "report.md"
        call.report = report.read_text() if report.exists() else ""
        return done

    call.hopeless, call.ring = (), None
    return call


UNTIL = ["--until", "decided"]


@pytest.mark.parametrize(
    ("ring", "limit", "more", "samples", "said"),
    [
        (
            8,
            0.01,
            [],
            8,
            "- ring8: drop 100.0 points [8.8, 100.0]: beyond the promised 1.0, decided by 8 "
            "samples",
        ),
        (16, 0.2, [], 24, ": within the promised 20.0, decided by 24 samples"),
        (16, 0.2, ["--batch", 40], 40, ": within the promised 20.0, decided by 40 samples"),
        (
            16,
            0.01,
            ["--samples", 20],
            20,
            ": undecided against the promised 1.0 after 20 samples, the most that were to be asked",
        ),
    ],
)
def test_a_run_ends_when_the_verdict_is_certain_or_at_its_most(
    ring, limit, more, samples, said, call, plan
):
    result = call(*plan(ring, limit), *UNTIL, *more)
    assert result.exit_code == 0, result.output
    assert call.asked == {None: samples, ring: samples}
    assert said in call.report
    assert "Samples were asked in rounds" in call.report


@pytest.mark.parametrize("command", TASKS)
def test_every_command_with_verdicts_has_rounds_and_a_text_is_one_sample(command, call, plan):
    depths = ["--depths", "0,100"] if command == "needle" else []
    assert call(*plan(8, 0.01), *UNTIL, *depths, command=command).exit_code == 0
    texts = 16 if depths else 8  # of five questions in `turns`
    assert call.asked == {None: texts, 8: texts}
    assert f"beyond the promised 1.0, decided by {texts} samples" in call.report


def test_an_arm_is_asked_no_more_once_it_is_decided(call, plan):
    call(*plan(8, 0.01), *plan(16, 0.2), *UNTIL)
    assert call.asked == {None: 24, 16: 24, 8: 8}


def test_arms_without_a_limit_are_decided_by_who_scores_higher(call, plan):
    call(*plan(16), *plan(24), *plan(8), *UNTIL, "--samples", 40)
    assert call.asked == {None: 16, 16: 16, 24: 16, 8: 8}
    assert "- ring16: drop 0.0 points" in call.report
    told = next(x for x in call.report.splitlines() if x.startswith("- ring24: "))
    assert "; -62.5 points [" in told
    assert "from ring16: below it, decided by 16 samples" in told


def test_an_arm_that_fails_leaves_what_is_compared_with_it_undecided(call, plan, monkeypatch):
    fine = hfsparse.patcher.patch

    def failing(model, plan):
        if plan.patterns["s"].recent == 24:
            raise RuntimeError("no room")
        return fine(model, plan)

    monkeypatch.setattr("hfsparse.patcher.patch", failing)
    result = call(*plan(24), *plan(16), *plan(8, 0.01), *UNTIL, "--samples", 16)
    assert result.exit_code == 1
    assert "(RuntimeError: no room): the command that asked" in result.stderr
    assert call.asked == {None: 16, 16: 16, 8: 8}


def test_dense_answers_are_kept_for_later_plans_and_more_samples(call, plan):
    call(*plan(16, 0.2), *UNTIL)
    call(*plan(8, 0.01), *UNTIL)
    assert call.asked == {8: 8}
    call(*plan(8, 0.01), "--samples", 30)
    assert call.asked == {None: 6, 8: 22}
    assert "- ring8: drop 100.0 ± " in call.report  # a number set beforehand has the usual interval
    assert "- ring16: drop 0.0 points [" in call.report


def test_tasks_that_the_dense_model_cannot_do_are_asked_no_more(call, plan):
    call.hopeless = ["niah_single_2"]
    call(*plan(16, 0.2), *UNTIL, tasks="niah_single_1,niah_single_2")
    assert call.asked == {None: 32, 16: 24}  # no arm is asked the other
    assert "decided by 24 samples" in call.report
    assert "below 70 %, so that no more was asked, at niah_single_2 600 (0.0)." in call.report


def test_where_the_dense_model_can_do_nothing_no_arm_is_asked(call, plan):
    call.hopeless = ["niah_single_1", "niah_single_2"]
    result = call(*plan(16), *plan(8), *UNTIL, tasks="niah_single_1,niah_single_2")
    assert result.exit_code == 1
    assert sentence(result).startswith("the dense model is certain to score below 70 % of every")
    assert call.asked == {None: 16}
    assert "at niah_single_1 600 (0.0), niah_single_2 600 (0.0)." in call.report


@pytest.mark.parametrize(
    ("plans", "words", "expected"),
    [
        (
            [(8, 0.01)],
            ["--until", "bored"],
            "unknown --until bored: give decided",
        ),
        ([], UNTIL, "--until decided: no plan or arm is given, and there is nothing to compare"),
        ([(8,)], UNTIL, "--until decided: ring8 states no limit, and there is nothing to compare"),
        (
            [(8, 0.01)],
            [*UNTIL, "--samples", 7],
            "samples is 7: a round of --until decided asks 8 of each task at each length, give 8",
        ),
        (
            [(8, 0.01)],
            [*UNTIL, "--suite", "smoke"],
            "samples is 4: a round of --until decided asks 8",
        ),
    ],
)
def test_what_cannot_be_decided_is_one_clear_sentence(plans, words, expected, call, plan):
    given = [word for each in plans for word in plan(*each)]
    assert sentence(call(*given, *words)).startswith(expected)
    assert not call.asked


def test_blocks_have_a_sample_of_each_task_and_length():
    """What one task has more of than another is left out: its strata weigh alike at each look."""

    def line(name: str, score: float) -> dict:
        return {"id": name, "score": score}

    ids = ["vt-512-0000", "vt-512-0002", "cwe-512-0000", "cwe-512-0001", "cwe-512-0002"]
    lost = [1, 0.5, 0, 1, 1]
    pairs = [line(x, 1) for x in ids], [line(x, 1 - y) for x, y in zip(ids, lost, strict=True)]
    seen = decided.look(Cell("all", "all", *pairs))
    low, high = anytime(np.array([[-100, 0], [-50, -100]]), worst=100)
    assert (seen.n, seen.each, seen.mean) == (4, 2, -62.5)
    assert (seen.low, seen.high) == (low, high)
