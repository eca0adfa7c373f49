"""hfsparse eval ruler|needle|turns|custom|decode|ppl|recall MODEL [--plan plan.yaml …]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfsparse.cli.application import PLAN, Commands
from hfsparse.cli.profile import BeyondWindow
from hfsparse.errors import UsageError
from hfsparse_eval.command import ask, begin, check_request, finish, load_model
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
    Size,
    Squad,
    SuiteOption,
    UntilOption,
    check_books_asked,
    check_positive,
    names_by_default,
    pick_tasks,
    read_numbers,
    read_size,
)
from hfsparse_eval.tasks import documents, of_suite, with_books
from hfsparse_eval.tasks.conversations import describe_turns
from hfsparse_eval.tasks.needles import GRID, hide

app = typer.Typer(
    cls=Commands,
    help="What a plan costs, judged in pairs: dense beside sparse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PLACED = {name: task for name, task in of_suite("ruler").items() if task.placed}


@app.command()
def ruler(
    model: ModelArg,
    plan: Plans = None,
    arm: Arms = None,
    suite: SuiteOption = None,
    lengths: Lengths = None,
    samples: Samples = None,
    until: UntilOption = None,
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
    books, marks = documents.read_books(squad, hotpotqa)
    chosen = pick_tasks(tasks, with_books(**books))
    check_books_asked(books, chosen)
    size = read_size(suite, lengths, samples, until=until)
    request = check_request(
        "ruler", model, output, plan, arm, seed, chat.value, max_new_tokens, batch, size.most
    )
    loaded = load_model(request, device, dtype, beyond_window)
    made = loaded.suite(chosen, size)
    ask(loaded, made, **marks)


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
    until: UntilOption = None,
    task: Annotated[str, typer.Option(help=f"One of {', '.join(GRID)}.")] = "niah_single_2",
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
    places = read_numbers("depths", depths, float, lambda depth: 0 <= depth <= 100, "0 to 100")
    size = read_size(suite, lengths, samples, Size(2, (1024, 2048, 4096)), until)
    request = check_request(
        "needle", model, output, plan, arm, seed, chat.value, max_new_tokens, batch, size.most
    )
    chosen = pick_tasks(task, GRID)
    if len(chosen) > 1:
        raise UsageError(f"task is {task}: a grid is of one task")
    check_positive("needles", needles)
    hidden, marks = hide(chosen[0], needles, haystack)
    loaded = load_model(request, device, dtype, beyond_window)
    made = loaded.suite([hidden], size, places)
    ask(loaded, made, grid=hidden.name, **marks)


@app.command()
def turns(
    model: ModelArg,
    plan: Plans = None,
    suite: SuiteOption = None,
    lengths: Lengths = None,
    samples: Samples = None,
    until: UntilOption = None,
    tasks: Annotated[str, typer.Option(help="By commas.")] = names_by_default("turns"),
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
    chosen = pick_tasks(tasks, of_suite("turns"))
    size = read_size(suite, lengths, samples, until=until)
    request = check_request(
        "turns",
        model,
        output,
        plan,
        seed=seed,
        chat=chat.value,
        cap=max_new_tokens,
        most=size.most,
    )
    rules = {"gold": answers is Feed.gold, "known": known}
    loaded = load_model(request, device, dtype, beyond_window)
    made = loaded.suite(chosen, size, **rules)
    ask(loaded, made, turns=describe_turns(**rules))


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
    from hfsparse_eval.run.samples import OwnSuite
    from hfsparse_eval.tasks import own_questions

    questions, mark = own_questions.read(data, metric=metric.value, new_tokens=max_new_tokens)
    asked = any(question.draft.asks for question in questions)
    if asked and (arm or batch > 1):
        raise UsageError("turns go on over a cache of their own: leave out --arm and --batch")
    if answers is Feed.gold and not asked:
        raise UsageError(f"--answers gold is of turns, and {data} has none: leave it out")
    if any(name.endswith(":agnostic") for name in arm or ()):
        raise UsageError("a prompt of your own is pressed as a whole: leave out :agnostic")
    request = check_request(
        "custom", model, output, plan, arm, chat=chat.value, cap=max_new_tokens, batch=batch
    )
    rules = {"gold": answers is Feed.gold, "known": True}
    loaded = load_model(request, device, dtype, beyond_window)
    made = OwnSuite(questions, loaded.prompter(**rules), loaded.window)
    told = describe_turns(**rules) if asked else None
    ask(loaded, made, data=mark, metric=metric.value, turns=told)


@app.command()
def decode(
    model: ModelArg,
    plan: Plans = None,
    arm: Arms = None,
    suite: SuiteOption = None,
    lengths: Lengths = None,
    samples: Samples = None,
    until: UntilOption = None,
    tasks: Annotated[str, typer.Option(help="By commas.")] = names_by_default("decode"),
    seed: Seed = 0,
    output: Output = Path("eval-decode"),
    beyond_window: BeyondWindow = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: ChatOption = Chat.auto,
    max_new_tokens: Cap = None,
) -> None:
    """Long answers: list, sort, add up, copy; the score, and agreement with dense by position."""
    chosen = pick_tasks(tasks, of_suite("decode"))
    size = read_size(suite, lengths, samples, until=until)
    request = check_request(
        "decode", model, output, plan, arm, seed, chat.value, max_new_tokens, most=size.most
    )
    loaded = load_model(request, device, dtype, beyond_window)
    made = loaded.suite(chosen, size)
    ask(loaded, made)


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
    from hfsparse_eval.probes import perplexity

    content, mark = perplexity.source(data)
    size = read_size(suite, lengths, samples)
    step = None if stride is None else check_positive("stride", stride)
    request = check_request("ppl", model, output, plan, chat="never")
    loaded = load_model(request, device, dtype, beyond_window)
    loaded.check_lengths(size)
    windows = [
        window
        for length in size.lengths
        for window in perplexity.windows(loaded.tokenizer, content, length, size.samples, step)
    ]
    session = begin(loaded, data=mark, stride=step)
    perplexity.run(session, windows)
    finish(session)


@app.command()
def recall(
    model: ModelArg,
    plan: Annotated[
        list[str], typer.Option("--plan", metavar="PLAN", help=f"A plan: {PLAN}; may be repeated.")
    ],
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
    from hfsparse_eval.probes import recall as probe

    chosen = pick_tasks(tasks, PLACED)
    size = read_size(suite, lengths, samples)
    request = check_request("recall", model, output, plan, seed=seed, chat=chat.value)
    probe.check(request.arms)
    loaded = load_model(request, device, dtype, beyond_window)
    made = loaded.suite(chosen, size)
    session = begin(loaded)
    probe.run(session, made)
    finish(session)
