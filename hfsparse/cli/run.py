"""Commands that run a model, or say what would run: explain, doctor, generate, bench, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfsparse import reading
from hfsparse.cli.application import (
    PLAN,
    Device,
    Dtype,
    Model,
    check_window,
    own_file,
    parse_counts,
)
from hfsparse.cli.profile import BeyondWindow
from hfsparse.errors import UsageError

PlanOption = Annotated[
    str | None,
    typer.Option(metavar="PLAN", help=f"A plan: {PLAN}. Without one every head is full."),
]


def explain(
    model: Model, plan: PlanOption = None, device: Device = "auto", dtype: Dtype = "auto"
) -> None:
    """Say what would run where under a plan, by which kernel, and why; reads no weights."""
    from hfsparse import patcher
    from hfsparse.models.loading import load_config, pick_device, pick_dtype
    from hfsparse.plan.sources import open_plan

    chosen = open_plan(plan) if plan is not None else None
    config, target = load_config(model), pick_device(device)
    standing = _without_weights(config, target, pick_dtype(dtype, target))
    with patcher.patch(standing, chosen):
        typer.echo(patcher.explain(standing))


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Also say whether this model can be patched, and why not.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print what a bug report needs: versions, devices, kernels; reads no weights."""
    import json

    from hfsparse.cli.doctor import report, text

    found = report(model)
    typer.echo(json.dumps(found, indent=2) if as_json else text(found))
    raise typer.Exit(int(model is not None and not found["model"]["supported"]))


def generate(
    model: Model,
    prompt_file: Annotated[Path, typer.Option(help="A text; the chat template is added to it.")],
    plan: PlanOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 64,
    chunk: Annotated[
        int, typer.Option(min=0, help="Tokens of the prompt a call; 0: as generate chooses.")
    ] = 0,
    exact: Annotated[
        bool, typer.Option(help="The plan only drafts: the answer is the dense model's.")
    ] = False,
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer a prompt under a plan, greedily, and print what was computed and kept."""
    prompt = read_prompt(prompt_file)

    from hfsparse.models.loading import load
    from hfsparse.patcher import patch
    from hfsparse.plan.sources import open_plan

    chosen = open_plan(plan) if plan is not None else None
    loaded, tokenizer = load(model, device, dtype)
    tokens = prompt_tokens(tokenizer, prompt)
    beyond = beyond_window or (chosen is not None and chosen.extend is not None)
    check_window(loaded, beyond, len(tokens) + max_new_tokens, "prompt and answer")
    with patch(loaded, chosen, exact=exact) as handle:
        _stream(loaded, tokenizer, tokens, max_new_tokens, chunk)
        typer.echo(f"\n{handle.stats()}")


def bench(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub name; or give --shape.")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(metavar="PLAN", help=f"A plan: {PLAN}. Without one: a stand-in of its kind."),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of a known shape.")] = None,
    lengths: Annotated[str, typer.Option(help="Prompt tokens, by commas.")] = "1024,8192,32768",
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each arm and length.")] = 3,
    write: Annotated[bool, typer.Option(help="Put table and break-even into the plan.")] = False,
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Time to the first token, dense and under the plan, on this device."""
    sizes = parse_counts(lengths, "lengths")
    if (model is None) == (shape is None):
        raise UsageError("give either a model or --shape")
    if write and plan is None:
        raise UsageError("--write needs the --plan to write into")

    from hfsparse import bench as benching
    from hfsparse.models.loading import device_name, load, pick_device, pick_dtype
    from hfsparse.plan.sources import open_plan

    if write:
        own_file(plan)
    chosen = open_plan(plan) if plan is not None else None
    if shape is not None:
        target = pick_device(device)
        loaded = benching.random_model(shape, target, pick_dtype(dtype, target))
    else:
        loaded, _ = load(model, device, dtype)
    check_window(loaded, beyond_window, max(sizes), "prompts")
    chosen = chosen or benching.stand_in(loaded)
    rows, name = [], device_name(loaded.device)
    for row in benching.bench(loaded, chosen, sizes, repeat):
        rows.append(row)
        typer.echo(f"{row.tokens} tokens: {row.dense_s:.3f} s dense, {row.sparse_s:.3f} s sparse")
    typer.echo(f"\n{benching.table(rows)}\n")
    pays = benching.pays_from(rows)
    typer.echo(f"{name}: " + (f"pays from {pays} tokens on" if pays else "never paid here"))
    if write:
        benching.with_measurements(chosen, rows, name).save(plan)
        typer.echo(f"wrote it into {plan}, under measured")


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


def read_prompt(file: Path) -> str:
    """A prompt file's text, stripped; UsageError if there is none."""
    try:
        prompt = reading.text(file).strip()
    except FileNotFoundError:
        raise UsageError(f"there is no prompt file {file}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read the prompt file {file}: {reading.why(error)}") from None
    if not prompt:
        raise UsageError(f"the prompt file {file} is empty")
    return prompt


def prompt_tokens(tokenizer, prompt: str) -> list[int]:
    """Tokens of a prompt in the chat template, if there is one, up to where the answer begins."""
    from hfsparse.models.chat import frames

    if not tokenizer.chat_template:
        return tokenizer(prompt, verbose=False)["input_ids"]
    before, after = frames(tokenizer, thinking=True)
    text = before + prompt + after
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _stream(model, tokenizer, tokens: list[int], max_new_tokens: int, chunk: int) -> None:
    import torch
    from transformers import TextStreamer

    from hfsparse.models.greedy import greedy
    from hfsparse.models.loading import input_ids

    ids = input_ids(model, [tokens])
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with greedy(model, max_new_tokens) as settings:
        settings.prefill_chunk_size = chunk or None
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer)


def _without_weights(config, device, dtype):
    """The model of a config on torch's meta device, which says that it lies on `device`.

    Kernels and thresholds are chosen by the device and dtype that a model names.
    """
    from hfsparse.models.loading import skeleton

    model = skeleton(config).to(dtype)
    kind = type(model)
    there = {"device": device, "__module__": kind.__module__}
    model.__class__ = type(kind.__name__, (kind,), there)
    return model
