"""The command `hfsparse bits`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hfsparse import reading
from hfsparse.cli.application import Model, PlanFile, check_writable
from hfsparse.errors import UsageError
from hfsparse.models.loading import load_config


def bits(
    plan: PlanFile,
    model: Model,
    to: Annotated[
        str,
        typer.Option("--bits", metavar="BITS", help="Of a number in the cache: 16, 8, 4 or fp8."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")],
) -> None:
    """Write a plan with its caches in fewer bits; reads no weights.

    Expected shares of the cache are those of a model in a type of two bytes.
    """
    check_writable(output)
    if reading.local(output).exists():
        raise UsageError(f"{output} exists: give another name, or remove it")

    from hfsparse.lists.packed import said
    from hfsparse.patcher.figures import predict
    from hfsparse.plan.sources import open_plan

    config, given = load_config(model), open_plan(plan)
    wanted = int(to) if to.isdigit() else to
    found = given.with_bits(wanted, config)
    for length, figures in found.expected.items():
        told = predict(config, found, length, itemsize=2).figures()
        figures |= {name: x for name, x in told.items() if name.startswith("cache_share")}
    found.save(output)
    words = [word for layer in found.layers for word in layer.cache]
    kept = sum(getattr(found.patterns.get(word), "bits", 16) == wanted for word in words)
    typer.echo(f"wrote {output}: {kept} of {len(words)} kv heads keep numbers in {said(wanted)}")
    names = shlex.quote(str(output)), shlex.quote(model)
    typer.echo("nothing verified that. Look at what it takes, and have it verified:")
    typer.echo(f"  hfsparse check {' '.join(names)} --length TOKENS")
    typer.echo(f"  hfsparse verify {' '.join(names)} --write")
