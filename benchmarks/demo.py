"""The main job on a real model, start to end: profile → show → generate → eval, then one table.

    make demo            # = python -m benchmarks.demo --model .cache/smollm2 --out demo-out

Runs the commands a user would run, prints each, and ends with dense and sparse side by side.
"""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import hfsparse
from hfsparse.cli import app
from hfsparse.models.loading import load
from hfsparse.plan import Plan
from hfsparse_eval.report.pairs import Cell, cells, joined
from hfsparse_eval.run.generate import answer
from hfsparse_eval.run.machine import describe
from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.run.results import parse
from hfsparse_eval.run.samples import Suite
from hfsparse_eval.tasks import TASKS

LENGTH, SAMPLES = 2048, 8
TASK_NAMES = ("niah_single_1", "niah_single_2", "niah_multikey_1")
BUDGETS = "--prefill-density 0.37 --cache-share 0.425 --decode-share 0.37"
METHOD = "--method minference --no-verify"
NEW_TOKENS = 32  # an answer is a number of seven digits


def main(
    model: Annotated[Path, typer.Option(help="Folder of SmolLM2-135M-Instruct.")],
    out: Annotated[Path, typer.Option(help="Where plan, pictures and tables go.")],
) -> None:
    start = time.time()
    shutil.rmtree(out, ignore_errors=True)  # old results are not this run's
    out.mkdir(parents=True)
    plan, results = out / "plan.yaml", out / "eval"
    command(f"profile {model} -o {plan} --lengths {LENGTH} --samples 6 {METHOD} {BUDGETS}")
    command(f"show {plan} --png {out / 'heads.png'}")
    command(f"check {plan} {model}")
    side_by_side(str(model), Plan.load(plan))
    command(
        f"eval ruler {model} --plan {plan} --lengths {LENGTH} --samples {SAMPLES} "
        f"--tasks {','.join(TASK_NAMES)} --max-new-tokens {NEW_TOKENS} -o {results}"
    )
    lines = parse((results / "results.jsonl").read_text("utf-8"), results)
    rows = grid(lines, Plan.load(plan).hash())
    table = summary(rows)
    (out / "demo.md").write_text(table + facts(start), encoding="utf-8")
    print(f"\n{table}{facts(start)}\nplan, pictures and reports: {out}/")
    judge(rows[-1])


def command(line: str) -> None:
    """Run one hfsparse command as the shell would."""
    print(f"\n$ hfsparse {line}", flush=True)
    if code := app(shlex.split(line), prog_name="hfsparse", standalone_mode=False):
        raise SystemExit(code)


def side_by_side(folder: str, plan: Plan) -> None:
    """One needle prompt, answered by the model as it is and under the plan."""
    model, tokenizer = load(folder)
    task = TASKS["niah_single_2"]
    suite = Suite([task], [LENGTH], 1, Prompter(tokenizer, "auto"), 1, (50.0,))
    sample = suite.sample(suite.cases[0])
    dense = answer(model, tokenizer, sample, NEW_TOKENS)
    with hfsparse.patch(model, plan) as handle:
        sparse = answer(model, tokenizer, sample, NEW_TOKENS)
        stats = handle.stats()
    again = answer(model, tokenizer, sample, NEW_TOKENS)
    rows = Table("", "answer", "seconds", title=f"needle in {len(sample.ids)} tokens")
    rows.add_row("hidden", sample.answers[0], "")
    for name, said in (("dense", dense), ("under the plan", sparse), ("after undo", again)):
        rows.add_row(name, said.text.strip(), f"{said.seconds:.1f}")
    Console().print(rows)
    print(str(stats).splitlines()[0])


def grid(lines: list[dict], plan: str) -> list[Cell]:
    """The tasks of the eval's result lines under a plan, by its hash, and all of them as one."""
    rows = cells(lines, {"arm": "sparse", "plan": plan})
    return [*rows, joined(rows)]


def summary(table: list[Cell]) -> str:
    """The closing table, in Markdown."""
    rows = [
        "| task | dense | sparse | pair density | cache share | seconds dense | seconds sparse |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in table:
        right = [
            f"{sum(x['score'] for x in arm):g}/{len(arm)}" for arm in (cell.dense, cell.sparse)
        ]
        shares = [f"{mean(cell.sparse, name):.2f}" for name in ("pair_density", "cache_share")]
        times = [f"{mean(arm, 'seconds'):.1f}" for arm in (cell.dense, cell.sparse)]
        rows.append("| " + " | ".join([cell.task, *right, *shares, *times]) + " |")
    return "\n".join(rows) + "\n"


def judge(whole: Cell) -> None:
    """Exit with an error if the plan kept too much or lost more than one answer."""
    pairs, cache = (mean(whole.sparse, name) for name in ("pair_density", "cache_share"))
    lost = sum(x["score"] for x in whole.dense) - sum(x["score"] for x in whole.sparse)
    if pairs > 0.40 or cache > 0.45 or lost > 1:
        raise SystemExit(
            "the demo promises pair density ≤ 0.40, cache share ≤ 0.45, at most one answer lost: "
            f"got {pairs:.3f}, {cache:.3f} and {lost:g}"
        )


def mean(arm: list[dict], name: str) -> float:
    return sum(line[name] for line in arm) / len(arm)


def facts(start: float) -> str:
    """What and where it was measured."""
    where = describe(torch.device("cpu"))
    versions = ", ".join(f"{k} {where[k]}" for k in ("python", "torch", "transformers", "hfsparse"))
    return (
        f"\nSmolLM2-135M-Instruct, float32, {LENGTH} tokens, {SAMPLES} samples a task. "
        f"{where['machine']}; {versions}. The whole demo took {time.time() - start:.0f} s.\n"
    )


if __name__ == "__main__":
    typer.run(main)
