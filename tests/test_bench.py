"""`hfsparse bench`: rows that hold together, the break-even, what --write leaves in a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import hfsparse
from hfsparse import bench, kernels
from hfsparse.cli import app
from hfsparse.plan import Plan
from hfsparse.runtime.call import running

ROW = bench.Row(1024, 1.0, 2.0, 0.1, 0.5, 0.4, 1.0, 1.0)


@pytest.fixture(scope="module")
def model():
    return bench.random_model("tiny", torch.device("cpu"), torch.float32)


def test_a_row_is_measured_and_nothing_stays_replaced(model):
    before = kernels.TABLES
    (row,) = bench.bench(model, bench.stand_in(model), [2500], repeat=1)
    assert running() is None
    assert kernels.TABLES is before
    assert row.tokens == 2500
    assert row.choose_s > 0
    assert 0 < row.attend_s < 10 * row.sparse_s
    assert 0.3 < row.pair_density < 0.9
    assert not hasattr(model.model, "_hfsparse")


def test_the_clock_says_which_kernels_ran(model):
    clock, ids = bench.Clock(model.device), torch.randint(0, 100, (1, 2500))
    with hfsparse.patch(model), clock:
        bench.first_token(model, ids)
    assert clock.kernels == ["torch sdpa"]
    with hfsparse.patch(model, bench.stand_in(model)), clock:
        bench.first_token(model, ids)
    assert clock.kernels == ["torch sdpa", "torch flash over lists"]


def test_a_length_pays_from_where_it_was_always_faster():
    at = [replace(ROW, tokens=n, sparse_s=s) for n, s in ((1, 0.5), (2, 1.2), (3, 0.9), (4, 0.2))]
    assert bench.pays_from(at) == 3
    assert bench.pays_from(at[:2]) is None
    assert bench.pays_from([replace(ROW, sparse_s=0.98)]) is None


def test_the_written_plan_keeps_its_hash_and_says_from_where_it_pays(model):
    plan = bench.stand_in(model)
    rows = [ROW, replace(ROW, tokens=4096, sparse_s=0.4)]
    more = Plan.loads(bench.with_measurements(plan, rows, "Some GPU").dumps())
    assert more.hash() == plan.hash()
    assert more.measured["Some GPU"]["below"] == {"prefill": 4096}
    assert more.measured["Some GPU"]["prefill"][1]["sparse_s"] == 0.4
    assert "below" not in bench.with_measurements(plan, rows[:1], "Some GPU").measured["Some GPU"]


def test_the_patch_follows_what_was_measured_on_its_device(model):
    plan = bench.stand_in(model)
    ids = torch.randint(0, 100, (1, 2000))
    for measured, dense in (({}, False), ({"below": {"prefill": 3000}}, True)):
        known = replace(plan, measured={"cpu": measured, "Some GPU": {"below": {"prefill": 1}}})
        with torch.no_grad(), hfsparse.patch(model, known) as handle:
            model(ids)
            density = handle.stats().layers[0].pair_density
        assert (density[2:] == [1, 1]) == dense  # the heads that are no rings
        assert density[0] < 1


def test_the_command_measures_and_writes(tmp_path, model):
    file = tmp_path / "plan.yaml"
    bench.stand_in(model).save(file)
    words = f"bench --shape tiny --plan {file} --lengths 300,600 --repeat 1 --write --device cpu"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert "| 600 |" in result.output
    assert [row["tokens"] for row in Plan.load(file).measured["cpu"]["prefill"]] == [300, 600]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "give either a model or --shape"),
        ("somewhere --shape tiny", "give either a model or --shape"),
        ("--shape tiny --write", "--write needs the --plan"),
        ("--shape huge", "no shape huge: there is llama-3.1-8b, tiny"),
    ],
)
def test_bad_input_is_one_sentence(words, said):
    result = CliRunner().invoke(app, ["bench", *words.split()])
    assert result.exit_code == 1
    assert said in result.output
