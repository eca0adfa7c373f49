"""hfsparse verify: what it prints, where it writes, how it ends."""

import json
from dataclasses import replace

import pytest

from hfsparse.plan import ModelId, Plan
from hfsparse.profiler.settings import Settings
from tests import tiny
from tests.cli.test_cli import error, run

FAILS = "warning: this plan loses more than its limits on this model. Give it more"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "plan.yaml"
    Plan.full(ModelId.of(tiny.llama())).save(file)
    return file


@pytest.fixture
def proof(monkeypatch):
    """Stands for the work: what it was given, and the proof that it finds."""
    given = {"verified": {"told": "0.0 % of 96 answers lost", "kept": True}}

    def prove(model, plan, tokenizer, out, **settings):
        given.update(settings, out=out, plan=plan, model=model)
        proved = replace(plan, made={"verified": given["verified"]})
        if out is not None:
            proved.save(out)
        return proved

    monkeypatch.setattr("hfsparse.profiler.verify.verify", prove)
    return given


def test_it_prints_the_proof_and_writes_nothing_unless_asked(model, plan, proof, tmp_path):
    before = plan.read_bytes()
    result = run("verify", plan, model, "--lengths", "256,512", "--drop", 0.02, "--seed", 4)
    assert result.exit_code == 0, result.output
    assert "verified: 0.0 % of 96 answers lost\n" in result.stdout
    assert result.stdout.endswith("nothing written: --write puts it into the plan\n")
    assert plan.read_bytes() == before
    assert [*tmp_path.iterdir()] == [plan]
    assert (proof["plan"], type(proof["model"]).__name__) == (Plan.load(plan), "LlamaForCausalLM")
    names = {*Settings.names("proof")}
    defaults = {name: getattr(Settings(), name) for name in names}
    asked = {"lengths": (256, 512), "drop": 0.02, "seed": 4, "progress": True}
    assert {name: proof[name] for name in names} == defaults | asked


@pytest.mark.parametrize("where", ["--write", "-o"])
def test_the_proof_goes_where_it_is_asked_to(model, plan, proof, tmp_path, where):
    before, other = plan.read_bytes(), tmp_path / "proved.yaml"
    result = run("verify", plan, model, where, *([other] if where == "-o" else []))
    assert result.exit_code == 0, result.output
    target = other if where == "-o" else plan
    assert result.stdout.endswith(f"wrote {target}\n")
    assert Plan.load(target).verified == proof["verified"]
    assert where == "--write" or plan.read_bytes() == before


@pytest.mark.parametrize(
    ("verified", "warning"),
    [
        ({"told": "9.0 % of 96 answers lost", "kept": False}, FAILS),
        ({"told": "none: no task"}, "warning: nothing verified this plan: no task."),
    ],
    ids=["fails", "none"],
)
def test_a_proof_that_fails_is_written_and_ends_in_1(model, plan, proof, verified, warning):
    proof["verified"] = verified
    result = run("verify", plan, model, "--write")
    assert result.exit_code == 1
    assert f"verified: {verified['told']}" in result.stdout
    assert result.stderr.splitlines()[-1].startswith(warning)
    assert Plan.load(plan).verified == verified


def test_what_cannot_be_verified_is_refused_before_weights_are_loaded(
    model, plan, tmp_path, monkeypatch
):
    def load(*words):
        raise AssertionError("the weights were loaded first")

    monkeypatch.setattr("hfsparse.models.loading.load", load)
    other = tiny.save(tmp_path / "other", num_hidden_layers=3)
    assert "plan was made for LlamaForCausalLM with 2 layers" in error("verify", plan, other)
    assert "give one" in error("verify", plan, model, "--write", "-o", tmp_path / "x.yaml")
    assert "make it first" in error("verify", plan, model, "-o", tmp_path / "absent" / "x.yaml")
    assert "there is no calibration file" in error("verify", plan, model, "--data", "absent.jsonl")
    assert "nats is -1.0: give 0 or more" in error("verify", plan, model, "--nats", "-1")
    assert "can't read it" in error("verify", tmp_path / "absent.yaml", model)
    assert run("verify", plan, model, "--method", "duo").exit_code == 2


def test_a_real_plan_gets_a_real_proof(model, plan, tmp_path):
    """Random weights answer nothing, so that nothing can be told."""
    words = ["--lengths", "512", "--verify-samples", 1, "--write"]
    result = run("verify", plan, model, *words)
    assert result.exit_code == 1, result.output
    proved = Plan.load(plan)
    assert proved.unproved.startswith("the dense model can do none of the tasks")
    assert proved.verified["model"] == model.name
    assert proved.expected[512]["pair_density"] == 1.0
    assert [*tmp_path.iterdir()] == [plan]
    assert json.dumps(proved.verified)
