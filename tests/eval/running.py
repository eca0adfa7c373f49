"""A command of `hfsparse eval`, run twice."""

import json
from pathlib import Path

from typer.testing import CliRunner

from hfsparse_eval.cli import app


def goes_on(words: list[str], out: Path) -> tuple[list[dict], str]:
    """Runs words (`… -o out … --samples`) with 1 sample, then with 2; lines and report of both.

    The second run must leave the lines of the first as they are.
    """
    assert CliRunner().invoke(app, [*words, "1"]).exit_code == 0
    done = (out / "results.jsonl").read_text()
    result = CliRunner().invoke(app, [*words, "2"])
    assert result.exit_code == 0, result.output
    content = (out / "results.jsonl").read_text()
    assert content.startswith(done)
    return [json.loads(line) for line in content.splitlines()], (out / "report.md").read_text()
