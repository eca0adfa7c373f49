"""Plans in forms of other projects: what their readers make of the file, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hfsparse.cli import app
from hfsparse.errors import UsageError
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.plan.exporters import export_plan
from hfsparse.plan.importers import import_plan
from tests.plan.test_importers import config, note

SKIPS = Plan(ModelId.of(config()), {}, Plan.full(ModelId.of(config())).layers, skip=4.25)


def threshold(file: dict, tokens: int, target: float | None = None) -> float:
    """What ModelOpt 0.47 makes of a file for a prompt of so many tokens, by its documentation."""
    (group,) = file["sparse_attention_config"]["config_groups"].values()
    assert group["algorithm"] == "skip_softmax"
    scale = group["threshold_scale_factor"]
    assert scale["formula"] == "a * exp(b * target_sparsity)"
    assert scale.keys() == {"formula", "prefill"}  # a phase without numbers stays dense
    target = group["target_sparsity"]["prefill"] if target is None else target
    return scale["prefill"]["a"] * math.exp(scale["prefill"]["b"] * target) / tokens


@pytest.mark.parametrize("length", [4096, 131_072])
def test_its_threshold_at_the_length_is_the_plans_for_every_target(length):
    file = json.loads(export_plan(SKIPS, "modelopt", length)[0])
    for target in (None, 0.0, 0.9):
        assert threshold(file, length, target) == pytest.approx(math.exp(-4.25))
    assert threshold(file, 2 * length) == pytest.approx(math.exp(-4.25) / 2)


@pytest.mark.parametrize("skip", [0.01, 1, 4.25, 11.0, 300.0])
def test_what_is_exported_comes_back_by_import(tmp_path, skip):
    plan = replace(SKIPS, skip=skip)
    file = tmp_path / "config.json"
    file.write_text(export_plan(plan, "modelopt", 32_768)[0])
    again, _ = import_plan("modelopt", file, config(), length=32_768)
    assert again.skip == pytest.approx(skip, abs=1e-6)
    assert replace(again, skip=float(skip), made={}) == plan
    longer, _ = import_plan("modelopt", file, config(), length=65_536)
    assert longer.skip == pytest.approx(skip + math.log(2), abs=1e-6)


def test_what_gets_lost_is_told():
    _, few = export_plan(SKIPS, "modelopt", 1000)
    assert note(few, "e^-4.25 at 1000 tokens").endswith("up to 14 tokens nothing")
    assert note(few, "target_sparsity sets nothing")
    assert len(few) == 2
    layers = (Layer(("s", "s", "full", "full"), ("s", "full"), ("ring", "full")), *SKIPS.layers[1:])
    plan = replace(SKIPS, patterns={"s": Streaming(4, 64)}, layers=layers, below=Below(512, 0, 9))
    _, notes = export_plan(plan, "modelopt", 1000)
    assert note(notes, "follow a pattern in prompts").startswith("left out: 2 of 8 q heads")
    assert note(notes, "drop keys").startswith("left out: 1 of 4 kv heads")
    assert note(notes, "read less in decode").startswith("left out: 1 of 4 kv heads")
    assert note(notes, "below 512 tokens the plan skips nothing")
    assert len(notes) == 6


@pytest.mark.parametrize(
    ("plan", "form", "length", "message"),
    [
        (replace(SKIPS, skip=None), "modelopt", 4096, "the plan has no skip, and modelopt can say"),
        (SKIPS, "modelopt", None, "falls with a prompt's length, and skip is one number: give"),
        (SKIPS, "modelopt", 0, "length is 0: give 1 token or more"),
        (replace(SKIPS, skip=1e4), "modelopt", 4096, "skip is 10000: e^-skip is 0 in modelopt's"),
        (SKIPS, "modelop", 4096, r"unknown form 'modelop': did you mean modelopt\?"),
    ],
    ids=["no skip", "no length", "length 0", "never", "form"],
)
def test_what_the_form_cannot_say_is_refused(plan, form, length, message):
    with pytest.raises(UsageError, match=message.replace("^", r"\^")):
        export_plan(plan, form, length)


# ---- the command


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_writes_the_file_and_says_what_is_lost_on_stderr(tmp_path):
    file, out = tmp_path / "plan.yaml", tmp_path / "sparse.json"
    SKIPS.save(file)
    words = ["export", file, "--to", "modelopt", "--length", 32_768, "-o", out]
    result = run(*words)
    text, notes = export_plan(SKIPS, "modelopt", 32_768)
    assert (result.exit_code, result.stdout) == (0, f"wrote {out}\n")
    assert result.stderr == "".join(f"note: {each}\n" for each in notes)
    assert out.read_text() == text
    again = run(*words)
    assert again.exit_code == 1
    assert again.stderr == f"error: {out} exists: give another name, or remove it\n"
    assert out.read_text() == text


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path):
    file = tmp_path / "plan.yaml"
    replace(SKIPS, skip=None).save(file)
    result = run("export", file, "--to", "modelopt", "--length", 4096, "-o", tmp_path / "x.json")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the plan has no skip")
    assert list(tmp_path.iterdir()) == [file]
