"""The command `hfsparse export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hfsparse import reading
from hfsparse.cli.application import PlanFile, check_writable
from hfsparse.errors import UsageError
from hfsparse.writing import write_whole


def export(
    plan: PlanFile,
    to: Annotated[str, typer.Option(help="modelopt: sparse_attention_config, by the plan's skip.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens at which its threshold is the plan's skip.")
    ] = None,
) -> None:
    """Write what another project's form can say of a plan; says on stderr what gets lost."""
    check_writable(output)
    if reading.local(output).exists():
        raise UsageError(f"{output} exists: give another name, or remove it")

    from hfsparse.plan.exporters import export_plan
    from hfsparse.plan.sources import open_plan

    text, notes = export_plan(open_plan(plan), to, length)
    try:
        write_whole(os.path.realpath(reading.local(output)), text.encode())
    except (OSError, ValueError) as error:
        why = reading.why(error)
        raise UsageError(f"{output}: can't write it: {why}. Give another path") from error
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {output}")
