"""The command line: profile, recipes, import, show, diff, check, doctor, generate, bench, eval.

torch and transformers are imported inside the commands, so that `hfsparse --help` is instant.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from hfsparse import reading
from hfsparse.loading import DTYPES, UsageError, hush

_formatted = warnings.formatwarning
STOPPING = ("strict", "surrogateescape")  # how streams are opened, if they are not told otherwise


class Commands(TyperGroup):
    """Every command ends in one line on bad input and on Ctrl-C; other errors keep their trace.

    What the console's encoding can't show (cp1252, ASCII) is printed as `?`, and what a user is
    warned of as one line, too, without a place in the code.
    """

    def main(self, *args, **kwargs):
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in STOPPING:
            sys.stdout.reconfigure(errors="replace")
        hush()
        usual, warnings.formatwarning = warnings.formatwarning, _warning
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
        except Exception as error:
            if not type(error).__module__.startswith("hfsparse"):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    help="Sparse attention for Hugging Face models: profile each head, then run the plan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Folder or hub name of a Hugging Face model.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan that profile wrote.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)} (auto is float32 on a CPU).")]
BUDGET = ", of the layers without a window of their own; 1 is no limit"
BeyondWindow = Annotated[
    bool, typer.Option("--beyond-window", help="Go beyond the length that the model is made for.")
]


def _version(wanted: bool) -> None:
    from importlib.metadata import version

    if wanted:
        typer.echo(f"hfsparse {version('hfsparse')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


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
    from hfsparse.profiler.prompts import read_jsonl

    given = [x for x in settings if context.get_parameter_source(x).name == "COMMANDLINE"]
    page = {} if recipe is None else recipes.load(recipe)
    flags = {name: settings[name] for name in given}
    settings |= page | flags
    check_settings(**settings)
    check_curves(curves, settings["method"], settings["prefill_method"])
    if data is not None:
        read_jsonl(data)

    import hfsparse
    from hfsparse import headmap
    from hfsparse.loading import load

    loaded, tokenizer = load(model, device, dtype)
    if page:
        typer.echo(recipes.told(page, flags))
    files = {"out": output, "data": data, "curves": curves}
    plan = hfsparse.profile(loaded, tokenizer, progress=True, **files, **settings)
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


@app.command("import")
def import_(
    form: Annotated[str, typer.Argument(help="minference, duo or moa.")],
    file: Annotated[Path, typer.Argument(help="The published plan; of duo, its folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")],
    model_config: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the model: config.json is read.")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="duo: share of kv heads that stream (0.5 if not given).")
    ] = None,
) -> None:
    """Turn a plan that another project published into one of ours; says what gets lost."""
    check_writable(output)

    from hfsparse.importers import import_plan

    config = _config(model_config) if model_config is not None else None
    plan, notes = import_plan(form, file, config, share)
    plan.save(output)
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(f"wrote {output}. Look at it: hfsparse show {shlex.quote(str(output))}")


@app.command()
def show(
    plan: PlanFile,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, too.")] = None,
) -> None:
    """Print a plan's head map: layers x heads."""
    from hfsparse import headmap
    from hfsparse.plan import Plan

    loaded = Plan.load(plan)
    if png is not None:
        check_writable(png)
        headmap.png(loaded, png)
    _print(headmap.text(loaded))


@app.command()
def diff(first: PlanFile, second: PlanFile) -> None:
    """Say what changed from one plan to another; the exit code is 0 if nothing did."""
    from hfsparse.plan import Plan
    from hfsparse.plan_diff import differences

    plans = [Plan.load(file) for file in (first, second)]
    for file, plan in zip((first, second), plans, strict=True):
        typer.echo(f"{plan.hash()[:19]}  {file}")
    found = differences(*plans)
    typer.echo("\n".join(found) or "equal")
    raise typer.Exit(int(bool(found)))


@app.command()
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
    if room is not None and length is None:
        raise UsageError("--gpu asks what fits beside a prompt: give its --length too")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype}: give one of {', '.join(DTYPES)}")

    import hfsparse
    from hfsparse.loading import skeleton
    from hfsparse.plan import Plan

    config, loaded = _config(model), Plan.load(plan)
    loaded.check(config)
    hfsparse.patch(skeleton(config)).undo()  # says what patch would say of the model
    typer.echo(f"{plan} fits {model}")
    if length is None:
        return

    from hfsparse import memory
    from hfsparse.figures import predict
    from hfsparse.stats import FREE

    more = {"batch": batch, "chunk": chunk, "itemsize": 4 if dtype == "float32" else 2}
    typer.echo(f"{batch} x {length:,} tokens, GiB: weights + KV cache + work = peak")
    for name, arm in (("dense", None), ("plan", loaded)):
        need = memory.predict(config, arm, length, **more)
        parts = (f"{n / 2**30:.2f}" for n in (need.weights, need.cache, need.work))
        line = f"{name:<6}{' + '.join(parts)} = {need.peak / 2**30:.2f}"
        if room is not None:
            most = memory.longest(config, arm, room, **more)
            line += f"; in {gpu}: {batch} x {most:,} tokens at most" if most else f"; not in {gpu}"
        typer.echo(line)
    for end, part in predict(config, loaded, length).parts.items():
        shares = (f"{name.replace('_', ' ')} {share:.3f}" for name, share in part.known.items())
        typer.echo(f"shares {FREE if end else 'of the dense model'}: {', '.join(shares)}")
    if room is not None and need.peak > room:
        raise UsageError(
            f"this plan needs {need.peak / 2**30:.1f} GiB, there are {room / 2**30:.1f}: give a "
            "shorter length, a smaller batch, a --chunk, or a plan with a smaller cache_share"
        )


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Also say whether this model can be patched, and why not.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print what a bug report needs: versions, devices, kernels; reads no weights."""
    import json

    from hfsparse.doctor import report, text

    found = report(model)
    typer.echo(json.dumps(found, indent=2) if as_json else text(found))
    raise typer.Exit(int(model is not None and not found["model"]["supported"]))


@app.command()
def generate(
    model: Model,
    prompt_file: Annotated[Path, typer.Option(help="A text; the chat template is added to it.")],
    plan: Annotated[Path | None, typer.Option(help="Without a plan every head is full.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 64,
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer a prompt under a plan, greedily, and print what was computed and kept."""
    prompt = _read_prompt(prompt_file)

    import hfsparse
    from hfsparse.loading import load
    from hfsparse.plan import Plan

    chosen = Plan.load(plan) if plan is not None else None
    loaded, tokenizer = load(model, device, dtype)
    tokens = _tokens(tokenizer, prompt)
    _check_window(loaded, beyond_window, len(tokens) + max_new_tokens, "prompt and answer")
    with hfsparse.patch(loaded, chosen) as handle:
        _stream(loaded, tokenizer, tokens, max_new_tokens)
        typer.echo(f"\n{handle.stats()}")


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub name; or give --shape.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Without one: a stand-in of its kind.")] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of a known shape.")] = None,
    lengths: Annotated[str, typer.Option(help="Prompt tokens, by commas.")] = "1024,8192,32768",
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each arm and length.")] = 3,
    write: Annotated[bool, typer.Option(help="Put table and break-even into the plan.")] = False,
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Time to the first token, dense and under the plan, on this device."""
    sizes = _lengths(lengths)
    if (model is None) == (shape is None):
        raise UsageError("give either a model or --shape")
    if write and plan is None:
        raise UsageError("--write needs the --plan to write into")

    from hfsparse import bench as benching
    from hfsparse.loading import _device, _dtype, device_name, load
    from hfsparse.plan import Plan

    chosen = Plan.load(plan) if plan is not None else None
    if shape is not None:
        target = _device(device)
        loaded = benching.random_model(shape, target, _dtype(dtype, target))
    else:
        loaded, _ = load(model, device, dtype)
    _check_window(loaded, beyond_window, max(sizes), "prompts")
    chosen = chosen or benching.stand_in(loaded)
    rows, name = [], device_name(loaded.device)
    for row in benching.bench(loaded, chosen, sizes, repeat):
        rows.append(row)
        typer.echo(f"{row.tokens} tokens: {row.dense_s:.3f} s dense, {row.sparse_s:.3f} s sparse")
    typer.echo(f"\n{benching.table(rows)}\n")
    pays = benching.pays_from(rows)
    typer.echo(f"{name}: " + (f"pays from {pays} tokens on" if pays else "never paid here"))
    if write:
        benching.written(chosen, rows, name).save(plan)
        typer.echo(f"wrote it into {plan}, under measured")


@app.command(
    "eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def evaluate(context: typer.Context) -> None:
    """What a plan costs, in pairs: ruler, needle, turns, custom, decode, ppl, recall."""
    try:
        from hfsparse_eval.cli import app as tasks
    except ModuleNotFoundError as error:
        raise UsageError(
            f"hfsparse eval needs the module {error.name}: pip install 'hfsparse[eval]'"
        ) from None
    code = tasks(context.args, prog_name="hfsparse eval", standalone_mode=False)
    raise typer.Exit(code or 0)


def main() -> None:
    app(prog_name="hfsparse")


# ---- input


def check_writable(file: Path) -> None:
    """Raise unless `file` can be written: asked before hours of work, not after."""
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


def _lengths(words: str) -> tuple[int, ...]:
    try:
        lengths = tuple(dict.fromkeys(int(word) for word in words.split(",")))
    except ValueError:
        lengths = (0,)
    if min(lengths) < 1:
        raise UsageError(f"lengths is {words!r}: give token counts by commas, such as 1024,2048")
    return lengths


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", size.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{size!r} is no size of memory: give one such as 80GiB or 24GB")
    units = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}
    return int(float(match[1]) * units[match[2].lower()])


def _config(model: str):
    from transformers import AutoConfig

    from hfsparse.loading import find, not_loaded

    place, here = find(model)
    try:
        return AutoConfig.from_pretrained(place, local_files_only=here)
    except Exception as problem:  # transformers raises OSError, ValueError, KeyError, and more
        raise not_loaded("the configuration", model, here, problem) from problem


def _check_window(model, beyond: bool, tokens: int, what: str) -> None:
    from hfsparse.window import limit

    window = limit(model, beyond)
    if window is not None and tokens > window:
        raise UsageError(
            f"{what} take {tokens} tokens, {tokens - window} more than this model's window "
            f"of {window} (--beyond-window passes it)"
        )


def _read_prompt(file: Path) -> str:
    try:
        prompt = reading.text(file).strip()
    except FileNotFoundError:
        raise UsageError(f"there is no prompt file {file}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read the prompt file {file}: {reading.why(error)}") from None
    if not prompt:
        raise UsageError(f"the prompt file {file} is empty")
    return prompt


def _tokens(tokenizer, prompt: str) -> list[int]:
    from hfsparse.chat import frames

    if not tokenizer.chat_template:
        return tokenizer(prompt, verbose=False)["input_ids"]
    before, after = frames(tokenizer, thinking=True)
    text = before + prompt + after
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# ---- output


def _stream(model, tokenizer, tokens: list[int], max_new_tokens: int) -> None:
    import torch
    from transformers import TextStreamer

    from hfsparse.greedy import greedy
    from hfsparse.loading import input_device

    ids = torch.tensor([tokens], device=input_device(model))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with greedy(model, max_new_tokens):
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer)


def _warning(message, category, filename, lineno, line=None) -> str:
    if category is UserWarning:
        return f"warning: {message}\n"
    return _formatted(message, category, filename, lineno, line)


def _print(text) -> None:
    from rich.console import Console

    Console().print(text, soft_wrap=True)


if __name__ == "__main__":
    main()
