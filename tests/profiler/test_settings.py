"""Settings: keywords, options, recipe keys and identity are read off the fields, and agree."""

from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import get_type_hints

import pytest
import typer
from typer.testing import CliRunner

import hfsparse
from hfsparse import recipe
from hfsparse.cli import app
from hfsparse.cli.profile import with_options
from hfsparse.errors import UsageError
from hfsparse.profiler.settings import Settings, setting, with_keywords, within

EVEN = within(lambda value: value % 2 == 0, "stride is {}: give an even number")


@dataclass(frozen=True, kw_only=True)
class More(Settings):
    """One edit: another setting, of everything that a setting can be."""

    stride: int = setting(2, "Tokens between.", check=EVEN, identity=True, made=True, min=1)


def test_a_new_field_is_a_keyword_an_option_and_a_key_of_recipes_with_one_check(monkeypatch):
    @with_keywords(More)
    def profile(model, tokenizer, settings):
        return settings

    assert signature(profile).parameters["stride"].default == 2
    assert profile("model", None, stride=4, seed=1) == More(stride=4, seed=1)

    command, taken = typer.Typer(), []
    command.command()(with_options(More)(lambda **given: taken.append(More(**given))))
    shown = CliRunner().invoke(command, ["--help"], env={"COLUMNS": "200"}).output
    (line,) = (line for line in shown.splitlines() if "--stride" in line)
    assert "x>=1" in line
    assert "Tokens between. [default: 2]" in line
    asked = CliRunner().invoke(command, ["--stride", "6", "--lengths", "8,4"])
    assert asked.exit_code == 0, asked.output
    assert taken == [More(stride=6, lengths=(8, 4))]

    monkeypatch.setattr(recipe, "Settings", More)
    assert recipe.parse("stride: 4", "own.yaml") == {"stride": 4}
    with pytest.raises(UsageError, match="stride is 'x': give a whole number"):
        recipe.parse("stride: x", "own.yaml")

    for wrong in (lambda: profile("model", None, stride=3), lambda: More(stride=3)):
        with pytest.raises(UsageError, match="stride is 3: give an even number"):
            wrong()


def test_a_new_setting_at_its_default_ends_no_run_that_was_begun_without_it():
    assert More(seed=3).identity == Settings(seed=3).identity == {"method": "balanced"}
    assert More(stride=4).identity == {"method": "balanced", "stride": 4}
    both = Settings(method="duo", prefill_method="moa")
    assert both.identity == {"method": "moa and duo"}


def test_what_a_plan_says_of_its_making_has_what_was_given():
    first = {"samples": 6, "seed": 3, "method": "balanced"}
    assert first.items() <= Settings(seed=3).provenance.items()
    assert [*Settings().provenance][:3] == ["samples", "seed", "method"]
    assert More(recipe="own").provenance == Settings().provenance | {"stride": 2, "recipe": "own"}


def test_profile_the_command_and_recipes_take_the_same_settings():
    names = {each.name: each.default for each in fields(Settings)}
    (_, _, *keywords) = signature(hfsparse.profile).parameters.values()
    assert {each.name: each.default for each in keywords} == names
    command = typer.main.get_command(app).commands["profile"]
    options = {each.name: each for each in command.params}
    for name in set(names) - {"out", "recipe", "progress"}:
        assert options[name].default == names[name]
    assert options.keys() - names.keys() == {"model", "output", "device", "dtype"}
    of_a_call = {"out", "data", "curves", "recipe", "progress"}
    assert set(Settings.names("recipe")) == names.keys() - of_a_call
    types = get_type_hints(Settings)
    assert all(types[name] in recipe.KINDS for name in Settings.names("recipe"))


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'lenghts'"):
        hfsparse.profile(None, None, lenghts=(8,))
    with pytest.raises(TypeError, match="tokenizer"):
        hfsparse.profile(None)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(method="magic", loss=0.1), "no method magic: there is balanced, minference"),
        (dict(prefill_method="magic"), "no method magic: there is balanced"),
        (dict(verify_samples=0), "verify_samples is 0: give 1 or more, or no verification"),
        (dict(loss=2.0), "loss is 2.0: give 0 to 1, a share of what rings alone would lose"),
        (
            dict(loss=0.1, method="duo", prefill_method="moa"),
            "moa with duo knows no loss to keep within 0.1: leave it out, or use balanced, "
            "minference, minference-error alone",
        ),
        (dict(proxy="magic", method="duo"), "no proxy magic: there is copy, mass, error"),
        (
            dict(selector="quest", decode_share=1.0),
            "selector quest saves nothing where decode_share is 1, no limit: give a smaller",
        ),
        (dict(cache_gib=0), "cache_gib is 0: give more than 0, in GiB"),
        (
            dict(cache_gib=2, cache_share=0.5),
            "cache_gib is 2 and cache_share 0.5, both of the cache: give one of the two",
        ),
        (dict(cache_gib=2, method="moa"), "cache_gib 2 is of one length, moa keeps its budgets at"),
        (dict(bits=(8, 4)), "bits are 8,4: give 16, to which heads return that lose too much, and"),
        (dict(bits=(16, 3)), "bits are 16,3: give 16"),
        (dict(bits=(16, 4), method="duo"), "bits 16,4 are offered by balanced, not by duo: leave"),
        (dict(at=4096), "at is 4096, where cache_gib counts, and there is none: give that, too"),
        (dict(curves="a.png", method="moa"), "moa draws no curves: leave them out, or use "),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_at_once(wrong, sentence):
    with pytest.raises(UsageError) as refused:
        Settings(**wrong)
    assert str(refused.value).startswith(sentence)
    with pytest.raises(UsageError, match=sentence[:20]):
        replace(Settings(), **wrong)
