"""A plan is given by a file, a shipped name or an address, wherever one is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import hfsparse
from hfsparse.cli import app
from hfsparse.plan import ModelId, Plan, PlanError, PlanMismatch, sources
from hfsparse.plan.sources import is_own_file, name_of, open_plan, shipped
from tests import tiny

NAME = "own:tiny-llama-1.0"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of shipped plans that has the tiny model's."""
    folder = tmp_path / "plans"
    folder.mkdir()
    plan = Plan.full(ModelId.of(tiny.llama()))
    plan.made = {"model": "org/tiny"}
    plan.save(folder / "own-tiny-llama-1.0.yaml")
    monkeypatch.setattr(sources, "FOLDER", folder)
    return plan


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "llama", window=2048)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_name_is_its_plan_in_any_case(mine):
    assert open_plan(NAME) == open_plan("Own:Tiny-Llama-1.0") == mine
    assert [*shipped()] == [NAME]
    assert not is_own_file(NAME)


def test_a_file_is_a_file_whatever_its_name(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = Plan.full(ModelId.of(tiny.llama(num_hidden_layers=1)))
    for file in ("plan.yaml", NAME, tmp_path / "far.yaml"):
        other.save(file)
        assert open_plan(file) == other
        assert is_own_file(file)
    assert open_plan(Path("plan.yaml")) == other


@pytest.mark.parametrize("source", [r"C:\plan.yaml", "C:plan.yaml", "a/b:c", "a:b", ":b"])
def test_what_is_no_name_is_looked_for_as_a_file(source):
    with pytest.raises(PlanError, match=r"No such file.*, or a name that hfsparse plans li"):
        open_plan(source)


@pytest.mark.parametrize("source", ["HF://a/b/plan.yaml", "hf:/a/b", "https://huggingface.co/a/b"])
def test_an_address_of_another_form_is_told_ours(source):
    with pytest.raises(PlanError, match="a plan on the hub is hf://"):
        open_plan(source)


def test_an_unknown_name_is_refused_with_those_that_are_near():
    with pytest.raises(PlanError, match="no plan 'duo:llama-3-8b' is shipped: near it are duo:lla"):
        open_plan("duo:llama-3-8b")
    with pytest.raises(PlanError, match=r"there are duo:llama-2.*moa:vicuna.*\(hfsparse plans l"):
        open_plan("quest:xyz")


@pytest.mark.parametrize("source", ["duo:", "duo: ", "duo:/x", "Duo:../x"])
def test_a_name_that_is_empty_or_odd_is_refused_with_those_of_its_method(source):
    with pytest.raises(PlanError, match=f"no plan '{source}' is shipped: near it are duo:llama"):
        open_plan(source)


@pytest.mark.parametrize("source", ["", "  "])
def test_no_plan_at_all_is_said_so(source):
    with pytest.raises(PlanError, match=f"the plan is '{source}': give its file, or a name"):
        open_plan(source)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/b/plan.v2.yaml", "plan.v2"),
        (Path("mine.yaml"), "mine"),
        ("Duo:llama-3.1-8b-instruct", "duo:llama-3.1-8b-instruct"),
        ("hf://org/repo@main/sub/best.yaml#sha256:0123456789ab", "best"),
    ],
)
def test_a_plan_is_called_after_its_file_or_name(source, name):
    assert name_of(source) == name


def test_patch_takes_a_name_and_checks_the_model(mine):
    with hfsparse.patch(tiny.llama(), NAME) as handle:
        assert mine.hash()[:19] in handle.explain()
    with pytest.raises(PlanMismatch, match="plan was made for LlamaForCausalLM with 2 layers"):
        hfsparse.patch(tiny.llama(num_hidden_layers=1), NAME)
    with pytest.raises(PlanMismatch, match="its rope, window or layer kinds differ"):
        hfsparse.patch(tiny.llama(rope_theta=5e5), NAME)
    hfsparse.patch(tiny.llama(rope_theta=5e5), NAME, allow={"fingerprint"}).undo()


def test_every_command_that_takes_a_plan_takes_a_name(mine, model, tmp_path):
    (tmp_path / "prompt.txt").write_text("What is at the end?\n")
    out = tmp_path / "results"
    for words in (
        ["show", NAME, "--png", tmp_path / "heads.png"],
        ["diff", NAME, NAME],
        ["check", NAME, model, "--length", 128],
        ["explain", model, "--plan", NAME],
        ["generate", model, "--plan", NAME, "--prompt-file", tmp_path / "prompt.txt"],
        ["bench", model, "--plan", NAME, "--lengths", 64, "--repeat", 1],
        ["eval", "recall", model, "--plan", NAME, "--lengths", 1024, "--samples", 1, "-o", out],
    ):
        done = run(*words)
        assert done.exit_code == 0, f"{words}\n{done.output}"
    assert f"{NAME} fits {model}" in run("check", NAME, model).output
    assert NAME in (out / "report.md").read_text()


def test_a_measurement_is_written_into_files_alone(mine, model):
    for plan in (NAME, "hf://org/repo/plan.yaml"):
        refused = run("bench", model, "--plan", plan, "--write")
        assert refused.exit_code == 1
        assert f"--write can't write into {plan}: give a file of yours" in refused.stderr


def test_plans_are_listed_by_model(model):
    listed = run("plans").stdout
    for name in shipped():
        assert f"\n  {name} " in listed
    rows = listed.splitlines()
    first = rows.index("meta-llama/Llama-3.1-8B-Instruct")
    assert [row.split()[0] for row in rows[first + 1 : first + 3]] == [
        "duo:llama-3.1-8b-instruct",
        "minference:llama-3.1-8b-instruct",
    ]
    assert all(row.endswith("not verified by us") for row in rows if row.startswith("  "))


def test_plans_of_a_model_are_those_that_fit_it(mine, model, tmp_path):
    assert run("plans", model).stdout.startswith(f"org/tiny\n  {NAME} ")
    other = tiny.llama(rope_theta=5e5)
    other.config.architectures = ["LlamaForCausalLM"]
    other.config.save_pretrained(tmp_path / "other")
    refused = run("plans", tmp_path / "other")
    assert refused.exit_code == 1
    assert "no plan that is shipped fits" in refused.stderr
