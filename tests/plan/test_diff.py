"""What changed between two plans: every difference has its line, and equal plans have none."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hfsparse.cli import app
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.plan.diff import differences, ranges
from hfsparse.plan.extend import DualChunk
from hfsparse.selectors.quest import Quest

FULL = Layer(("full",) * 6, ("full",) * 2, ("full",) * 2)
RING = Layer(("s",) * 3 + ("full",) * 3, ("s", "full"), ("ring", "full"))


def plan(**parts):
    """Four layers of 6 q heads and 2 kv heads."""
    model = ModelId("LlamaForCausalLM", 4, 6, 2, 64, "sha256:0")
    made = Plan(model, {"s": Streaming(64, 256)}, (FULL,) * 4)
    return replace(made, **parts)


def both_ways(old, new):
    """The lines from old to new; the other way there are as many."""
    old.validate()
    new.validate()
    lines = differences(old, new)
    assert len(differences(new, old)) == len(lines)
    return lines


def test_equal_plans_have_no_differences():
    assert differences(plan(), plan()) == []
    assert differences(plan(), plan(made={"seed": 1}, measured={"cpu": {}})) == []


def test_layers_that_changed_alike_are_one_line_a_phase():
    new = plan(layers=(FULL, RING, RING, FULL))
    assert both_ways(plan(), new) == [
        "prefill: 6 of 24 q heads changed",
        "cache: 2 of 8 kv heads changed",
        "decode: 2 of 8 kv heads changed",
        "layers 1-2 prefill: q heads 0-2: full -> s",
        "layers 1-2 cache: kv head 0: full -> s",
        "layers 1-2 decode: kv head 0: full -> ring",
    ]


def test_heads_are_apart_by_what_they_were_and_became():
    patterns = {"s": Streaming(64, 256), "b": BlockTopK()}
    one = replace(FULL, prefill=("s", "full", "full", "full", "b", "full"))
    two = replace(FULL, prefill=("b", "s", "s", "full", "b", "s"))
    old, new = (plan(patterns=patterns, layers=(each, *(FULL,) * 3)) for each in (one, two))
    assert both_ways(old, new) == [
        "prefill: 4 of 24 q heads changed",
        "layer 0 prefill: q head 0: s -> b",
        "layer 0 prefill: q heads 1-2, 5: full -> s",
    ]


def test_changed_numbers_of_a_pattern_are_said_once_and_not_for_each_head():
    old = plan(layers=(RING,) * 4)
    new = replace(old, patterns={"s": Streaming(64, 512, 0.25)})
    assert both_ways(old, new) == [
        "pattern s: recent 256 -> 512",
        "pattern s: recent_per_token 0.0 -> 0.25",
    ]


def test_a_number_that_plans_leave_out_is_said():
    old, new = (plan(patterns={"q": Quest(unit=unit)}) for unit in (64, 8))
    assert both_ways(old, new) == ["pattern q: unit 64 -> 8"]


def test_a_new_name_for_equal_numbers_is_no_change_of_heads():
    old = plan(layers=(RING,) * 4)
    ring = Layer(("t",) * 3 + ("full",) * 3, ("t", "full"), ("ring", "full"))
    new = plan(patterns={"t": Streaming(64, 256)}, layers=(ring,) * 4)
    numbers = "streaming sink 64, recent 256, recent_per_token 0.0, bits 16"
    assert both_ways(old, new) == [
        f"pattern s is only in the first: {numbers}",
        f"pattern t is only in the second: {numbers}",
    ]


def test_a_pattern_of_another_kind_shows_both():
    lines = both_ways(plan(), plan(patterns={"s": VerticalSlash(1000, 4096)}))
    assert lines[:2] == [
        "pattern s: kind streaming -> vertical_slash",
        "pattern s: sink 64 -> none",
    ]


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        ({"below": Below(prefill=6144)}, ["below: prefill 0 -> 6144"]),
        ({"skip": 8.0}, ["skip none -> 8.0"]),
        (
            {"extend": DualChunk(4096)},
            [
                "extend: kind none -> dca",
                "extend: trained none -> 4096",
                "extend: chunk none -> 3072",
                "extend: local none -> 512",
                "extend: mscale none -> 0.0",
            ],
        ),
        (
            {"expected": {4096: {"pair_density": 0.41}}},
            ["expected at 4096: pair_density none -> 0.41"],
        ),
        (
            {"model": ModelId("QwenForCausalLM", 4, 6, 2, 64, "sha256:1")},
            [
                "model: class LlamaForCausalLM -> QwenForCausalLM",
                "model: fingerprint sha256:0 -> sha256:1",
            ],
        ),
    ],
    ids=["below", "skip", "extend", "expected", "model"],
)
def test_each_part_has_its_lines(parts, lines):
    assert both_ways(plan(), plan(**parts)) == lines


def test_expected_figures_are_compared_by_length():
    old = plan(expected={1024: {"pair_density": 0.5, "recall": 0.9}, 8192: {"recall": 0.8}})
    new = plan(expected={1024: {"pair_density": 0.4, "recall": 0.9}, 4096: {"recall": 0.7}})
    assert both_ways(old, new) == [
        "expected at 1024: pair_density 0.5 -> 0.4",
        "expected at 4096: recall none -> 0.7",
        "expected at 8192: recall 0.8 -> none",
    ]


def test_heads_of_models_of_other_shapes_are_not_compared():
    other = Plan.full(ModelId("LlamaForCausalLM", 3, 6, 2, 64, "sha256:2"))
    lines = both_ways(plan(), other)
    assert "model: layers 4 -> 3" in lines
    assert lines[-1] == "layers: the shapes of the models differ, so heads can't be compared"


@pytest.mark.parametrize(
    "parts",
    [
        {"patterns": {}},
        {"patterns": {"s": Streaming(65, 256)}},
        {"patterns": {"s": Streaming(64, 256), "t": Streaming()}},
        {"patterns": {"s": Streaming(64, 256, 1e-9)}},
        {"layers": (FULL, FULL, FULL, RING)},
        {"below": Below(0, 0, 1)},
        {"skip": 1e-9},
        {"model": ModelId("LlamaForCausalLM", 4, 6, 2, 128, "sha256:0")},
    ],
    ids=str,
)
def test_plans_of_other_hashes_always_have_a_difference(parts):
    new = plan(**parts)
    assert new.hash() != plan().hash()
    for line in both_ways(plan(), new):
        before, _, after = line.partition(" -> ")
        assert not after or before.split()[-1] != after


def test_ranges_join_neighbours():
    assert ranges([]) == ""
    assert ranges([3]) == "3"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


# ---- the command


def run(*words):
    return CliRunner().invoke(app, ["diff", *map(str, words)])


def test_the_command_prints_hashes_and_lines_and_exits_with_1(tmp_path):
    old, new = plan(), plan(layers=(RING,) * 4, skip=8.0)
    old.save(tmp_path / "a.yaml")
    new.save(tmp_path / "b.yaml")
    result = run(tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        f"{old.hash()[:19]}  {tmp_path / 'a.yaml'}",
        f"{new.hash()[:19]}  {tmp_path / 'b.yaml'}",
        *differences(old, new),
    ]
    assert "layers 0-3 cache: kv head 0: full -> s" in result.stdout


def test_the_command_says_equal_and_exits_with_0(tmp_path):
    plan().save(tmp_path / "a.yaml")
    plan(made={"seed": 3}).save(tmp_path / "b.yaml")
    result = run(tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert (result.exit_code, result.stdout.splitlines()[2:]) == (0, ["equal"])


def test_the_command_refuses_what_is_no_plan_in_one_line(tmp_path):
    plan().save(tmp_path / "a.yaml")
    result = run(tmp_path / "a.yaml", tmp_path / "absent.yaml")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "absent.yaml" in result.stderr
