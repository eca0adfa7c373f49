"""Commands on plans: plans, new, import, show, diff, check, push."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Annotated

import typer

from hfsparse import reading
from hfsparse.cli.application import Model, PlanFile, check_writable, print_styled
from hfsparse.errors import PlanMismatch, UsageError
from hfsparse.models.loading import DTYPES, load_config
from hfsparse.writing import write_whole

Output = Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")]


def list_plans(
    model: Annotated[
        str | None, typer.Argument(help="Only those that fit this model: a folder or a hub name.")
    ] = None,
) -> None:
    """List the plans that are shipped, by model; a name is taken wherever a plan is."""
    config = None if model is None else load_config(model)

    from hfsparse.plan import Plan
    from hfsparse.plan.sources import FOLDER, shipped

    found: dict[str, list[str]] = {}
    for name, file in shipped().items():
        plan = Plan.load(file)
        if config is None or _fits(plan, config):
            doubt = "verified" if plan.verified and not plan.unproved else "not verified by us"
            found.setdefault(plan.made["model"], []).append(f"  {name:<36} {doubt}")
    for made_for, lines in sorted(found.items()):
        typer.echo("\n".join([made_for, *lines]))
    if not found:
        raise UsageError(f"no plan that is shipped fits {model}: hfsparse profile makes one")
    typer.echo(f"\neach is a page to read, {FOLDER / 'README.md'} tells what they lost")


def _fits(plan, config) -> bool:
    try:
        plan.check(config)
    except PlanMismatch:
        return False
    return True


def new(model: Model, output: Output) -> None:
    """Write a model's full plan, with comments, to edit by hand; reads no weights."""
    check_writable(output)
    if reading.local(output).exists():
        raise UsageError(f"{output} exists: give another name, or remove it")

    from hfsparse.models.loading import skeleton
    from hfsparse.patcher import patch
    from hfsparse.plan.template import template

    config = load_config(model)
    text = template(config)
    patch(skeleton(config)).undo()  # raises what patch would say of the model
    try:
        write_whole(os.path.realpath(reading.local(output)), text.encode())
    except (OSError, ValueError) as error:
        why = reading.why(error)
        raise UsageError(f"{output}: can't write it: {why}. Give another path") from error
    written = shlex.quote(str(output))
    typer.echo(f"wrote {output}. Edit it, then see that it fits:")
    typer.echo(f"  hfsparse check {written} {shlex.quote(model)}")


def import_(
    form: Annotated[str, typer.Argument(help="minference, duo, moa or modelopt.")],
    file: Annotated[Path, typer.Argument(help="The published plan; of duo, its folder.")],
    output: Output,
    model_config: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the model: config.json is read.")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="duo: share of kv heads that stream (0.5 if not given).")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="modelopt: tokens at which skip is its threshold.")
    ] = None,
) -> None:
    """Turn a plan that another project published into one of ours; says what gets lost."""
    check_writable(output)

    from hfsparse.plan.importers import import_plan

    config = load_config(model_config) if model_config is not None else None
    plan, notes = import_plan(form, file, config, share, length)
    plan.save(output)
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(f"wrote {output}. Look at it: hfsparse show {shlex.quote(str(output))}")


def show(
    plan: PlanFile,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, too.")] = None,
) -> None:
    """Print a plan's head map: layers x heads."""
    from hfsparse.plan import headmap
    from hfsparse.plan.sources import open_plan

    loaded = open_plan(plan)
    if png is not None:
        check_writable(png)
        headmap.png(loaded, png)
    print_styled(headmap.text(loaded))


def diff(first: PlanFile, second: PlanFile) -> None:
    """Say what changed from one plan to another; the exit code is 0 if nothing did."""
    from hfsparse.plan.diff import differences
    from hfsparse.plan.sources import open_plan

    plans = [open_plan(file) for file in (first, second)]
    for file, plan in zip((first, second), plans, strict=True):
        typer.echo(f"{plan.hash()[:19]}  {file}")
    found = differences(*plans)
    typer.echo("\n".join(found) or "equal")
    raise typer.Exit(int(bool(found)))


def check(
    plan: PlanFile,
    model: Model,
    length: Annotated[
        int | None, typer.Option(min=1, help="Also predict the memory of prompts of this length.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    chunk: Annotated[int, typer.Option(min=0, help="Tokens a call; 0: the whole prompt.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)} (auto is bfloat16).")] = "auto",
    gpu: Annotated[str | None, typer.Option(help="Memory that there is, such as 80GiB.")] = None,
) -> None:
    """Say whether a plan fits a model and a GPU, and why not; reads no weights."""
    room = None if gpu is None else _bytes(gpu)
    given = {"--batch": batch != 1, "--chunk": chunk, "--dtype": dtype != "auto", "--gpu": gpu}
    if length is None and (asked := [option for option, value in given.items() if value]):
        raise UsageError(f"{', '.join(asked)}: of a prompt's memory, so give its --length too")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype}: give one of {', '.join(DTYPES)}")

    from hfsparse.models.layers import layer_shapes
    from hfsparse.models.loading import skeleton
    from hfsparse.models.window import context_window
    from hfsparse.patcher import patch
    from hfsparse.patcher.generation import CHUNK, LONG, why_in_one_call
    from hfsparse.patcher.resolve import resolve_layers
    from hfsparse.plan import Plan
    from hfsparse.plan.sources import open_plan

    config, loaded = load_config(model), open_plan(plan)
    loaded.check(config)
    resolve_layers(loaded, layer_shapes(config), loaded.below)  # raises for tables of other keys
    every = replace(Plan.full(loaded.model), extend=loaded.extend)
    patch(skeleton(config), every).undo()  # raises what patch would say of the model
    typer.echo(f"{plan} fits {model}")
    if length is None:
        return
    more = {"batch": batch, "chunk": chunk, "itemsize": 4 if dtype == "float32" else 2}
    peak, longest = _print_memory(config, loaded, length, gpu, **more)
    _print_shares(config, loaded, length, more["itemsize"])
    given = _cache_budget(loaded)
    if given is not None and given[1] != length:
        typer.echo(
            f"note: this plan's cache was given {given[0]:g} GiB at {given[1]:,} tokens, and other "
            "lengths take other amounts: profile with --at for yours"
        )
    window = None if loaded.extend else context_window(config)
    if window is not None and window < max(length, longest):
        typer.echo(
            f"note: this model's window is {window:,} tokens: commands read no more without "
            "--beyond-window"
        )
    for told in _small_shares(loaded, length):
        typer.echo(f"note: {told}")
    if not chunk and length > LONG and why_in_one_call(config, loaded) is None:
        typer.echo(
            f"note: generate reads prompts of more than {LONG:,} tokens in chunks of {CHUNK:,} by "
            f"itself, which takes less work: --chunk {CHUNK}"
        )
    if room is not None and peak > room:
        raise UsageError(
            f"this plan needs {peak / 2**30:.1f} GiB, there are {room / 2**30:.1f}: give a "
            "shorter length, a smaller batch, a --chunk, or a plan with a smaller cache_share, as "
            "hfsparse bits makes"
        )


def _small_shares(plan, length: int) -> Iterator[str]:
    """Which patterns and selectors read more of a row of so many tokens than their `share`, since
    that is below the fewest pages or blocks that they read; blocks are a GPU's."""
    from torch import device

    from hfsparse.lists import PAGE
    from hfsparse.lists.grid import default_block
    from hfsparse.shares import whole_of

    phases = [each for each in ("prefill", "decode") if length >= getattr(plan.below, each)]
    words = chain.from_iterable(getattr(x, each) for x in plan.layers for each in phases)
    fewest = {"min_pages": PAGE, "min_blocks": default_block(length, device("cuda"))}
    for name, (least, size) in product(dict.fromkeys(words), fewest.items()):
        pattern = plan.patterns.get(name)
        if not hasattr(pattern, least):
            continue
        tokens, unit = getattr(pattern, least) * size, getattr(pattern, "unit", size)
        enough = (whole_of(pattern.share, tokens // unit) - 1) * unit + 1
        if length < enough:
            yield (
                f"of {length:,} tokens {name} reads {min(tokens, length):,}, its {least}, more "
                f"than share {pattern.share:g}; the share decides from {enough:,} tokens on"
            )


def _cache_budget(plan) -> tuple[float, int] | None:
    """GiB that the cache was given when the plan was made, and at how many tokens; None: it was
    given a share, or the plan doesn't say."""
    gib, at = plan.made.get("cache_gib"), plan.made.get("at", max(plan.expected, default=None))
    return (gib, at) if isinstance(gib, float | int) and isinstance(at, int) else None


def _print_memory(
    config, plan, length: int, gpu: str | None, batch: int, **more
) -> tuple[int, int]:
    """Print the memory of dense and of the plan, and with `gpu` how many tokens fit in that, also
    if the plan's caches were in 4 bits, or in host memory.

    Returns the plan's peak in bytes, and the tokens that fit; 0 without `gpu`.
    """
    from hfsparse.patcher import memory

    room, arms, found = None if gpu is None else _bytes(gpu), {"dense": None, "plan": plan}, {}
    if room is not None:
        arms |= memory.lighter(config, plan)
    wide = max(map(len, arms)) + 1
    for name, arm in arms.items():
        need = memory.predict(config, arm, length, batch=batch, **more)
        parts = {"weights": need.weights, "KV cache": need.cache, "work": need.work}
        if need.states:
            parts["states"] = need.states
        if arm is None:
            typer.echo(f"{batch} x {length:,} tokens, GiB: {' + '.join(parts)} = peak")
        sizes = (f"{n / 2**30:.2f}" for n in parts.values())
        line = f"{name:<{wide}}{' + '.join(sizes)} = {need.peak / 2**30:.2f}"
        if need.host:
            line += f", and {need.host / 2**30:.2f} in host memory"
        most = 0
        if room is not None:
            most = memory.longest(config, arm, room, batch=batch, **more)
            line += f"; in {gpu}: {batch} x {most:,} tokens at most" if most else f"; not in {gpu}"
        typer.echo(line)
        found[name] = need.peak, most
    return found["plan"]


def _print_shares(config, plan, length: int, itemsize: int) -> None:
    """Print what the plan computes, keeps and reads, as far as its words alone tell it."""
    from hfsparse.patcher.figures import predict
    from hfsparse.stats import FREE

    for end, part in predict(config, plan, length, itemsize=itemsize).parts.items():
        shares = (f"{name.replace('_', ' ')} {share:.3f}" for name, share in part.known.items())
        typer.echo(f"shares {FREE if end else 'of the dense model'}: {', '.join(shares)}")


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])(i?)B", size.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{size!r} is no size of memory: give one such as 80GiB or 24GB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("MGT".index(unit.upper()) + 2))


def push(
    plan: PlanFile,
    repo: Annotated[str, typer.Argument(metavar="ORG/REPO", help="A repository on the hub.")],
    private: Annotated[bool, typer.Option(help="If it has to be made: for you alone.")] = False,
    branch: Annotated[str | None, typer.Option(help="Not the main one; it may be new.")] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write what would be pushed, push nothing."),
    ] = None,
) -> None:
    """Put a plan on the Hugging Face hub, with its tables and a page made from it."""
    from hfsparse.plan import hub
    from hfsparse.plan.card import write_folder
    from hfsparse.plan.sources import name_of, open_plan

    hub.check_repo(repo)
    loaded, file = open_plan(plan), f"{name_of(plan).replace(':', '-')}.yaml"
    if dry_run is not None:
        folder = _new_folder(dry_run)
        write_folder(loaded, file, folder, repo)
        typer.echo(
            f"wrote {', '.join(sorted(each.name for each in folder.iterdir()))} in {dry_run}"
        )
        return
    with tempfile.TemporaryDirectory() as made:
        write_folder(loaded, file, Path(made), repo)
        commit = hub.push(made, repo, private, branch)
    typer.echo(f"pushed {file}. Whoever may read {repo} has it:")
    typer.echo(f"  hfsparse show {hub.SCHEME}{repo}@{commit}/{file}")


def _new_folder(path: Path) -> Path:
    """A folder with nothing in it, made where it is not there."""
    folder = reading.local(path)
    try:
        folder.mkdir(exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        why = reading.why(error)
        raise UsageError(f"can't make the folder {path}: {why}; give another path") from None
    if taken:
        raise UsageError(f"{path} has files in it: give an empty folder, or a new one")
    return folder
