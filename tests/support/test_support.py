"""Every family in every way, for a plan that drops much and, in some ways, one that drops nothing.

docs/support.json holds what each cell came to, for each version of transformers. A cell that comes
to something else fails; `make test-matrix` runs all versions and writes the file anew. Under
`--one-in 8` an eighth of the cells is run, some of every family and of every way, another eighth as
the code changes.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import pytest
import transformers
from transformers import cache_utils

import hfsparse
from hfsparse.errors import PatchError
from hfsparse.patcher.state import is_patched
from hfsparse.plan import PlanError
from tests.patcher.families import mixed
from tests.patcher.test_undo import trace
from tests.support import models, table, ways
from tests.support.models import FAMILIES, REFUSED, build_refused, exists, tiny
from tests.support.table import TABLE, UNTESTED, known, render
from tests.support.ways import WAYS, NotRun, StockCannot
from tests.turns import turn

GONE = UNTESTED, ""


@pytest.fixture
def cell(request):
    """`cell(outcome, reason)` notes what this cell came to, and holds it against the table."""

    def note(outcome: str, reason: str = "") -> None:
        at = [request.node.callspec.params.get(name, "patch") for name in ("family", "way")]
        # Without what is supported, which all refusals name.
        reason = re.sub(r"\s+", " ", reason).partition(". Supported: ")[0][:160]
        request.node.user_properties.append(("support", (*at, outcome, reason)))
        if not request.config.getoption("--write-support"):
            was = known(transformers.__version__, *at)
            renew = f"pytest tests/support -k {at[0]} --write-support writes it anew"
            assert was in (None, outcome), (
                f"docs/support.json says {was}, now: {outcome} {reason}: {renew}"
            )

    return note


def pytest_generate_tests(metafunc):
    if "way" not in metafunc.fixturenames:
        return
    parts = metafunc.config.getoption("--one-in")
    cells = [
        pytest.param(family, way, id=f"{family}-{way}")
        for i, family in enumerate(FAMILIES)
        for j, way in enumerate(WAYS)
        if (i + j) % parts == turn(parts, "support")
    ]
    metafunc.parametrize(("family", "way"), cells)


def test_support(family, way, cell, tmp_path):
    if not exists(family):
        cell("stock", "not in this version")
        return
    model, run = tiny(family), WAYS[way]
    more = {"tmp_path": tmp_path} if "tmp_path" in inspect.signature(run).parameters else {}
    try:
        for plan in (make(model) for make in run.plans):
            hfsparse.patch(model, plan).undo()
            run(model, plan, **more)
    except NotRun:
        cell(UNTESTED)
        pytest.skip("not meant for this model")
    except StockCannot as error:
        cell("stock", str(error))
    except PatchError as error:
        assert not is_patched(model)
        cell("refused", str(error))
    else:
        cell("pass")


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family, cell):
    """The reason is told, and the model is as it was."""
    if (model := build_refused(family)) is None:
        cell("stock", "not in this version")
        return
    before = trace(model)
    with pytest.raises(PatchError, match=REFUSED[family].reason) as told:
        hfsparse.patch(model)
    assert trace(model) == before
    assert not is_patched(model)
    cell("refused", str(told.value))


def test_the_page_shows_the_table(request):
    if request.config.getoption("--write-support"):
        pytest.skip("written at the end of this run")
    assert TABLE.with_suffix(".md").read_text() == render(), "run python -m tests.support.table"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The table's module, whose files are copies."""
    for name in ("TABLE", "NAMES"):
        file = tmp_path / getattr(table, name).name
        file.write_text(getattr(table, name).read_text())
        monkeypatch.setattr(table, name, file)
    table.load.cache_clear()
    yield table
    table.load.cache_clear()


@pytest.mark.skipif(not all(map(exists, FAMILIES)), reason="not every family is here")
def test_what_was_not_run_stays_in_the_table(copied):
    before, names = copied.TABLE.read_text(), copied.NAMES.read_text()
    page = copied.TABLE.with_suffix(".md")
    version = next(iter(copied.load()))
    copied.write(version, [])
    assert copied.TABLE.read_text() == before
    assert page.read_text() == TABLE.with_suffix(".md").read_text()
    assert copied.NAMES.read_text() == names
    copied.write(version, [("phi3", "beams", "refused", "no beams"), ("llama", "greedy", *GONE)])
    found, old = copied.load(), json.loads(before)
    assert found[version]["phi3"].pop("beams") == ["refused", "no beams"]
    assert "greedy" not in found[version]["llama"]
    del old[version]["phi3"]["beams"], old[version]["llama"]["greedy"]
    assert found == old
    assert f"refused: no beams (phi3, beams, {version})" in page.read_text()


@pytest.mark.skipif(not all(map(exists, FAMILIES)), reason="not every family is here")
def test_a_row_and_a_way_that_are_gone_leave_the_table(copied, monkeypatch):
    version = next(iter(copied.load()))
    monkeypatch.setattr(models, "FAMILIES", [name for name in FAMILIES if name != "phi3"])
    monkeypatch.setattr(ways, "WAYS", {name: run for name, run in WAYS.items() if name != "beams"})
    copied.write(version, [])
    assert "phi3" not in copied.load()[version]
    assert all("beams" not in cells for cells in copied.load()[version].values())
    assert "phi3" not in copied.NAMES.read_text().split()


def test_words_for_a_layer_without_attention_are_refused_and_the_model_left_alone():
    if not hasattr(cache_utils, "LinearAttentionLayer"):
        pytest.skip("this transformers keeps linear states in caches of the models' own")
    model = tiny("qwen3_next")
    before = trace(model)
    plan = mixed(model)
    wrong = dataclasses.replace(plan, layers=(plan.layers[1], *plan.layers[1:]))
    with pytest.raises(PlanError, match="layer 0 has no attention: write full for all its heads"):
        hfsparse.patch(model, wrong)
    assert trace(model) == before
