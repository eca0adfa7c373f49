"""The command `hfsparse profile`, and the recipes that it takes."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from hfsparse.cli.application import (
    Device,
    Dtype,
    Model,
    check_writable,
    parse_bits,
    parse_counts,
    print_styled,
)
from hfsparse.errors import UsageError
from hfsparse.profiler.settings import Settings

# How a command takes a setting of these types: the type of its option, and what makes one of its
# value and name.
TYPES = {
    tuple[int, ...] | None: (str | None, parse_counts),
    tuple[int | str, ...] | None: (str | None, parse_bits),
    str | Path | None: (Path | None, lambda value, name: Path(value)),
}
PROOF = "drop", "nats", "verify_samples"  # settings that nothing else reads


def option(setting: Field) -> Any:
    """The option of a setting."""
    about = setting.metadata
    return typer.Option(*about["flags"], help=about["help"], **about["option"])


BeyondWindow = Annotated[bool, option(Settings.__dataclass_fields__["beyond_window"])]


def with_options(settings: type[Settings], part: str = "help") -> Callable[[Callable], Callable]:
    """Give a command an option for each setting with a help text, ahead of its keyword-only ones.

    The command is given them as keywords. `part`: of those, the settings that have this argument.
    """

    def decorate(command: Callable) -> Callable:
        types, own = get_type_hints(settings), signature(command, eval_str=True)
        options = []
        for each in fields(settings):
            if each.metadata["help"] is not None and each.metadata[part]:
                taken, _ = TYPES.get(types[each.name], (types[each.name], None))
                kind = Annotated[taken, option(each)]
                one = Parameter(
                    each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=kind
                )
                options.append(one)

        @wraps(command)
        def call(**given):
            for name in (each.name for each in options):
                _, read = TYPES.get(types[name], (None, None))
                if read is not None and given[name] is not None:
                    given[name] = read(given[name], name)
            return command(**given)

        first = [p for p in own.parameters.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        last = [p for p in own.parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
        call.__signature__ = Signature([*first, *options, *last])
        return call

    return decorate


@with_options(Settings)
def profile(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="Settings by a name (see hfsparse recipes) or a .yaml; flags override."),
    ] = None,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    **settings: Any,
) -> None:
    """Measure how each head attends and write a plan."""
    for file in (output, settings["curves"]):
        if file is not None:
            check_writable(file)

    from hfsparse import recipe as recipes
    from hfsparse.profiler.prompts.calibration import read_jsonl
    from hfsparse.profiler.report import describe_budgets, find_doubt, find_unused

    page = {} if recipe is None else recipes.load(recipe)
    named = Settings.names("recipe")
    given = [x for x in named if context.get_parameter_source(x).name == "COMMANDLINE"]
    flags = {name: settings[name] for name in given}
    keywords = {**settings, **page, **flags, "out": output, "progress": True}
    checked = Settings(**keywords)
    idle = [f"--{name.replace('_', '-')}" for name in PROOF if name in flags]
    if idle and not checked.verify and "verify" not in flags:
        raise UsageError(
            f"{', '.join(idle)}: of the proof, which {recipe} leaves out: give --verify too"
        )
    if checked.data is not None:
        read_jsonl(checked.data)

    from hfsparse import profiler
    from hfsparse.models.loading import load
    from hfsparse.plan import Plan, headmap

    loaded, tokenizer = load(model, device, dtype)
    if page:
        typer.echo(recipes.describe_sources(page, flags))
    plan = profiler.profile(loaded, tokenizer, **keywords)
    print_styled(headmap.legend(plan))
    if plan.expected:
        typer.echo(f"\n{describe_budgets(plan, checked, loaded)}")
    written = shlex.quote(str(output))
    drawn = "" if checked.curves is None else f" and {checked.curves}"
    tables = Plan.load(output).data.values() if plan.data else ()  # under the names that they got
    beside = "".join(f", beside it {each.file}" for each in tables)
    typer.echo(f"\nwrote {output}{drawn}{beside}. Look at it, then run it:")
    typer.echo(f"  hfsparse show {written}")
    typer.echo(f"  hfsparse generate {shlex.quote(model)} --plan {written} --prompt-file FILE")
    for warning in filter(None, (find_unused(plan, checked), find_doubt(plan))):
        typer.secho(f"warning: {warning}", fg="yellow", err=True)


def list_recipes() -> None:
    """List the recipes of profile --recipe, and what each is for."""
    from hfsparse.recipe import FOLDER, names

    for name, line in names().items():
        typer.echo(f"{name:<14} {line}")
    typer.echo(f"\neach is a page to read: {FOLDER}")
