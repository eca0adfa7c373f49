"""lm-evaluation-harness scores the plan: a patched model, given to HFLM as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import pytest

import hfsparse
from tests import tiny
from tests.patcher.families import full, mixed, streaming
from tests.patcher.oracle import oracle

lm_eval = pytest.importorskip("lm_eval")
HFLM = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError).HFLM
TaskManager = pytest.importorskip("lm_eval.tasks", exc_type=ImportError).TaskManager

WORDS = "one four nine red green blue sun moon rain hill lake tree".split()
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WRITE = """
task: write
output_type: generate_until
doc_to_text: text
doc_to_target: target
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def model():
    """Sharp random weights: a key dropped by mistake shows."""
    return tiny.llama(window=1024, num_hidden_layers=3, initializer_range=0.12)


def choosing(model):
    """The mixed plan with room to choose: columns, diagonals and blocks beyond the forced ones."""
    plan = mixed(model)
    vs = replace(plan.patterns["vs"], columns=60, diagonals=130)
    blocks = replace(plan.patterns["blocks"], min_blocks=4)
    return replace(plan, patterns={**plan.patterns, "vs": vs, "blocks": blocks})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks of eight texts, 280 tokens and longer, each of another length."""
    folder = tmp_path_factory.mktemp("tasks")
    random = Random(0)
    docs = []
    for n in range(8):
        text = " ".join(random.choices(WORDS, k=75 + 5 * n))
        choices = [" " + " ".join(random.choices(WORDS, k=2)) for _ in range(3)]
        docs.append({"text": text, "choices": choices, "answer": n % 3, "target": choices[0]})
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")}
    source = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(data)}\n"
    for name, task in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(task + source)
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture
def score(model, tasks, monkeypatch):
    """`score(batch_size)`: the model as it is now; its scores, and what it answered."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs pip: slow

    def run(batch_size, names=("choice", "write")):
        harness = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            harness, tasks=list(names), task_manager=tasks, bootstrap_iters=0
        )
        answers = {
            name: [
                sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])
            ]
            for name, samples in found["samples"].items()
        }
        return found["results"], answers

    return run


def same(got, want) -> None:
    """Equal scores, answers and choices; log-likelihoods as close as float32 sums are."""
    (scores, answers), (true_scores, true_answers) = got, want
    assert scores == true_scores
    assert answers.get("write") == true_answers.get("write")
    got, want = (_numbers(a["choice"]) for a in (answers, true_answers))
    assert got == pytest.approx(want, abs=1e-4)


def _numbers(choices) -> list[float]:
    return [log_likelihood for doc in choices for log_likelihood, _ in doc]


def test_a_plan_that_drops_nothing_scores_as_the_unpatched_model(model, score):
    dense = score(3)
    with hfsparse.patch(model, full(model)):
        same(score(3), dense)
    same(score(3), dense)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_sparse_plan_scores_as_the_dense_model_under_its_mask(model, score, batch_size):
    """Batches of three: right padding where choices are scored, left where answers are written."""
    plan = choosing(model)
    dense = score(batch_size)
    with oracle(model, plan):
        want = score(batch_size)
    with hfsparse.patch(model, plan) as handle:
        same(score(batch_size), want)
        assert handle.stats().pair_density < 0.7
    assert want[1]["write"] != dense[1]["write"]
    assert _numbers(want[1]["choice"]) != pytest.approx(_numbers(dense[1]["choice"]), abs=0.1)


def test_written_answers_do_not_depend_on_the_batch(model, score):
    with hfsparse.patch(model, choosing(model)):
        assert score(3, ["write"]) == score(1, ["write"])


def test_choices_do_where_heads_choose_by_content(model, score):
    """The harness pads them on the right and passes no mask: `batch_size=1` is the plan's score.

    docs/harnesses.md says so. Streaming heads never read padding.
    """
    with hfsparse.patch(model, streaming(model)):
        same(score(12, ["choice"]), score(1, ["choice"]))
    with hfsparse.patch(model, choosing(model)):
        alone, together = (_numbers(score(size, ["choice"])[1]["choice"]) for size in (1, 12))
    assert together != pytest.approx(alone, abs=0.1)
