import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from hfsparse.errors import UsageError
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse_eval.arms import Dense, Sparse
from hfsparse_eval.run import generate, runner
from hfsparse_eval.run.generate import together
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.results import Results, Settings
from hfsparse_eval.run.samples import Suite
from hfsparse_eval.run.world import Session, World
from hfsparse_eval.tasks import TASKS

SETTINGS = Settings("ruler", "tiny", "sha256:m", "w", "0.1.0", "float32", 0, "auto", 4, "prose")
TIMES = ("seconds", "first_token_seconds")


class FakePlan:
    def hash(self):
        return "sha256:p"


@pytest.fixture
def suite(tokenizer):
    tasks = [TASKS["niah_single_1"], TASKS["niah_single_2"]]
    return Suite(tasks, [512, 600], 2, Prompter(tokenizer))


@pytest.fixture
def patched(monkeypatch):
    """Stands for hfsparse.patch: notes what it was asked, and measures 0.25 of everything."""
    calls = []

    @contextmanager
    def patch(model, plan):
        stats = SimpleNamespace(**dict.fromkeys(runner.MEASURED, 0.25))
        yield SimpleNamespace(reset_stats=lambda: calls.append("reset"), stats=lambda: stats)
        calls.append(plan.hash())

    monkeypatch.setattr("hfsparse.patcher.patch", patch)
    return calls


def results(folder, **changed):
    return Results(folder, replace(SETTINGS, **changed), {"machine": "this"})


def rings(model) -> Plan:
    """Every head streams."""
    layer = Layer(("s",) * 4, ("s",) * 2, ("ring",) * 2)
    full = Plan.full(ModelId.of(model))
    return replace(full, patterns={"s": Streaming(sink=8, recent=32)}, layers=(layer,) * 2)


def timeless(lines):
    """Lines as a set, without the times, which no two runs share."""
    bare = ({k: v for k, v in line.items() if k not in TIMES} for line in lines)
    return sorted(json.dumps(line, sort_keys=True) for line in bare)


def stored(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_each_sample_is_run_dense_and_sparse_on_the_same_prompt(
    tmp_path, model, tokenizer, suite, patched
):
    runner.run(Session(model, tokenizer, results(tmp_path), [Sparse(FakePlan())]), suite, 4)
    lines = stored(tmp_path)
    assert len(lines) == 16
    assert len({(line["id"], line["arm"]) for line in lines}) == 16
    assert patched == ["reset"] * 4 + ["sha256:p"] + ["reset"] * 4 + ["sha256:p"]
    for line in lines:
        sparse = line["arm"] == "sparse"
        assert line["plan"] == ("sha256:p" if sparse else None)
        assert [line[name] for name in runner.MEASURED] == [0.25 if sparse else None] * 4
        assert line["new_tokens"] <= 4
        assert 0 < line["first_token_seconds"] <= line["seconds"]
        assert line["real"] <= line["length"]
    dense, sparse = (
        {line["id"]: line for line in lines if line["arm"] == arm} for arm in ("dense", "sparse")
    )
    assert all(dense[i]["output"] == sparse[i]["output"] for i in dense)  # the fake drops nothing


@pytest.mark.parametrize("after", [1, 5, 9])
def test_a_run_cut_off_goes_on_and_ends_with_the_same_lines(
    after, tmp_path, monkeypatch, model, tokenizer, suite, patched
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    runner.run(Session(model, tokenizer, results(whole), [Sparse(FakePlan())]), suite, 4)
    count = 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return generate.answer(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(Session(model, tokenizer, results(cut), [Sparse(FakePlan())]), suite, 4)
    assert len(stored(cut)) == after

    runner.run(Session(model, tokenizer, results(cut), [Sparse(FakePlan())]), suite, 4)
    assert timeless(stored(cut)) == timeless(stored(whole))


def test_a_finished_run_generates_nothing_again(tmp_path, monkeypatch, model, tokenizer, suite):
    runner.run(Session(model, tokenizer, results(tmp_path)), suite, 4)
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(runner, "answer", None)
    runner.run(Session(model, tokenizer, results(tmp_path)), suite, 4)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_torn_last_line_is_dropped_and_its_sample_run_again(tmp_path, model, tokenizer, suite):
    runner.run(Session(model, tokenizer, results(tmp_path)), suite, 4)
    path = tmp_path / "results.jsonl"
    whole = timeless(stored(tmp_path))
    path.write_bytes(path.read_bytes()[:-40])
    again = results(tmp_path)
    assert len(again.lines) == 7
    runner.run(Session(model, tokenizer, again), suite, 4)
    assert timeless(stored(tmp_path)) == whole


def test_reading_results_leaves_the_line_that_another_process_is_writing(tmp_path):
    results(tmp_path)
    path = tmp_path / "results.jsonl"
    good = json.dumps({"id": "a", "arm": "dense", "plan": None, "model": "m"})
    path.write_text(f"{good}\n{good[:9]}")
    before = path.read_bytes()
    second = Results(tmp_path, SETTINGS, {"machine": "this"}, part=1)
    assert [line["id"] for line in second.lines] == ["a"]
    second.append({**json.loads(good), "id": "b"})
    assert path.read_bytes() == before
    results(tmp_path).append({**json.loads(good), "id": "c"})
    assert [line["id"] for line in stored(tmp_path)] == ["a", "b", "c"]


def test_more_samples_and_a_second_plan_join_a_finished_run(
    tmp_path, model, tokenizer, suite, patched
):
    runner.run(Session(model, tokenizer, results(tmp_path)), suite, 4)
    larger = Suite([TASKS["niah_single_1"]], [512], 3, suite.makers["niah_single_1", 512].prompter)
    runner.run(Session(model, tokenizer, results(tmp_path), [Sparse(FakePlan())]), larger, 4)
    lines = stored(tmp_path)
    assert [line["arm"] for line in lines] == ["dense"] * 9 + ["sparse"] * 3
    assert lines[8]["id"] == "niah_single_1-512-0002"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": "other"}, "holds results with model tiny, this run has other: give another -o"),
        ({"seed": 1}, "holds results with seed 0, this run has 1: give another -o"),
        ({"fingerprint": "x"}, "holds results with fingerprint sha256:m, this run has x"),
        ({"max_new_tokens": None}, "holds results with max_new_tokens 4, this run has None"),
        ({"kind": "needle"}, "holds results with kind ruler, this run has needle"),
    ],
)
def test_a_directory_of_another_run_is_refused(changed, sentence, tmp_path):
    results(tmp_path)
    with pytest.raises(UsageError, match=sentence):
        results(tmp_path, **changed)


def test_results_without_their_settings_are_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"holds results without a run\.json"):
        results(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"settings": 1}'])
def test_a_broken_run_json_is_refused(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run\.json is not a run's settings"):
        results(tmp_path)


def test_a_broken_line_that_is_not_the_last_is_an_error_with_its_number(tmp_path):
    results(tmp_path)
    good = json.dumps({"id": "a", "arm": "dense", "plan": None, "model": "m"})
    (tmp_path / "results.jsonl").write_text(f"{good}\n{good[:9]}\n{good}\n")
    with pytest.raises(UsageError, match=r"results\.jsonl, line 2: not a result"):
        results(tmp_path)


def test_every_session_is_noted_once(tmp_path):
    for machine in ("this", "that", "this"):
        Results(tmp_path, SETTINGS, {"machine": machine})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["sessions"] == [{"machine": "this"}, {"machine": "that"}]


def test_a_share_of_nothing_is_stored_as_null():
    stats = SimpleNamespace(decode_share=math.nan, cache_share=1 / 3)
    assert runner.number(stats, "decode_share") is None
    assert runner.number(stats, "cache_share") == 0.333333
    assert runner.number(None, "pair_density") is None


def test_stopping_once_every_answer_was_said_keeps_the_score(model, tokenizer, suite):
    case = suite.cases[0]
    sample = replace(suite.sample(case), new_tokens=24)
    full = generate.answer(model, tokenizer, sample)
    assert full.new_tokens == 24
    middle = len(full.text) // 2
    known = replace(sample, answers=(full.text[middle - 2 : middle + 2],))
    early = generate.answer(model, tokenizer, known)
    assert early.new_tokens < 24
    assert full.text.startswith(early.text)
    assert (
        generate.score(early.text, known.answers) == generate.score(full.text, known.answers) == 1.0
    )


def test_one_of_several_answers_is_enough_for_part_and_half_for_all(
    tmp_path, monkeypatch, model, tokenizer, suite
):
    sample = replace(suite.sample(suite.cases[0]), new_tokens=24)
    full = generate.answer(model, tokenizer, sample).text
    middle = len(full) // 2
    answers = ("never said", full[middle - 2 : middle + 2])
    for metric, expected in {"part": 1.0, "all": 0.5}.items():
        known = replace(sample, answers=answers, metric=metric, id=metric)
        assert (generate.answer(model, tokenizer, known).new_tokens < 24) == (metric == "part")
        monkeypatch.setattr(suite, "sample", lambda case, known=known: known)
        folder = tmp_path / metric
        folder.mkdir()
        runner.run(Session(model, tokenizer, results(folder, max_new_tokens=None)), suite)
        assert {(line["metric"], line["score"]) for line in stored(folder)} == {(metric, expected)}


def test_generation_is_greedy_whatever_the_models_settings_say(model, tokenizer, suite):
    sample = replace(suite.sample(suite.cases[0]), new_tokens=8)
    plain = generate.answer(model, tokenizer, sample).text
    own = model.generation_config
    sampling = dict(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    others = dict(num_beams=2, num_return_sequences=2, no_repeat_ngram_size=1, min_new_tokens=8)
    try:
        for settings in (sampling, others):
            model.generation_config = GenerationConfig(**own.to_diff_dict(), **settings)
            before = model.generation_config
            assert [generate.answer(model, tokenizer, sample).text for _ in range(3)] == [plain] * 3
            assert model.generation_config is before
    finally:
        model.generation_config = own


def test_answers_of_a_batch_are_those_of_each_alone(model, tokenizer, monkeypatch):
    """Prompts of several lengths, dense and under rings; some end early, by answer or by token."""
    names = "niah_single_1", "niah_multikey_2", "fwe", "qa_1_invented"
    tasks = [TASKS[name] for name in names]
    suite = Suite(tasks, [700], 2, Prompter(tokenizer))
    samples = [replace(suite.sample(c), new_tokens=8 + 2 * i) for i, c in enumerate(suite.cases)]
    assert len({len(sample.ids) for sample in samples}) > 4
    for arm in (Dense(), Sparse(rings(model))):
        with arm.on(model), monkeypatch.context() as patch:
            full = [generate.answer(model, tokenizer, sample).text for sample in samples]
            samples[2] = replace(samples[2], answers=(full[2][3:6],))
            told = model.generate(torch.tensor([samples[5].ids]), max_new_tokens=5, do_sample=False)
            patch.setattr(model.generation_config, "eos_token_id", [int(told[0, -1])])
            alone = [generate.answer(model, tokenizer, sample, 20) for sample in samples]
            batch = together(model, tokenizer, samples, 20)
        assert [(a.text, a.new_tokens) for a in batch] == [(a.text, a.new_tokens) for a in alone]
        assert alone[2].new_tokens < 12
        assert alone[5].new_tokens < 18


def test_a_run_in_batches_ends_with_the_same_lines(tmp_path, model, tokenizer, suite):
    for size in (1, 3):
        (tmp_path / f"{size}").mkdir()
        here = results(tmp_path / f"{size}")
        runner.run(Session(model, tokenizer, here, [Sparse(rings(model))]), suite, 4, size)
    alone, batched = (stored(tmp_path / f"{size}") for size in (1, 3))
    assert {line["batch"] for line in batched} == {2}  # of one task
    shared = (*TIMES, "batch", *runner.MEASURED, "kv_bytes")  # measured of a whole batch
    for line in alone + batched:
        assert 0 < line["cache_share"] < 0.7 if line["arm"] == "sparse" else not line["kv_bytes"]
        for name in shared:
            line.pop(name)
    assert timeless(batched) == timeless(alone)


def test_several_plans_and_what_they_are_stay_in_the_folder(tmp_path, model, tokenizer, suite):
    full = Sparse(Plan.full(ModelId.of(model)), "full")
    small = Sparse(rings(model), "small")
    small.plan.made = {"verified": {"limit": 0.02, "lengths": [512], "tasks": {}}}
    here = Results(tmp_path, SETTINGS, {"machine": "this"}, [full.facts(), small.facts()])
    runner.run(Session(model, tokenizer, here, [full, small]), suite, 4)
    each = [plan for plan in (None, full.hash, small.hash) for _ in range(4)]
    assert [x["plan"] for x in stored(tmp_path)] == each * 2  # at both lengths
    later = Results(tmp_path, SETTINGS, {"machine": "this"})
    assert [arm["title"] for arm in later.arms] == ["full", "small"]
    assert later.arms[1]["promise"] == {"limit": 0.02, "lengths": [512]}


def test_an_arm_that_fails_is_noted_and_left_and_the_next_goes_on(
    tmp_path, monkeypatch, model, tokenizer, suite
):
    def failing(*args):
        if args[2].id.startswith("niah_single_2-512") and model.config._attn_implementation != own:
            raise torch.OutOfMemoryError("80 GiB")
        return generate.answer(*args)

    own = model.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(runner, "answer", failing)
        here = results(tmp_path)
        runner.run(Session(model, tokenizer, here, [Sparse(rings(model))]), suite, 4)
    assert [x["failed"] for x in here.failed] == ["OutOfMemoryError: 80 GiB"]
    short, long = ["dense"] * 4 + ["sparse"] * 3, ["dense"] * 4 + ["sparse"] * 4
    assert [x["arm"] for x in stored(tmp_path)] == short + long
    again = results(tmp_path)
    runner.run(Session(model, tokenizer, again, [Sparse(rings(model))]), suite, 4)
    assert again.failed == []
    assert len(again.done) == 16


def test_processes_share_the_cases_and_the_first_merges_what_they_wrote(
    tmp_path, model, tokenizer, suite
):
    """The second process was killed in the middle of a line; a single one ends its work."""
    parts = [Results(tmp_path, SETTINGS, {"machine": "this"}, part=part) for part in (0, 1)]
    for part, here in enumerate(parts):
        runner.run(Session(model, tokenizer, here, world=World(part, 2)), suite, 4)
    torn = tmp_path / "results-1.jsonl"
    whole = timeless([*stored(tmp_path), *map(json.loads, torn.read_text().splitlines())])
    assert len(whole) == 8
    assert {json.loads(x)["id"] for x in whole} == {case.id for case in suite.cases}
    torn.write_bytes(torn.read_bytes()[:-30])
    with pytest.raises(UsageError, match="another -o"):
        results(tmp_path, model="other")
    assert torn.exists()
    again = results(tmp_path)
    assert not torn.exists()
    assert len(again.lines) == 7
    runner.run(Session(model, tokenizer, again), suite, 4)
    assert timeless(stored(tmp_path)) == whole


def test_after_a_round_each_process_knows_the_results_of_all(tmp_path):
    parts = [Results(tmp_path, SETTINGS, {"machine": "this"}, part=part) for part in (0, 1)]
    sessions = [Session(None, None, here, world=World(part, 2)) for part, here in enumerate(parts)]
    for turn in ("a", "b"):
        for part, here in enumerate(parts):
            here.append({"id": f"{turn}{part}", "arm": "dense", "plan": None, "model": "m"})
        for session in sessions:
            session.gather()
        assert parts[0].lines == parts[1].lines == stored(tmp_path)
    assert len(stored(tmp_path)) == 4


def test_the_cap_only_shortens(model, tokenizer, suite):
    sample = replace(suite.sample(suite.cases[0]), new_tokens=6)
    assert generate.answer(model, tokenizer, sample, cap=3).new_tokens == 3
    assert generate.answer(model, tokenizer, sample, cap=99).new_tokens == 6


def test_a_plan_that_drops_nothing_answers_as_dense_under_the_real_patch(
    tmp_path, model, tokenizer, suite
):
    plan = Plan.full(ModelId.of(model))
    runner.run(Session(model, tokenizer, results(tmp_path), [Sparse(plan)]), suite, 4)
    lines = stored(tmp_path)
    dense, sparse = (
        {line["id"]: line["output"] for line in lines if line["arm"] == arm}
        for arm in ("dense", "sparse")
    )
    assert dense == sparse
    assert len(dense) == 8
    measured = [line for line in lines if line["arm"] == "sparse"]
    assert {line["plan"] for line in measured} == {plan.hash()}
    assert {(line["pair_density"], line["decode_share"]) for line in measured} == {(1.0, 1.0)}
    assert all(line["cache_share"] >= 1.0 for line in measured)


def test_a_streaming_plan_is_measured_below_full(tmp_path, model, tokenizer, suite):
    runner.run(Session(model, tokenizer, results(tmp_path), [Sparse(rings(model))]), suite, 4)
    measured = [line for line in stored(tmp_path) if line["arm"] == "sparse"]
    assert len(measured) == 8
    for line in measured:
        queries = line["prompt_tokens"]
        # a query keeps 8 sinks and 32 recent keys; the first 40 have fewer keys than that
        expected = (sum(range(1, 41)) + 40 * (queries - 40)) / (queries * (queries + 1) / 2)
        assert line["pair_density"] == pytest.approx(expected, rel=1e-4)
        assert line["block_density"] >= line["pair_density"]
