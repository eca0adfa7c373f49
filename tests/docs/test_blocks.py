"""What stands as code in a page is what it says: plans and recipes load, commands have options."""

import re
import shlex

import pytest
import yaml
from typer.main import get_command

from hfsparse import recipe
from hfsparse.plan import Plan
from tests.docs.pages import FENCE, PAGES, Block, blocks, prose, text

COMMAND = re.compile(r"(?:^|-m )hfsparse (.+)")
SHELL = ("sh", "bash")


def command(words: list[str]):
    """The command that `hfsparse WORDS` runs, and the words behind its name."""
    from hfsparse.cli import app
    from hfsparse_eval.cli import app as tasks

    app, words = (tasks, words[1:]) if words[0] == "eval" else (app, words)
    return get_command(app).commands[words[0]], words[1:]


def commands(block: Block) -> list[str]:
    found = [COMMAND.search(line.strip()) for line in block.text.splitlines()]
    return [each[1] for each in found if each]


@pytest.mark.parametrize("block", blocks(*SHELL), ids=str)
def test_every_command_in_a_block_can_be_parsed(block):
    for line in commands(block):
        asked, words = command(shlex.split(line, comments=True))
        asked.make_context(asked.name, words)  # exits where words are unknown or missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_a_command_in_the_text_is_there(page):
    said = re.sub(r"^\| `[^`]*`", "", prose(page), flags=re.MULTILINE)  # messages, in their tables
    for words in re.findall(r"`hfsparse ([^`]+)`", said):
        if words.startswith("--"):
            continue
        first, *rest = shlex.split(words)
        if first == "eval" and (not rest or rest[0].startswith("-")):
            continue
        asked, rest = command([first, *rest])
        options = {flag for each in asked.params for flag in (*each.opts, *each.secondary_opts)}
        used = {word.split("=")[0] for word in rest if word.startswith("-")}
        assert used <= options | {"--help"}, f"{page.name}: hfsparse {words}"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_yaml_block_is_a_plan_its_patterns_or_a_recipe(block):
    raw = yaml.safe_load(block.text)
    if "hfsparse" in raw:
        Plan.loads(block.text).validate()
    elif "method" in raw:
        assert recipe.parse(block.text, block.page.name)["method"] == raw["method"]
    else:
        lines = "".join(f"  {line}\n" for line in block.text.splitlines())
        model = "{class: X, layers: 1, q_heads: 1, kv_heads: 1, head_dim: 1, fingerprint: x}"
        layers = "layers:\n  0: {prefill: full, cache: full, decode: full}\n"
        plan = Plan.loads(f"hfsparse: 1\nmodel: {model}\npatterns:\n{lines}{layers}")
        assert plan.patterns.keys() == raw.keys()


@pytest.mark.parametrize("block", blocks("python", "py"), ids=str)
def test_every_python_block_compiles(block):
    compile(block.text, str(block), "exec")


def test_no_block_hides_behind_an_unknown_language():
    known = {*SHELL, "yaml", "python", "py", "text", "json"}

    for page in PAGES:
        assert {found[1] for found in FENCE.finditer(text(page))} <= known, page.name
