"""Plans that are shipped: each fits its model, says where it is from, and can be made again."""

from __future__ import annotations

import json
import random
import sys

import pytest

import hfsparse
from benchmarks.studies.published import plans as script
from benchmarks.studies.published.configs import CONFIGS, config
from hfsparse.models.loading import skeleton
from hfsparse.plan import ModelId, Plan, PlanMismatch
from hfsparse.plan.headmap import text
from hfsparse.plan.sources import FOLDER, shipped

PLANS = {search.name: Plan.load(FOLDER / search.shipped) for search in script.PUBLISHED}


def test_the_plans_that_are_shipped_are_those_that_the_script_makes():
    assert sorted(shipped()) == sorted(PLANS)
    assert all(shipped()[name].name == each.shipped for name, each in by_name().items())
    assert {search.model for search in script.PUBLISHED} == {*CONFIGS}


def by_name():
    return {search.name: search for search in script.PUBLISHED}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_fits_the_model_of_its_config_and_says_where_it_is_from(name):
    plan, search = PLANS[name], by_name()[name]
    made_for = config(search.model)
    assert plan.model == ModelId.of(made_for)
    assert script.facts(search).items() <= plan.made.items()
    assert plan.made["imported"] == search.file
    assert {*search.more} < {*plan.made["lost"]}
    assert "not verified by us" in text(plan).plain
    plan.check(made_for)


@pytest.mark.parametrize(
    "name",
    [
        "duo:llama-3.1-8b-instruct",
        "duo:mistral-7b-instruct-v0.2",
        "minference:qwen2.5-7b-instruct-1m",
        "minference:phi-3-mini-128k-instruct",
    ],
)
def test_a_model_of_each_class_is_patched_with_a_warning(name):
    search = by_name()[name]
    model = skeleton(config(search.model))
    with pytest.warns(UserWarning, match="verified by nothing .*not verified by us"):
        handle = hfsparse.patch(model, name)
    told = handle.explain()
    handle.undo()
    assert PLANS[name].hash()[:19] in told
    assert f"not verified on these weights (plan made on {search.model})" in told


def test_duo_streams_half_of_the_kv_heads_and_moa_widens_with_the_text():
    for name, plan in PLANS.items():
        cached = [word for layer in plan.layers for word in layer.cache]
        if name.startswith("duo:"):
            assert cached.count("stream64-256") * 2 == len(cached)
        elif name.startswith("moa:"):
            rings = [plan.patterns[word] for word in cached if word != "full"]
            assert rings
            assert all(ring.sink == 64 for ring in rings)
            assert any(ring.recent_per_token for ring in rings)
        else:
            assert {*cached} == {"full"}
            assert all("full" not in layer.prefill for layer in plan.layers)


def test_a_plan_is_refused_by_another_model_of_its_shape():
    with pytest.raises(PlanMismatch, match="its rope, window or layer kinds differ"):
        PLANS["minference:qwen2.5-7b-instruct"].check(config("Qwen/Qwen2.5-7B-Instruct-1M"))
    with pytest.raises(PlanMismatch, match="8 kv heads"):
        PLANS["duo:llama-3.1-8b-instruct"].check(config("lmsys/vicuna-7b-v1.5-16k"))


def test_the_page_says_what_the_plans_say():
    assert (FOLDER / "README.md").read_text("utf-8") == script.page(PLANS)


# ---- made again, of sources of the same form


def write_source(search, folder):
    """A search of the same form and shape as the published one, with other numbers."""
    model, draw = ModelId.of(config(search.model)), random.Random(search.name)
    place = folder / search.form / search.file
    place.parent.mkdir(exist_ok=True)
    if search.form == "duo":
        place.mkdir()
        rows = [[draw.random() for _ in range(model.kv_heads)] for _ in range(model.layers)]
        lines = ["\t".join(map(str, row)) for row in rows]
        (place / "full_attention_heads.tsv").write_text("\n".join(lines))
        (place / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256}))
    elif search.form == "moa":
        shape = range(model.layers), range(model.q_heads)
        betas = [[draw.choice([0.0, 0.25, 1.0]) for _ in shape[1]] for _ in shape[0]]
        alphas = [[draw.choice([0.0, 1024.0]) for _ in shape[1]] for _ in shape[0]]
        place.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    else:
        kinds = ["vertical_and_slash", 1000, 6096, 0.9], ["stream_llm", 64, 256, 0.8]
        layer = {str(head): kinds[head % 2] for head in range(model.q_heads)}
        place.write_text(json.dumps([layer] * model.layers))


def test_the_script_makes_every_plan_and_the_page(tmp_path, monkeypatch, capsys):
    for search in script.PUBLISHED:
        write_source(search, tmp_path)
    monkeypatch.setattr(sys, "argv", ["plans", str(tmp_path), "--out", str(tmp_path / "out")])
    script.main()
    told = capsys.readouterr().out
    made = {each.name: Plan.load(tmp_path / "out" / each.shipped) for each in script.PUBLISHED}
    for search in script.PUBLISHED:
        assert made[search.name].hash() != PLANS[search.name].hash()
        assert made[search.name].hash()[:19] in told
        assert made[search.name].model == PLANS[search.name].model
        assert script.facts(search).items() <= made[search.name].made.items()
    page = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert page == script.page(made)
    assert all(f"| `{name}` |" in page for name in made)
