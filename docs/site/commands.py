"""docs/cli.md, made of the commands themselves: .venv/bin/python docs/site/commands.py"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import typer

PAGE = Path(__file__).parents[1] / "cli.md"
HEAD = """# Command line

Every command and option. `docs/site/commands.py` writes this page of what the commands take, and a
test fails where it no longer says that.

Exit codes: 0; 1 for what can't be done, with one line on standard error that says why (or where
`diff` finds a difference, `verify` a loss beyond its limits, or `doctor MODEL` a model that can't
be patched); 2 for words that are no command or option; 130 for Ctrl-C.
"""


def page() -> str:
    """The page, in the order in which the commands are listed."""
    from hfsparse.cli import app
    from hfsparse_eval.cli import app as tasks

    return "\n".join([HEAD, *_commands(app, "hfsparse"), *_commands(tasks, "hfsparse eval")])


def _commands(app: typer.Typer, name: str) -> Iterator[str]:
    for word, command in typer.main.get_command(app).commands.items():
        if word != "eval":
            yield from _command(f"{name} {word}", command)


def _command(name: str, command) -> Iterator[str]:
    takes = [each for each in command.params if each.name != "help"]
    words = [each for each in takes if each.param_type_name == "argument"]
    options = [each for each in takes if each.param_type_name == "option"]
    usage = [_label(each) if each.required else f"[{_label(each)}]" for each in words]
    usage += [f"{each.opts[0]} {_label(each)}" for each in options if each.required]
    usage += ["[OPTIONS]"] * any(not each.required for each in options)
    says = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    yield f"## {name}\n\n```text\n{' '.join([name, *usage])}\n```\n\n" + "\n\n".join(says) + "\n"
    if not takes:
        return
    yield "| argument or option | default | |\n| --- | --- | --- |"
    for each in words:
        yield f"| {_code(_label(each))} | {_default(each)} | {_cell(each.help)} |"
    for each in options:
        flags = [*each.opts, *each.secondary_opts]
        if each.metavar or isinstance(each.default, Enum):
            flags[-1] += f" {_label(each)}"
        yield f"| {', '.join(map(_code, flags))} | {_default(each)} | {_cell(each.help)} |"
    yield ""


def _label(each) -> str:
    if isinstance(each.default, Enum):
        return "|".join(choice.value for choice in type(each.default))
    return each.metavar or each.name.upper()


def _default(each) -> str:
    if each.required:
        return "needed"
    if each.param_type_name == "option" and each.is_flag:
        return "on" if each.default else "off"
    value = each.default.value if isinstance(each.default, Enum) else each.default
    return "" if value is None else _code(str(value))


def _code(text: str) -> str:
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
