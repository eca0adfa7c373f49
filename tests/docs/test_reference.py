"""The tables of reference pages hold what the code takes: every name, parameter and default."""

import inspect
import re
import runpy
from dataclasses import fields

import pytest
import torch

import hfsparse
from hfsparse.evictions import EVICTIONS
from hfsparse.lists import PAGE
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.plan.extend import DualChunk
from hfsparse.plan.kept import KEPT
from hfsparse.profiler.methods import METHODS
from hfsparse.recipe import names
from hfsparse.selectors import SELECTORS
from tests.docs.pages import DOCS, code, rows, text
from tests.patterns.matrix import SELECTOR_ROWS

PLANS, PROFILING, RUNNING = (DOCS / f"{name}.md" for name in ("plans", "profiling", "running"))


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("Prefill patterns", PATTERNS),
        ("Decode selectors", SELECTORS),
        ("Cache evictions", EVICTIONS),
        ("Cache in fewer bits", KEPT),
    ],
)
def test_every_kind_stands_in_its_table_with_each_parameter_and_its_default(heading, known):
    listed, kind = {}, None
    for first, parameter, default, meaning in rows(PLANS, heading):
        kind = code(first)[0] if first else kind
        assert meaning
        listed.setdefault(kind, {})
        if parameter:
            listed[kind][code(parameter)[0]] = default
    wanted = {
        k: {f.name: str(f.default) for f in fields(cls) if f.compare} for k, cls in known.items()
    }
    assert listed == wanted


def test_methods_say_what_share_of_keys_and_values_the_index_of_a_selector_is():
    """Numbers in percent of a row's last cell, of these settings in their order."""
    channels, told = 128, {}
    keys = torch.zeros(1, 1, 1, PAGE, channels, dtype=torch.bfloat16, device="meta")
    settings = {"quest": [{}, {"unit": 16}, {"unit": 8}], "reuse": []}
    for first, *_, index in rows(DOCS / "methods.md", "Decode"):
        (kind,) = code(first)
        told[kind] = re.findall(r"([\d.]+) %", index), []
        for given in settings.get(kind, [{}]):
            table = SELECTOR_ROWS[kind].table
            bound = SELECTORS[kind](**given).bind(0, [0], table and table(1, 1, channels))
            kept = bound.summarise(keys, keys[..., :1] == 0).values()
            told[kind][1].append(f"{100 * sum(t.nbytes for t in kept) / (2 * keys.nbytes):.1f}")
    assert told.keys() == SELECTORS.keys()
    for numbers, counted in told.values():
        assert numbers == counted


def test_every_key_of_a_plan_stands_in_its_table():
    def keys(heading: str) -> set[str]:
        return {code(row[0])[0] for row in rows(PLANS, heading)}

    assert keys("Keys") == {"hfsparse", *(each.name for each in fields(Plan) if each.init)}
    model = {each.name for each in fields(ModelId)} - {"class_name"} | {"class"}
    assert keys("model") == model
    assert keys("extend") == {each.name for each in fields(DualChunk)}
    assert keys("below") == {each.name for each in fields(Below)}
    assert keys("layers") == {each.name for each in fields(Layer)}


def shown(default) -> str:
    """A default as the tables say it."""
    words = {None: "none", True: "on", False: "off", (): "none"}
    return words[default] if default in words and type(default) is not int else str(default)


def test_every_setting_of_profile_stands_in_its_table_with_its_default_and_flag():
    takes = inspect.signature(hfsparse.profile).parameters
    wanted = {n: p.default for n, p in takes.items() if n not in ("model", "tokenizer")}
    listed = {code(name)[0]: (flag, default) for name, flag, default, _ in table()}
    assert listed.keys() == wanted.keys()
    flags = text(DOCS / "cli.md").split("\n## ")[1]
    for name, (flag, default) in listed.items():
        assert default.strip("`") == shown(wanted[name]) or name == "lengths"
        assert all(f"{each}`" in flags or f"{each} " in flags for each in code(flag)), name


def table() -> list[list[str]]:
    return rows(PROFILING, "Every setting")


def test_every_option_of_patch_stands_in_its_table_with_its_default():
    takes = inspect.signature(hfsparse.patch).parameters
    listed = {code(name)[0]: default for name, default, _ in rows(RUNNING, "Options of `patch`")}
    assert listed == {n: shown(p.default) for n, p in takes.items() if n != "model"}


def test_every_method_and_recipe_stands_in_its_table():
    methods = [name for row in rows(PROFILING, "Methods") for name in code(row[0])]
    recipes = [name for row in rows(PROFILING, "Recipes") for name in code(row[0])]
    assert sorted(methods) == sorted(METHODS)
    assert sorted(recipes) == sorted(names())


def test_the_page_of_commands_says_what_the_commands_take():
    page = runpy.run_path(str(DOCS / "site" / "commands.py"))["page"]()
    assert text(DOCS / "cli.md") == page, "run: .venv/bin/python docs/site/commands.py"
