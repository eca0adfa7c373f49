import json
import subprocess
import sys

import pytest
import transformers
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import hfsparse
from hfsparse.models.weights import weights_mark
from hfsparse.plan import ModelId, Plan
from hfsparse_eval.cli import app
from hfsparse_eval.options import Size, names_by_default, read_size
from hfsparse_eval.tasks.haystack import prose_source
from tests import tiny
from tests.eval.test_qa import SQUAD


@pytest.fixture
def call(folder, tmp_path):
    def run(command, *options, model=folder):
        words = [command, str(model), "-o", str(tmp_path / "out"), *map(str, options)]
        return CliRunner().invoke(app, words)

    run.folder = folder
    return run


def sentence(result):
    """The one line a refused command says."""
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tasks", "niah_single_7"], "unknown task niah_single_7: did you mean niah_single_"),
        (["--tasks", "variable"], "unknown task variable: did you mean "),
        (["--tasks", "qa_1"], "qa_1 needs its data: give --squad FILE, or take qa_1_invented"),
        (["--tasks", "qa_2"], "qa_2 needs its data: give --hotpotqa FILE, or take qa_2_invented"),
        (["--squad", "absent.json"], "absent.json: can't read: No such file"),
        (["--hotpotqa", "absent.json"], "absent.json: can't read: No such file"),
        (["--squad", __file__], f"{__file__} is not SQuAD's published JSON"),
        (["--tasks", ","], "no task given: give some of niah_single_1, "),
        (["--samples", "0"], "samples is 0: give 1 or more"),
        (["--samples", "-3"], "samples is -3: give 1 or more"),
        (["--max-new-tokens", "0"], "max-new-tokens is 0: give 1 or more"),
        (["--lengths", "1k"], "lengths is '1k': give numbers above 0, by commas"),
        (["--lengths", ""], "lengths is '': give numbers above 0, by commas"),
        (["--lengths", "-5"], "lengths is '-5': give numbers above 0, by commas"),
        (["--lengths", "512,4096"], "length 4096 is beyond this model's window of 2048 tokens"),
        (["--lengths", "150"], "niah_single_1 does not fit 150 tokens"),
        (["--device", "abacus"], "device abacus can't be used"),
        (["--dtype", "int3"], "unknown dtype int3: give one of auto, float32"),
        (["--plan", "absent.yaml"], "absent.yaml: can't read"),
        (["--suite", "standart"], "unknown suite standart: did you mean standard? (smoke, "),
        (["--batch", "0"], "batch is 0: give 1 or more"),
        (["--arm", "press:0.5"], "unknown arm press:0.5: give kvpress:PRESS:RATIO"),
        (["--suite", "quick"], "length 16384 is beyond this model's window of 2048 tokens"),
    ],
)
def test_bad_options_are_one_clear_sentence(options, expected, call):
    assert sentence(call("ruler", *options)).startswith(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--depths", "0,120"], "depths is '0,120': give numbers 0 to 100, by commas"),
        (["--task", "vt"], "unknown task vt: did you mean niah_"),
        (["--task", "qa_1"], "unknown task qa_1: did you mean niah_"),
        (["--task", "niah_multivalue"], "unknown task niah_multivalue: did you mean niah_"),
        (["--task", "niah_single_1,niah_single_2"], "task is niah_single_1,niah_single_2: a grid"),
    ],
)
def test_bad_grids_are_one_clear_sentence(options, expected, call):
    assert sentence(call("needle", *options)).startswith(expected)


def test_models_that_are_none_are_one_clear_sentence(call, tmp_path, folder):
    assert sentence(call("ruler", model="./absent")) == "no such model folder: ./absent"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert sentence(call("ruler", model=empty)).startswith(f"{empty} has no config.json")
    (empty / "config.json").write_text("{}")
    assert sentence(call("ruler", model=empty)).startswith("cannot load the ")
    file = empty / "config.json"
    assert sentence(call("ruler", model=file)).startswith(f"{file} is a file")


def test_an_output_that_cannot_be_written_is_one_clear_sentence(call, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert sentence(call("ruler")).startswith(f"cannot write to {tmp_path / 'out'}: ")


def test_a_plan_for_another_model_is_one_clear_sentence(call, tmp_path):
    other = Plan.full(ModelId.of(tiny.llama(num_hidden_layers=3)))
    other.save(tmp_path / "plan.yaml")
    said = sentence(call("ruler", "--lengths", 512, "--plan", tmp_path / "plan.yaml"))
    assert "3 layers" in said
    assert "with 2" in said
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_the_same_plan_twice_is_one_clear_sentence(call, tmp_path, model):
    for name in ("a", "b"):
        Plan.full(ModelId.of(model)).save(tmp_path / f"{name}.yaml")
    twice = [x for name in ("a", "b") for x in ("--plan", tmp_path / f"{name}.yaml")]
    assert sentence(call("ruler", *twice)) == "b and a are the same: give one"


def test_a_suite_sets_lengths_and_samples_and_flags_go_before_it():
    usual = Size(8, (4096,))
    assert read_size(None, None, None, usual) == usual
    assert read_size("standard", None, None, usual) == Size(100, (4096, 8192, 16384, 32768))
    assert read_size("full", None, None, usual).lengths[-1] == 131072
    assert read_size("smoke", "512,600", None, usual) == Size(4, (512, 600))
    assert read_size("quick", None, 3, usual) == Size(3, (4096, 16384))


def test_another_model_in_the_same_directory_is_refused_and_nothing_is_touched(call, tmp_path):
    small = ["--lengths", 512, "--samples", 1, "--tasks", "niah_single_1", "--max-new-tokens", 2]
    assert call("ruler", *small).exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in before} > {"report.md", "report.html"}
    model = AutoModelForCausalLM.from_pretrained(call.folder)
    model.lm_head.weight.data[0] += 1
    other = tmp_path / "other"
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(call.folder).save_pretrained(other)
    assert f"holds results with model {call.folder}, this run has {other}" in sentence(
        call("ruler", *small, model=other)
    )
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_another_seed_in_the_same_directory_is_refused(call):
    options = ["--lengths", "512", "--samples", 1, "--tasks", "niah_single_1"]
    small = [*options, "--max-new-tokens", 2]
    assert call("ruler", *small).exit_code == 0
    refused = sentence(call("ruler", *small, "--seed", 1))
    assert refused.endswith("holds results with seed 0, this run has 1: give another -o")


def test_ruler_runs_every_task_and_reports_it(call, tmp_path):
    result = call("ruler", "--lengths", "1536", "--samples", 1, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out" / "report.md") in result.stdout
    report = (tmp_path / "out" / "report.md").read_text()
    for name in [*names_by_default("ruler").split(","), "all"]:
        assert f"| {name} | " in report
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["arm"] for line in lines] == ["dense"] * 13


def test_squads_questions_take_the_place_of_invented_ones(call, tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD))
    options = ["--squad", tmp_path / "dev.json", "--samples", 1, "--max-new-tokens", 1]
    result = call("ruler", "--lengths", 1536, *options)
    assert result.exit_code == 0, result.output
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| qa_1 | " in report
    assert "| qa_1_invented | " not in report
    assert "| qa_2_invented | " in report
    assert "- questions: qa_1 dev.json, sha256:" in report


def test_data_of_a_task_that_is_not_run_is_not_left_unread(call, tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD))
    told = sentence(call("ruler", "--squad", tmp_path / "dev.json", "--tasks", "niah_single_1"))
    assert told.startswith("--squad is the data of qa_1, which --tasks leaves out: name it there")


def test_needle_draws_its_grid(call, tmp_path):
    options = ["--lengths", "400,512", "--depths", "0,50,100", "--samples", 1]
    result = call("needle", *options, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    cells = {(row["depth"], row["length"]) for row in map(json.loads, lines)}
    assert cells == {(d, length) for d in (0, 50, 100) for length in (400, 512)}
    picture = imread(tmp_path / "out" / "heatmap.png")
    assert picture.ndim == 3
    assert picture.shape[0] > 100


def test_ctrl_c_says_that_the_run_can_go_on(call, monkeypatch):
    from hfsparse_eval.run import runner

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "answer", stop)
    result = call("ruler", "--lengths", "512", "--tasks", "niah_single_1")
    assert result.exit_code == 130
    assert "go on when given the same command" in result.stderr


def test_bad_words_are_refused_before_torch_is_loaded():
    code = (
        "import sys, hfsparse_eval.cli\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# As version 0.1.0 wrote them before tasks had a protocol; what depends on the machine is filled in.
OLD_RUN = """{
 "settings": {
  "kind": "ruler",
  "model": "MODEL",
  "fingerprint": "FINGERPRINT",
  "weights": "WEIGHTS",
  "version": "VERSION",
  "dtype": "float32",
  "seed": 0,
  "chat": "auto",
  "max_new_tokens": 2,
  "prose": "PROSE",
  "squad": null,
  "hotpotqa": null,
  "data": null,
  "stride": null,
  "metric": null,
  "turns": null
 },
 "sessions": [
  {
   "machine": "another, threads: 1, Linux x86_64",
   "python": "3.11.7",
   "torch": "2.13.0+cpu",
   "transformers": "TRANSFORMERS",
   "hfsparse": "VERSION"
  }
 ],
 "arms": []
}
"""
OLD_LINE = (
    '{"id": "niah_single_1-512-0000", "task": "niah_single_1", "length": 512, "depth": 47.6, '
    '"arm": "dense", "plan": null, "model": "FINGERPRINT", "transformers": "TRANSFORMERS", '
    '"device": "another, threads: 1", "score": 1.0, "answers": ["1234567"], "output": " 1234567", '
    '"gold": [[200, 220]], "metric": "all", "real": 500, "prompt_tokens": 373, "new_tokens": 2, '
    '"seconds": 0.05, "first_token_seconds": 0.02, "batch": 1, "pair_density": null, '
    '"block_density": null, "decode_share": null, "cache_share": null, "kv_bytes": null}\n'
)


def test_a_run_that_an_earlier_version_began_goes_on(call, model, folder, tmp_path):
    """A setting that changes its name or its value would refuse the folder."""
    facts = {
        "MODEL": str(folder),
        "FINGERPRINT": ModelId.of(model).fingerprint,
        "WEIGHTS": weights_mark(AutoModelForCausalLM.from_pretrained(folder)),
        "TRANSFORMERS": transformers.__version__,
        "VERSION": hfsparse.__version__,
        "PROSE": prose_source(),
    }
    old_run, old_line = OLD_RUN, OLD_LINE
    for name, value in facts.items():
        old_run, old_line = old_run.replace(name, value), old_line.replace(name, value)
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(old_run)
    (out / "results.jsonl").write_text(old_line)
    small = ["--lengths", 512, "--samples", 2, "--tasks", "niah_single_1", "--max-new-tokens", 2]
    result = call("ruler", *small)
    assert result.exit_code == 0, result.output
    first, second = (out / "results.jsonl").read_text().splitlines(keepends=True)
    assert first == old_line
    assert list(json.loads(second)) == list(json.loads(old_line))
    assert json.loads(second)["id"] == "niah_single_1-512-0001"
    new_run = json.loads((out / "run.json").read_text())
    assert new_run["settings"] == json.loads(old_run)["settings"]
    assert list(new_run["settings"]) == list(json.loads(old_run)["settings"])
    assert [list(each) for each in new_run["sessions"]] == [list(new_run["sessions"][0])] * 2
