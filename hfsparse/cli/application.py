"""What all commands share: how they end, the options they have in common, and checks of input."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from hfsparse import reading
from hfsparse.errors import Error, UsageError
from hfsparse.models.loading import DTYPES, hush

_python_format = warnings.formatwarning
SHARED = "eval"  # the command that several processes may run together
STOPPING = ("strict", "surrogateescape")  # Python opens streams with these unless told otherwise


class Commands(TyperGroup):
    """Every command ends in one line on bad input and on Ctrl-C; other errors keep their trace.

    What the console's encoding can't show (cp1252, ASCII) is printed as `?`. A warning to users is
    one line, too, without a place in the code.
    """

    def main(self, *args, **kwargs):
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in STOPPING:
            sys.stdout.reconfigure(errors="replace")
        hush()
        usual, warnings.formatwarning = warnings.formatwarning, _format_warning
        try:
            return super().main(*args, **kwargs)
        finally:
            warnings.formatwarning = usual

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted: profile and eval go on when given the same command", err=True)
            raise typer.Exit(130) from None
        except Error as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    def resolve_command(self, ctx, args):
        name, command, left = super().resolve_command(ctx, args)
        first, *_ = *ctx.command_path.split()[1:], name
        _refuse_ranks(first)
        return name, command, left


Model = Annotated[str, typer.Argument(help="Folder or hub name of a Hugging Face model.")]
PLAN = "its file, a name that hfsparse plans lists, or hf://ORG/REPO/plan.yaml"
PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help=f"A plan: {PLAN}.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)} (auto is float32 on a CPU).")]


def _refuse_ranks(command: str) -> None:
    """UsageError where several processes are started of a command that is one."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and ranks != "1" and command != SHARED:
        raise UsageError(
            f"hfsparse {command} is one process, and {ranks} were started: run it without "
            f"torchrun or accelerate launch. Only hfsparse {SHARED} shares its work, and a model "
            "that ranks share follows a plan by hfsparse.patch"
        )


def _format_warning(message, category, filename, lineno, line=None) -> str:
    if category is UserWarning:
        return f"warning: {message}\n"
    return _python_format(message, category, filename, lineno, line)


def _version(wanted: bool) -> None:
    from importlib.metadata import version

    if wanted:
        typer.echo(f"hfsparse {version('hfsparse')}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options of `hfsparse` itself."""


def check_writable(file: Path) -> None:
    """Raise unless `file` can be written; commands ask before hours of work, not after."""
    file = reading.local(file)
    try:
        if file.is_dir():
            raise UsageError(f"{file} is a folder: give a file name")
        if not file.parent.is_dir():
            raise UsageError(
                f"there is no folder {file.parent} to write {file.name} in: make it first"
            )
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"can't write in {file.parent}: {error.strerror}; give another path"
        ) from None


def own_file(plan: str) -> Path:
    """The file that `--write` writes into; UsageError for a plan that is shipped, or on the hub."""
    from hfsparse.plan.sources import is_own_file

    if not is_own_file(plan):
        raise UsageError(f"--write can't write into {plan}: give a file of yours")
    return Path(plan)


def parse_counts(words: str, name: str) -> tuple[int, ...]:
    """Whole numbers of 1 or more, each once, from `1024,2048`; `name` is the option's."""
    try:
        counts = tuple(dict.fromkeys(int(word) for word in words.split(",")))
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        raise UsageError(f"{name} is {words!r}: give whole numbers by commas, such as 1024,2048")
    return counts


def parse_bits(words: str, name: str = "bits") -> tuple[int | str, ...]:
    """Bits from `16,fp8,4`, each once; what plans know of them is not asked here."""
    parts = (word.strip() for word in words.split(","))
    return tuple(dict.fromkeys(int(word) if word.isdigit() else word for word in parts))


def check_window(model, beyond: bool, tokens: int, what: str) -> None:
    """Raise where `what` take more tokens than the model is made for, unless `beyond` is set."""
    from hfsparse.models.window import limit

    window = limit(model, beyond)
    if window is not None and tokens > window:
        raise UsageError(
            f"{what} take {tokens} tokens, {tokens - window} more than this model's window "
            f"of {window} (--beyond-window passes it)"
        )


def print_styled(text) -> None:
    """Print rich text: in colour on a terminal, plain elsewhere."""
    from rich.console import Console

    Console().print(text, soft_wrap=True)
