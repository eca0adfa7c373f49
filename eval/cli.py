"""hfsparse eval ruler|needle MODEL [--plan plan.yaml] [-o DIR]"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hfsparse.cli import Commands
from hfsparse.loading import UsageError

from .tasks import TASKS, Niah, with_books

app = typer.Typer(
    cls=Commands,
    help="Retrieval tasks, dense beside sparse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
GRID_TASKS = [task.name for task in TASKS.values() if isinstance(task, Niah) and task.needles == 1]


class Chat(str, Enum):
    auto = "auto"
    never = "never"


ModelArg = Annotated[str, typer.Argument(help="A Hugging Face model: folder or hub name.")]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", help="Run a second, sparse arm under this plan.")
]
Lengths = Annotated[str, typer.Option(help="Tokens of prompt and answer, by commas.")]
Samples = Annotated[int, typer.Option(help="Samples for each task and length (and depth).")]
Seed = Annotated[int, typer.Option(help="Of every sample; the same seed gives the same prompts.")]
Output = Annotated[
    Path, typer.Option("-o", "--output", help="Results directory; an unfinished run goes on.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")]
ChatOption = Annotated[Chat, typer.Option(help="Use the tokenizer's chat template if it has one.")]
Cap = Annotated[
    int | None,
    typer.Option("--max-new-tokens", help="Cap answers below RULER's 30 (vt) to 128 tokens."),
]
Squad = Annotated[
    str | None, typer.Option("--squad", help="qa_1: SQuAD v2's dev JSON file, or `datasets`.")
]
HotpotQA = Annotated[
    str | None, typer.Option("--hotpotqa", help="qa_2: HotpotQA's dev file, or `datasets`.")
]
DATA = {"qa_1": "squad", "qa_2": "hotpotqa"}  # tasks that need data: the option that gives it


@app.command()
def ruler(
    model: ModelArg,
    plan: PlanOption = None,
    lengths: Lengths = "4096",
    samples: Samples = 8,
    tasks: Annotated[str | None, typer.Option(help="RULER names, by commas; or all 13.")] = None,
    squad: Squad = None,
    hotpotqa: HotpotQA = None,
    seed: Seed = 0,
    output: Output = Path("eval-ruler"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: ChatOption = Chat.auto,
    max_new_tokens: Cap = None,
) -> None:
    """RULER's tasks: table of scores, dense beside sparse, with intervals.

    qa_1 and qa_2 need SQuAD and HotpotQA; without them qa_1_invented and qa_2_invented are run.
    """
    known, marks = _known(squad, hotpotqa)
    chosen = _tasks(_standard(known) if tasks is None else tasks, known)
    run = Run("ruler", model, plan, lengths, samples, seed, output, max_new_tokens)
    run.go(chosen, (None,), device, dtype, chat.value, marks)


@app.command()
def needle(
    model: ModelArg,
    plan: PlanOption = None,
    lengths: Lengths = "1024,2048,4096",
    depths: Annotated[str, typer.Option(help="Percent of the haystack.")] = "0,25,50,75,100",
    samples: Samples = 2,
    task: Annotated[str, typer.Option(help=f"One of {', '.join(GRID_TASKS)}.")] = "niah_single_2",
    seed: Seed = 0,
    output: Output = Path("eval-needle"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat: ChatOption = Chat.auto,
    max_new_tokens: Cap = None,
) -> None:
    """One needle at each depth and length: table and heat map, dense beside sparse."""
    places = _numbers("depths", depths, float, lambda depth: 0 <= depth <= 100, "0 to 100")
    run = Run("needle", model, plan, lengths, samples, seed, output, max_new_tokens)
    chosen = _tasks(task, {name: TASKS[name] for name in GRID_TASKS})
    if len(chosen) > 1:
        raise UsageError(f"task is {task}: a grid is of one task")
    run.go(chosen, places, device, dtype, chat.value)


class Run:
    """What both commands do: check, load, run, write."""

    def __init__(self, kind, model, plan, lengths, samples, seed, output, cap):
        from .results import writable

        self.kind, self.model, self.seed, self.output, self.cap = kind, model, seed, output, cap
        self.lengths = _numbers("lengths", lengths, int, lambda length: length > 0, "above 0")
        if samples < 1:
            raise UsageError(f"samples is {samples}: give 1 or more")
        if cap is not None and cap < 1:
            raise UsageError(f"max-new-tokens is {cap}: give 1 or more")
        self.samples = samples
        self.plan = _plan(plan)
        writable(output)

    def go(self, tasks, depths, device, dtype, chat, data: dict[str, str] | None = None) -> None:
        import hfsparse
        from hfsparse.fingerprint import weights_mark
        from hfsparse.loading import load
        from hfsparse.plan import ModelId

        from . import heatmap, report, runner, text
        from .results import Results, Settings
        from .samples import Prompter, Suite

        model, tokenizer = load(self.model, device, dtype)
        _check_window(model, self.lengths)
        if self.plan:
            self.plan.check(model)
        settings = Settings(
            kind=self.kind,
            model=self.model,
            fingerprint=ModelId.of(model).fingerprint,
            weights=weights_mark(model),
            version=hfsparse.__version__,
            dtype=str(model.dtype).removeprefix("torch."),
            seed=self.seed,
            chat=chat,
            max_new_tokens=self.cap,
            prose=text.prose_source(),
            **(data or {}),
        )
        prompter = Prompter(tokenizer, chat)
        suite = Suite(tasks, self.lengths, self.samples, prompter, self.seed, depths)
        results = Results(self.output, settings, runner.session(model.device))
        runner.run(model, tokenizer, suite, results, self.plan, self.cap)
        plan = self.plan.hash() if self.plan else None
        path = self.output / "report.md"
        path.write_text(report.write(results.lines, settings, results.sessions, plan), "utf-8")
        typer.echo(path)
        if self.kind == "needle":
            picture = self.output / "heatmap.png"
            heatmap.save(results.lines, plan, f"{self.model}, {tasks[0].name}", picture)
            typer.echo(picture)


def _known(squad: str | None, hotpotqa: str | None) -> tuple[dict, dict[str, str]]:
    """Every task that can be run with this data, and by which data."""
    from . import qa

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


def _tasks(names: str, known: dict) -> list:
    chosen = []
    for name in _split(names):
        if name in DATA and name not in known and f"{name}_invented" in known:
            raise UsageError(
                f"{name} needs its data: give --{DATA[name]} FILE, or take {name}_invented"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UsageError(f"unknown task {name}: did you mean {near[0]}? ({', '.join(known)})")
        chosen.append(known[name])
    if not chosen:
        raise UsageError(f"no task given: give some of {', '.join(known)}")
    return chosen


def _numbers(name: str, given: str, kind: type, fits: Callable, wanted: str) -> list:
    try:
        numbers = [kind(word) for word in _split(given)]
    except ValueError:
        numbers = []
    if not numbers or not all(map(fits, numbers)):
        raise UsageError(f"{name} is {given!r}: give numbers {wanted}, by commas")
    return numbers


def _split(words: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))


def _plan(path: Path | None):
    from hfsparse.plan import Plan

    return Plan.load(path) if path else None


def _check_window(model, lengths: list[int]) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and max(lengths) > window:
        raise UsageError(
            f"length {max(lengths)} is beyond this model's window of {window} tokens: "
            f"give lengths up to {window}"
        )
