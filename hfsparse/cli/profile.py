"""The command `hfsparse profile`, and the recipes that it takes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hfsparse.cli.application import Device, Dtype, Model, _lengths, _print, app, check_writable

BUDGET = ", of the layers without a window of their own; 1 is no limit"
BeyondWindow = Annotated[
    bool, typer.Option("--beyond-window", help="Go beyond the length that the model is made for.")
]


@app.command()
def profile(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="Settings by a name (see hfsparse recipes) or a .yaml; flags override."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a sample, by commas; else 1024,2048, on a GPU up to 16384, and "
            "no more than the model's window."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples at each length.")] = 6,
    prefill_density: Annotated[
        float, typer.Option(help=f"Share of query-key pairs to compute in the prefill{BUDGET}.")
    ] = 0.4,
    cache_share: Annotated[
        float, typer.Option(help=f"Share of the KV cache's bytes to keep{BUDGET}.")
    ] = 0.8,
    decode_share: Annotated[
        float, typer.Option(help=f"Share of the keys to read in decode{BUDGET}.")
    ] = 0.25,
    loss: Annotated[
        float | None,
        typer.Option(
            help="The smallest shares within these budgets that lose no more; see README."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Your own texts: "text", or "prompt" and perhaps "answer", one object a line.',
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="How patterns are chosen.")] = "balanced",
    prefill_method: Annotated[
        str | None,
        typer.Option(help="Another method for prompts, where --method keeps the cache full."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Try the plan on trials and texts; give back heads that fail, or widen budgets."
        ),
    ] = True,
    drop: Annotated[
        float, typer.Option(help="Greatest share of answers that may be lost against dense.")
    ] = 0.01,
    nats: Annotated[
        float, typer.Option(help="Greatest mean loss on tokens that need the far context.")
    ] = 0.1,
    verify_samples: Annotated[
        int, typer.Option(min=1, help="Trials at each length that choose, and as many that tell.")
    ] = 12,
    proxy: Annotated[
        str | None,
        typer.Option(help="duo: rank heads by copy, mass or error instead of training gates."),
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw recall by density, and loss by budget."),
    ] = None,
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure how each head attends and write a plan."""
    settings = {
        "lengths": None if lengths is None else _lengths(lengths),
        "samples": samples,
        "seed": seed,
        "prefill_density": prefill_density,
        "cache_share": cache_share,
        "decode_share": decode_share,
        "loss": loss,
        "method": method,
        "prefill_method": prefill_method,
        "verify": verify,
        "drop": drop,
        "nats": nats,
        "verify_samples": verify_samples,
        "proxy": proxy,
        "beyond_window": beyond_window,
    }
    for file in (output, curves):
        if file is not None:
            check_writable(file)

    from hfsparse import recipe as recipes
    from hfsparse.profiler import budgets_told, check_curves, check_settings, doubt
    from hfsparse.profiler.prompts.calibration import read_jsonl

    given = [x for x in settings if context.get_parameter_source(x).name == "COMMANDLINE"]
    page = {} if recipe is None else recipes.load(recipe)
    flags = {name: settings[name] for name in given}
    settings |= page | flags
    check_settings(**settings)
    check_curves(curves, settings["method"], settings["prefill_method"])
    if data is not None:
        read_jsonl(data)

    from hfsparse import profiler
    from hfsparse.models.loading import load
    from hfsparse.plan import headmap

    loaded, tokenizer = load(model, device, dtype)
    if page:
        typer.echo(recipes.told(page, flags))
    files = {"out": output, "data": data, "curves": curves}
    plan = profiler.profile(loaded, tokenizer, progress=True, **files, **settings)
    _print(headmap.legend(plan))
    if plan.expected:
        shares = ("prefill_density", "cache_share", "decode_share")
        typer.echo(f"\n{budgets_told(plan, *(settings[name] for name in shares))}")
    written = shlex.quote(str(output))
    drawn = "" if curves is None else f" and {curves}"
    typer.echo(f"\nwrote {output}{drawn}. Look at it, then run it:")
    typer.echo(f"  hfsparse show {written}")
    typer.echo(f"  hfsparse generate {shlex.quote(model)} --plan {written} --prompt-file FILE")
    if warning := doubt(plan):
        typer.secho(f"warning: {warning}", fg="yellow", err=True)


@app.command("recipes")
def list_recipes() -> None:
    """List the recipes of profile --recipe, and what each is for."""
    from hfsparse.recipe import FOLDER, names

    for name, line in names().items():
        typer.echo(f"{name:<14} {line}")
    typer.echo(f"\neach is a page to read: {FOLDER}")
