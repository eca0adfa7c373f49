"""The command `hfsparse verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfsparse.cli.application import (
    Device,
    Dtype,
    Model,
    PlanFile,
    check_writable,
    own_file,
    print_styled,
)
from hfsparse.cli.profile import with_options
from hfsparse.errors import UsageError
from hfsparse.profiler.settings import Settings


@with_options(Settings, part="proof")
def verify(
    plan: PlanFile,
    model: Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the plan with its proof here.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write it into PLAN itself; comments there are lost.")
    ] = False,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    **settings: Any,
) -> None:
    """Say what a model loses under a plan, by the proof of profile; the plan stays as it is.

    Without --write or -o nothing is written; with one, a run that was stopped goes on when given
    the same command. The exit code is 1 if the plan loses more than its limits, or if nothing could
    be told.
    """
    if write and output is not None:
        raise UsageError("--write and -o are both places for the proof: give one")
    target = own_file(plan) if write else output
    if target is not None:
        check_writable(target)

    from hfsparse.models.loading import load, load_config
    from hfsparse.plan import headmap
    from hfsparse.plan.sources import open_plan
    from hfsparse.profiler.prompts.calibration import read_jsonl
    from hfsparse.profiler.report import find_doubt

    keywords = {**settings, "out": target, "progress": True}
    if (data := Settings(**keywords).data) is not None:
        read_jsonl(data)
    given = open_plan(plan)
    given.check(load_config(model))  # ahead of the weights

    from hfsparse.profiler import verify as proving

    loaded, tokenizer = load(model, device, dtype)
    proved = proving.verify(loaded, given, tokenizer, **keywords)
    print_styled(headmap.legend(proved))
    written = f"wrote {target}" if target else "nothing written: --write puts it into the plan"
    typer.echo(f"\n{written}")
    if warning := find_doubt(proved, given=True):
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
        raise typer.Exit(1)
