"""Tables beside a plan: found there, checked, part of its hash by content, saved with it."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import hfsparse
from hfsparse.patcher.state import is_patched
from hfsparse.plan import Layer, ModelId, Plan, PlanError
from hfsparse.plan.diff import differences
from hfsparse.plan.files import DataFile
from hfsparse.selectors.channels import Channels
from hfsparse.selectors.quest import Quest
from tests.patterns.matrix import weights

TEXT = """\
hfsparse: 2
model: {class: Llama, layers: 1, q_heads: 4, kv_heads: 2, head_dim: 8, fingerprint: 'sha256:00'}
patterns:
  few: {kind: channels, share: 0.1, min_pages: 3, channels: 2, data: labels}
data: {labels: {file: plan.labels.safetensors, sha256: SHA}}
layers:
  0: {prefill: full*4, cache: full*2, decode: few*2}
"""
# The hash of `old` below, before plans had tables.
BEFORE = "sha256:3c07627e48d007e948d99c5d5b5b4a294a0e5a1403f062f5a1d212735bdb7d79"


@pytest.fixture
def beside(tmp_path):
    """The folder of a plan and its table."""
    file = tmp_path / "plan.labels.safetensors"
    save_file(weights(1, 2, 8), file)
    text = TEXT.replace("SHA", hashlib.sha256(file.read_bytes()).hexdigest())
    (tmp_path / "plan.yaml").write_text(text)
    return tmp_path


def swapped(folder, old: str, new: str):
    path = folder / "plan.yaml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return path


def refused(path) -> str:
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    return str(caught.value)


def test_a_table_is_found_beside_the_plan_and_bound(beside):
    plan = Plan.load(beside / "plan.yaml")
    table = plan.table_of(plan.patterns["few"])
    assert torch.equal(table["weight"], weights(1, 2, 8)["weight"])
    assert plan.table_of(Quest()) is None
    bound = plan.patterns["few"].bind(0, (1,), table)
    best = table["weight"][0, 1].topk(2).indices.sort().values
    assert torch.equal(bound.kept.tensor[0], torch.eye(8)[:, best])


def test_text_and_file_say_the_same_plan(beside):
    plan = Plan.load(beside / "plan.yaml")
    assert Plan.loads(plan.dumps()) == plan
    assert plan.dumps() == Plan.loads(plan.dumps()).dumps()
    assert plan.dumps().startswith("hfsparse: 2\n")
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan
        assert other.table_of(other.patterns["few"]).keys() == {"weight"}


def test_a_plan_without_tables_is_of_version_1_and_keeps_its_hash(beside):
    old = Plan(ModelId("Llama", 1, 4, 2, 8, "sha256:00"), {"few": Quest(0.1, 3)}, ())
    old.layers = (Layer(("full",) * 4, ("full",) * 2, ("few",) * 2),)
    assert old.dumps().startswith("hfsparse: 1\n")
    assert old.hash() == BEFORE
    assert Plan.loads(old.dumps().replace("hfsparse: 1", "hfsparse: 2")) == old


def test_the_content_is_part_of_the_hash_and_the_files_name_is_not(beside):
    plan = Plan.load(beside / "plan.yaml")
    table = {"weight": weights(1, 2, 8)["weight"] * 2}
    other = replace(plan, data={"labels": DataFile.of("plan.labels.safetensors", table)})
    renamed = replace(plan, data={"labels": replace(plan.data["labels"], file="x.safetensors")})
    assert len({plan.hash(), other.hash()}) == 2
    assert renamed.hash() == plan.hash()
    (line,) = differences(plan, other)
    assert line.startswith("data: labels sha256:")
    assert differences(plan, renamed) == []


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("hfsparse: 2", "hfsparse: 1", 1, "data needs plan version 2: write hfsparse: 2"),
        ("hfsparse: 2", "hfsparse: 3", 1, "this one reads versions 1 to 2"),
        ("data: labels}", "data: label}", 4, "'label', which is not under data: did you mean lab"),
        (", data: labels}", "}", 4, "'channels', which is not under data"),
        ("data: labels}", "data: 7}", 4, "patterns.few.data is 7: give text"),
        ("file: plan", "file: ../plan", 5, "without folders"),
        ("file: plan", "file: /tmp/plan", 5, "without folders"),
        ("file: plan.labels.safetensors", "file: plan.bin", 5, "a .safetensors file"),
        ("file: plan.labels.safetensors, ", "", 5, "data.labels.file is missing"),
        ("file: plan", "file: another", 5, "another.labels.safetensors is not beside the plan"),
        ("sha256: ", "sha256: ab", 5, "64 hex digits"),
        ("sha256: ", "sha265: ", 5, "did you mean sha256?"),
        ("data: {labels: {", "data: {7: {", 5, "data name 7"),
        ("data: {labels: ", "data: {labels: 3, more: ", 5, "data.labels is 3"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_with_its_line(beside, old, new, line, says):
    told = refused(swapped(beside, old, new))
    assert f"line {line}: " in told
    assert says in told


def test_numbers_that_are_right_together_are_read_and_wrong_ones_told():
    """A default is no measure of another parameter: shift is under the stride that is given."""
    head, kind = TEXT.split("patterns:")[0].replace(": 2\n", ": 1\n"), "kind: strided"
    tail = "\nlayers:\n  0: {prefill: full*4, cache: full*2, decode: full*2}\n"
    text = f"{head}patterns:\n  it: {{{kind}, stride: 16, shift: 10}}{tail}"
    assert Plan.loads(text).patterns["it"].shift == 10
    with pytest.raises(PlanError, match=r"line 4: patterns.it: bits times tables is 9"):
        Plan.loads(text.replace(f"{kind}, stride: 16, shift: 10", "kind: lsh, bits: 3, tables: 3"))


def test_tables_that_are_no_mapping_are_refused(beside):
    path = beside / "plan.yaml"
    rows = path.read_text().splitlines()
    rows[4] = "data: [1]"
    path.write_text("\n".join(rows))
    assert "line 5: data is a list: give a mapping" in refused(path)


def test_a_missing_or_changed_file_is_one_error(beside):
    file = beside / "plan.labels.safetensors"
    save_file({"weight": torch.zeros(1, 2, 8)}, file)
    assert "line 5: data.labels: plan.labels.safetensors has sha256" in refused(
        beside / "plan.yaml"
    )
    file.unlink()
    told = refused(beside / "plan.yaml")
    assert "line 5: data.labels: plan.labels.safetensors is not beside the plan" in told
    assert "\n" not in told


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_regular_file_is_refused_and_not_read(beside, kind):
    """Reading a pipe would wait for whoever writes, a device may have no end."""
    file = beside / "plan.labels.safetensors"
    plan = Plan.load(beside / "plan.yaml")
    file.unlink()
    make = {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file)}
    make.get(kind, lambda: file.symlink_to("/dev/zero"))()
    told = refused(beside / "plan.yaml")
    assert "line 5: data.labels: can't read plan.labels.safetensors: it is a folder, a pip" in told
    assert "\n" not in told
    plan.save(beside / "plan.yaml")  # under another name
    assert Plan.load(beside / "plan.yaml").hash() == plan.hash()


def test_what_is_no_safetensors_file_is_said(beside):
    file, path = beside / "plan.labels.safetensors", beside / "plan.yaml"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(b"not a table")
    swapped(beside, before, hashlib.sha256(b"not a table").hexdigest())
    assert "is not a safetensors file" in refused(path)


def test_a_plan_saved_elsewhere_takes_its_tables_along(beside, tmp_path_factory):
    plan, there = Plan.load(beside / "plan.yaml"), tmp_path_factory.mktemp("there")
    plan.save(there / "copy.yaml")
    assert sorted(os.listdir(there)) == ["copy.yaml", "plan.labels.safetensors"]
    again = Plan.load(there / "copy.yaml")
    assert (again, again.hash()) == (plan, plan.hash())
    again.save(there / "copy.yaml")  # over itself, as `bench --write` does
    assert sorted(os.listdir(there)) == ["copy.yaml", "plan.labels.safetensors"]


def test_no_other_plans_table_is_overwritten(beside):
    plan = Plan.load(beside / "plan.yaml")
    table = {"weight": weights(1, 2, 8)["weight"] * 2}
    other = replace(plan, data={"labels": DataFile.of("plan.labels.safetensors", table)})
    for _ in range(2):
        other.save(beside / "other.yaml")
        assert Plan.load(beside / "plan.yaml") == plan
        kept = Plan.load(beside / "other.yaml")
        assert kept.hash() == other.hash()
        assert torch.equal(kept.table_of(kept.patterns["few"])["weight"], table["weight"])
    name = f"plan.labels-{other.data['labels'].sha256[:12]}.safetensors"
    files = ["other.yaml", name, "plan.labels.safetensors", "plan.yaml"]
    assert sorted(os.listdir(beside)) == files
    assert torch.equal(load_file(beside / name)["weight"], table["weight"])


def test_a_plan_from_text_is_saved_where_its_tables_are_and_nowhere_else(beside, tmp_path_factory):
    plan = Plan.loads((beside / "plan.yaml").read_text())
    plan.save(beside / "again.yaml")
    assert Plan.load(beside / "again.yaml") == plan
    there = tmp_path_factory.mktemp("there")
    with pytest.raises(PlanError, match=r"plan.labels.safetensors is not beside the plan"):
        plan.save(there / "copy.yaml")
    assert os.listdir(there) == []


def test_a_save_that_fails_leaves_the_old_plan_whole(beside):
    plan = Plan.load(beside / "plan.yaml")
    before = (beside / "plan.yaml").read_bytes()
    broken = replace(plan, patterns={"few": Channels(data="nothing")})
    with pytest.raises(PlanError, match="'nothing', which is not under data"):
        broken.save(beside / "plan.yaml")
    assert (beside / "plan.yaml").read_bytes() == before
    assert sorted(os.listdir(beside)) == ["plan.labels.safetensors", "plan.yaml"]


def test_a_link_to_a_plan_finds_its_tables(beside, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "plan.yaml"
    link.symlink_to(beside / "plan.yaml")
    assert Plan.load(link) == Plan.load(beside / "plan.yaml")


def test_a_model_is_left_alone_by_a_plan_whose_table_is_unknown_or_does_not_fit(beside):
    from tests.tiny import llama

    model = llama()
    this, full = ModelId.of(model), ("full",) * 2
    layers = (Layer(("full",) * 4, full, ("few",) * 2),) * 2
    good = weights(2, 2, 16)
    for table, says in (
        (weights(1, 2, 16), "data.channels: weight has shape .*2 layers of 2 kv"),
        (weights(2, 1, 16), r"weight has shape \[2, 1, 16\], the model has 2 lay"),
        (weights(2, 4, 16), r"weight has shape \[2, 4, 16\].* --selector channels makes"),
        ({**good, "bias": torch.zeros(2)}, r"data.channels: bias has shape \[2\]"),
        ({"other": torch.zeros(2, 2)}, "layer 0: channels needs a table with weight"),
        (
            {"weight": good["weight"][..., 0]},
            r"weight of shape \[2, 2\], not \[layers, kv heads, D\]",
        ),
        ({"weight": good["weight"].log() / 0}, "weight that is not finite in layer 0"),
        (weights(2, 2, 32), "layer 0: channels has a table that is not of keys of 16 channels"),
    ):
        data = {"channels": DataFile.of("it.safetensors", table)}
        plan = Plan(this, {"few": Channels(0.1, 3)}, layers, data=data)
        with pytest.raises(PlanError, match=says):
            hfsparse.patch(model, plan)
        assert not is_patched(model)
        if "has shape" in says:
            with pytest.raises(PlanError, match=says):
                plan.check(model)
    plan.data = {"channels": replace(DataFile.of("it.safetensors", good), content=None)}
    with pytest.raises(PlanError, match=r"data.channels: it.safetensors was not read: .*Plan.load"):
        hfsparse.patch(model, plan)
    plan.data = {"channels": DataFile.of("it.safetensors", good)}
    hfsparse.patch(model, plan).undo()
