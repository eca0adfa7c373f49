"""README and quickstart do what they say: their commands and snippets are run as printed, in order.

The model is a tiny one with SmolLM2's tokenizer, under the name that the page gives. Where sizes
would take minutes, SMALLER appends smaller ones to a command; a snippet's `profile` gets them, too.
"""

import functools
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import hfsparse
from hfsparse.cli import app
from tests import tiny
from tests.docs.pages import DOCS, README, ROOT, blocks

SMALLER = {
    "profile": "--lengths 512 --samples 1 --verify-samples 1",
    "eval": "--lengths 1024 --samples 1 --max-new-tokens 4",
}
NOT_RUN = r"pip install .*|python -m hfsparse_eval\.smollm2 smollm2"  # the environment is there


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2):
    """Where a reader would stand: a model under both pages' names, and a prompt."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tiny.llama(window=8192, vocab_size=len(tokenizer)).save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")
    shutil.copytree(folder / "MODEL", folder / "smollm2")
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "prompt.txt").write_text("What is at the end of a long text?\n")
    return folder


def run(line: str) -> None:
    """Run a line of a shell block, in this process where the command is ours."""
    words = shlex.split(line, comments=True)
    if words[0] != "hfsparse":
        subprocess.run(line, shell=True, check=True)
        return
    done = CliRunner().invoke(app, [*words[1:], *shlex.split(SMALLER.get(words[1], ""))])
    assert done.exit_code == 0, f"{line}\n{done.output}"


def is_run(line: str) -> bool:
    command = line.split("#")[0].strip()
    return bool(command) and not re.fullmatch(NOT_RUN, command)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:plan .* was verified by nothing")  # random weights
@pytest.mark.parametrize("page", [README, DOCS / "quickstart.md"], ids=lambda page: page.name)
def test_a_reader_who_types_the_page_gets_what_it_promises(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    small = functools.partial(hfsparse.profile, lengths=(512,), samples=1, verify_samples=1)
    monkeypatch.setattr(hfsparse, "profile", small, raising=False)
    for block in blocks("sh", "python", pages=[page]):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
            assert "pair density" in capsys.readouterr().out  # of the statistics
        else:
            for line in filter(is_run, block.text.splitlines()):
                run(line)
    for written in ("plan.yaml", "heads.png"):
        assert Path(written).is_file()
    results = Path("results" if page.name == "quickstart.md" else "eval-ruler")
    assert (results / "report.md").is_file()
