"""Recipes: each can be used as it stands, and says what it is for; flags go before them."""

import pytest
from typer.testing import CliRunner

import hfsparse
from hfsparse import recipe
from hfsparse.cli import app
from hfsparse.errors import UsageError
from hfsparse.plan import ModelId, Plan
from hfsparse.profiler import run as profiling
from hfsparse.profiler.job import Found
from tests import tiny

NAMES = "balanced duo fast-prefill minference moa safe small-cache streaming-llm"


def test_every_recipe_has_afirst_line_and_settings_that_profile_takes(monkeypatch):
    asked = []

    class Method:
        one_pass = True

        def plan(job):
            asked.append(job)
            return Found(Plan.full(ModelId.of(job.model)))

    monkeypatch.setattr(profiling, "METHODS", dict.fromkeys(profiling.METHODS, Method))
    monkeypatch.setattr(profiling, "make_prompts", lambda tokenizer, *given: [])
    model = tiny.llama(window=8192)
    for name, line in recipe.names().items():
        assert 20 < len(line) < 90
        settings = recipe.load(name) | {"verify": False}
        plan = hfsparse.profile(model, tiny.tokenizer(), **settings)
        assert plan.made["recipe"] == name
        assert plan.made["method"] == settings["method"]
        assert tuple(asked[-1].prompts) == settings["lengths"]
    assert " ".join(recipe.names()) == NAMES
    listed = CliRunner().invoke(app, ["recipes"]).stdout
    assert all(f"\n{name} " in f"\n{listed}" for name in NAMES.split())


def test_a_flag_goes_before_the_recipe_and_the_command_tells_which(tmp_path, monkeypatch):
    given = {}

    def measure(loaded, tokenizer, **options):
        given.update(options)
        return Plan.full(ModelId.of(loaded))

    monkeypatch.setattr("hfsparse.profiler.profile", measure)
    own = tmp_path / "own.yaml"
    own.write_text("# Mine.\nmethod: minference\nlengths: [256]\nverify: false\ncache_share: 0.5\n")
    model, out = tiny.save(tmp_path / "model"), tmp_path / "plan.yaml"
    words = ["profile", model, "-o", out, "--recipe", own, "--cache-share", 0.25, "--samples", 4]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert given["recipe"] == "own"
    assert (given["method"], given["lengths"], given["verify"]) == ("minference", (256,), False)
    assert (given["cache_share"], given["samples"], given["drop"]) == (0.25, 4, 0.01)
    assert result.stdout.startswith(
        "recipe own: method minference (recipe), lengths 256 (recipe), verify off (recipe), "
        "cache share 0.25 (flag, not 0.5), samples 4 (flag)\n"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("methud: duo", "line 1: unknown setting 'methud': did you mean method?"),
        ("\ncache_share: big", "line 2: cache_share is 'big': give a number"),
        ("samples: true", "samples is True: give a whole number"),
        ("lengths: []", "lengths is a list: give whole numbers"),
        ("lengths: [1024, 2k]", "lengths is a list: give whole numbers"),
        ("drop: 0.1\ndrop: 0.2", "line 2: drop is given twice: keep one"),
        ("out: plan.yaml", "unknown setting 'out'"),
        ("- method", "line 1: give settings such as method: balanced"),
        ("", "line 1: give settings such as method: balanced"),
        ("method: [", ": not YAML: "),
    ],
)
def test_a_recipe_that_says_what_profile_does_not_take_is_refused(text, says):
    with pytest.raises(UsageError, match=r"the recipe own\.yaml, line \d") as error:
        recipe.parse(text, "own.yaml")
    assert says in str(error.value)


def test_shares_are_read_as_people_write_them():
    page = recipe.parse("cache_share: 3e-1\nloss: 5e-2\nseed: 0o17\n", "own.yaml")
    assert page == {"cache_share": 0.3, "loss": 0.05, "seed": 15}


def test_unknown_names_and_absent_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no recipe balance: did you mean balanced\?"):
        recipe.load("balance")
    with pytest.raises(UsageError, match=r"can't read the recipe .*absent\.yaml"):
        recipe.load(str(tmp_path / "absent.yaml"))


def test_streaming_llm_takes_the_widest_window_that_every_budget_allows():
    settings = dict(lengths=(512,), samples=1, method="streaming-llm", verify=False)
    model = tiny.llama(window=1024)
    for budget in ("prefill_density", "cache_share", "decode_share"):
        budgets = dict(prefill_density=1, cache_share=1, decode_share=1) | {budget: 0.3}
        plan = hfsparse.profile(model, tiny.tokenizer(), **settings, **budgets)
        plan.check(model)
        assert plan.patterns["stream"].sink == 4
        assert {word for layer in plan.layers for word in layer.cache} == {"stream"}
        (found,) = plan.expected.values()
        name = budget.replace("prefill", "pair")
        assert 0.3 - 2 / 512 < found[name] <= 0.3
    with pytest.raises(UsageError, match="no window fits the budgets at 512 tokens"):
        hfsparse.profile(model, tiny.tokenizer(), **settings, cache_share=0.05)
