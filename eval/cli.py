"""hfsparse eval ruler|needle|turns|custom|decode|ppl|recall MODEL [--plan plan.yaml …]"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hfsparse.cli.application import Commands
from hfsparse.cli.profile import BeyondWindow
from hfsparse.errors import UsageError
from hfsparse_eval.command import DATA, Run, check_window, listed, pick, positive, sized
from hfsparse_eval.options import (
    Arms,
    Batch,
    Cap,
    Chat,
    ChatOption,
    Device,
    Dtype,
    Feed,
    HotpotQA,
    Lengths,
    Metric,
    ModelArg,
    Output,
    Plans,
    Samples,
    Seed,
    Squad,
    SuiteOption,
)
from hfsparse_eval.suites import Size
from hfsparse_eval.tasks import TASKS, Niah, with_books
from hfsparse_eval.tasks.conversations import TALKS
from hfsparse_eval.tasks.long_answers import DECODES

app = typer.Typer(
    cls=Commands,
    help="What a plan costs, judged in pairs: dense beside sparse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
USUAL = Size(8, (4096,))
MOST_NEEDLES = 100
GRID_TASKS = [task.name for task in TASKS.values() if isinstance(task, Niah) and task.needles == 1]
PLACED = [name for name in TASKS if name not in ("cwe", "fwe")]  # answers that stand in a place


@app.command()
def ruler(
    model: ModelArg,
    plan: Plans = None,
    arm: Arms = None,
    suite: SuiteOption = None,
    lengths: Lengths = None,
    samples: Samples = None,
    tasks: Annotated[str | None, typer.Option(help="RULER names, by commas; or all 13.")] = None,
    squad: Squad = None,
    hotpotqa: HotpotQA = None,
    seed: Seed = 0,
    output: Output = Path("eval-ruler"),
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: ChatOption = Chat.auto,
    max_new_tokens: Cap = None,
    batch: Batch = 1,
) -> None:
    """RULER's tasks: table of scores, dense beside sparse, with intervals.

    qa_1 and qa_2 need SQuAD and HotpotQA; without them qa_1_invented and qa_2_invented are run.
    """
    known, marks = _known(squad, hotpotqa)
    chosen = pick(_standard(known) if tasks is None else tasks, known)
    size = sized(suite, lengths, samples, USUAL)
    run = Run("ruler", model, plan, size, seed, output, max_new_tokens, arm, batch)
    run.go(run.suite(chosen), device, dtype, beyond_window, chat.value, **marks)


@app.command()
def needle(
    model: ModelArg,
    plan: Plans = None,
    arm: Arms = None,
    suite: SuiteOption = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of prompt and answer, by commas (1024,2048,4096).")
    ] = None,
    depths: Annotated[str, typer.Option(help="Percent of the haystack.")] = "0,25,50,75,100",
    samples: Annotated[int | None, typer.Option(help="Samples of each cell (2).")] = None,
    task: Annotated[str, typer.Option(help=f"One of {', '.join(GRID_TASKS)}.")] = "niah_single_2",
    needles: Annotated[
        int, typer.Option(help="Of a sample, all asked for: one at the depth, the rest after it.")
    ] = 1,
    haystack: Annotated[
        Path | None, typer.Option(help="A text file of your own, in place of the prose.")
    ] = None,
    seed: Seed = 0,
    output: Output = Path("eval-needle"),
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: ChatOption = Chat.auto,
    max_new_tokens: Cap = None,
    batch: Batch = 1,
) -> None:
    """Needles at each depth and length: table and heat map, dense beside sparse."""
    places = listed("depths", depths, float, lambda depth: 0 <= depth <= 100, "0 to 100")
    size = sized(suite, lengths, samples, Size(2, (1024, 2048, 4096)))
    run = Run("needle", model, plan, size, seed, output, max_new_tokens, arm, batch)
    chosen = pick(task, {name: TASKS[name] for name in GRID_TASKS})
    if len(chosen) > 1:
        raise UsageError(f"task is {task}: a grid is of one task")
    if positive("needles", needles) > MOST_NEEDLES:
        raise UsageError(f"needles is {needles}: give up to {MOST_NEEDLES}")
    hidden, marks = _hidden(chosen[0], needles, haystack)
    run.go(run.suite([hidden], places), device, dtype, beyond_window, chat.value, **marks)


@app.command()
def turns(
    model: ModelArg,
    plan: Plans = None,
    suite: SuiteOption = None,
    lengths: Lengths = None,
    samples: Samples = None,
    tasks: Annotated[str, typer.Option(help="By commas.")] = ",".join(TALKS),
    answers: Annotated[
        Feed, typer.Option(help="What a turn leaves for the next: the own answer or the right one.")
    ] = Feed.own,
    known: Annotated[
        bool, typer.Option("--known", help="Read the text together with the first question.")
    ] = False,
    seed: Seed = 0,
    output: Output = Path("eval-turns"),
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: ChatOption = Chat.auto,
    max_new_tokens: Cap = None,
) -> None:
    """One text and five questions in turn over one KV cache: a score for each turn.

    The text is read before any question is known.
    """
    from hfsparse_eval.tasks.conversations import rules

    chosen = pick(tasks, TALKS)
    size = sized(suite, lengths, samples, USUAL)
    run = Run("turns", model, plan, size, seed, output, max_new_tokens)
    run.gold, run.known = answers is Feed.gold, known
    told = rules(run.gold, run.known)
    run.go(run.suite(chosen), device, dtype, beyond_window, chat.value, turns=told)


@app.command()
def custom(
    model: ModelArg,
    data: Annotated[Path, typer.Option(help="JSONL of prompt, answers; perhaps id and turns.")],
    plan: Plans = None,
    arm: Arms = None,
    metric: Annotated[Metric, typer.Option(help="Whether one answer is enough.")] = Metric.part,
    answers: Annotated[Feed, typer.Option(help="What a turn leaves for the next.")] = Feed.own,
    output: Output = Path("eval-custom"),
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: ChatOption = Chat.auto,
    max_new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 64,
    batch: Batch = 1,
) -> None:
    """Your own questions: the paired change, and every answer that a plan flips.

    An answer is right where it contains one of the right ones (all of them: --metric all).
    """
    from hfsparse_eval.tasks.conversations import rules
    from hfsparse_eval.tasks.own_questions import Questions, read

    items, mark = read(data)
    asked = any(item.draft.asks for item in items)
    if asked and (arm or batch > 1):
        raise UsageError("turns go on over a cache of their own: leave out --arm and --batch")
    if any(name.endswith(":agnostic") for name in arm or ()):
        raise UsageError("a prompt of your own is pressed as a whole: leave out :agnostic")
    run = Run("custom", model, plan, Size(1, ()), 0, output, max_new_tokens, arm, batch)
    run.gold, run.known = answers is Feed.gold, True
    told = rules(run.gold, run.known) if asked else None

    def made(prompter, window):
        return Questions(items, prompter, window, max_new_tokens, metric.value)

    run.go(
        made, device, dtype, beyond_window, chat.value, data=mark, metric=metric.value, turns=told
    )


@app.command()
def decode(
    model: ModelArg,
    plan: Plans = None,
    arm: Arms = None,
    suite: SuiteOption = None,
    lengths: Lengths = None,
    samples: Samples = None,
    tasks: Annotated[str, typer.Option(help="By commas.")] = ",".join(DECODES),
    seed: Seed = 0,
    output: Output = Path("eval-decode"),
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: ChatOption = Chat.auto,
    max_new_tokens: Cap = None,
) -> None:
    """Long answers: list, sort, add up, copy; the score, and agreement with dense by position."""
    chosen = pick(tasks, DECODES)
    size = sized(suite, lengths, samples, USUAL)
    run = Run("decode", model, plan, size, seed, output, max_new_tokens, arm)
    run.go(run.suite(chosen), device, dtype, beyond_window, chat.value)


@app.command()
def ppl(
    model: ModelArg,
    plan: Plans = None,
    data: Annotated[Path | None, typer.Option(help="A text file; else prose of Python's.")] = None,
    suite: SuiteOption = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of a window, by commas (4096).")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Windows of each length, at most (8).")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from a window to the next; else side by side.")
    ] = None,
    output: Output = Path("eval-ppl"),
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Perplexity, and the divergence of the next token's distribution from dense, by position."""
    from hfsparse_eval.probes import perplexity as judge

    content, mark = judge.source(data)
    size = sized(suite, lengths, samples, USUAL)
    step = None if stride is None else positive("stride", stride)
    run = Run("ppl", model, plan, size, 0, output, None)

    def made(prompter, window):
        check_window(window, size.lengths)
        return [
            case
            for length in size.lengths
            for case in judge.windows(prompter.tokenizer, content, length, size.samples, step)
        ]

    def measured(model, tokenizer, cases, results, share):
        judge.run(model, cases, results, run.arms, share)

    run.go(made, device, dtype, beyond_window, "never", measured, data=mark, stride=step)


@app.command()
def recall(
    model: ModelArg,
    plan: Annotated[list[Path], typer.Option("--plan", help="A plan; may be repeated.")],
    suite: SuiteOption = None,
    lengths: Lengths = None,
    samples: Samples = None,
    tasks: Annotated[
        str, typer.Option(help=f"By commas, of {', '.join(PLACED)}.")
    ] = "niah_single_2,niah_multikey_1",
    seed: Seed = 0,
    output: Output = Path("eval-recall"),
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: ChatOption = Chat.auto,
) -> None:
    """Which heads lose the needle under a plan, and which of its words did it."""
    from hfsparse_eval.probes import recall as judge

    chosen = pick(tasks, {name: TASKS[name] for name in PLACED})
    size = sized(suite, lengths, samples, USUAL)
    run = Run("recall", model, plan, size, seed, output, None)

    def measured(model, tokenizer, suite, results, share):
        judge.run(model, tokenizer, suite, results, run.arms, share)

    run.go(run.suite(chosen), device, dtype, beyond_window, chat.value, measured)


def _hidden(task: Niah, needles: int, haystack: Path | None) -> tuple[Niah, dict[str, str]]:
    """The task with so many needles, in a haystack of the user's own, and what names that."""
    from hfsparse_eval.tasks.haystack import own

    if needles > 1:
        task = replace(task, name=f"{task.name}_x{needles}", keys=needles, queries=needles)
    if haystack is None:
        return task, {}
    if task.haystack != "prose":
        prose = [name for name in GRID_TASKS if TASKS[name].haystack == "prose"]
        raise UsageError(
            f"{task.name} makes its own haystack: --haystack goes with {', '.join(prose)}"
        )
    sentences, mark = own(haystack)
    return replace(task, own=sentences), {"prose": mark}


def _known(squad: str | None, hotpotqa: str | None) -> tuple[dict, dict[str, str]]:
    """Every task that can be run with this data, and by which data."""
    from hfsparse_eval.tasks import documents as qa

    books, marks = {}, {}
    if squad is not None:
        books["squad"], marks["squad"] = qa.squad(squad)
    if hotpotqa is not None:
        books["hotpotqa"], marks["hotpotqa"] = qa.hotpotqa(hotpotqa)
    return with_books(**books), marks


def _standard(known: dict) -> str:
    """RULER's thirteen: the invented questions only where the real ones are missing."""
    replaced = {f"{name}_invented" for name in DATA if name in known}
    return ",".join(name for name in known if name not in replaced)
