"""Options that commands share, and how their values are read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hfsparse.cli.application import PLAN
from hfsparse.errors import UsageError
from hfsparse_eval.arms import PEERS
from hfsparse_eval.tasks import of_suite
from hfsparse_eval.tasks.documents import WITH_DATA, name_stand_in


@dataclass(frozen=True)
class Size:
    samples: int  # of each task at each length
    lengths: tuple[int, ...]
    decided: bool = False  # whether fewer samples will do, if they decide

    @property
    def most(self) -> int | None:
        """The samples of each task at each length of a run that may end before; else None."""
        return self.samples if self.decided else None


SUITES = {
    "smoke": Size(4, (1024, 2048)),
    "quick": Size(20, (4096, 16384)),
    "standard": Size(100, (4096, 8192, 16384, 32768)),
    "full": Size(500, (4096, 8192, 16384, 32768, 65536, 131072)),
}
USUAL = Size(8, (4096,))
ROUND = 8  # samples of each task at each length between two looks at the verdicts, or --batch
MOST = 500  # samples of a run that ends when it is decided, where neither suite nor flag say


class Chat(str, Enum):
    auto = "auto"
    never = "never"


class Metric(str, Enum):
    part = "part"
    all = "all"


class Feed(str, Enum):
    own = "own"
    gold = "gold"


ModelArg = Annotated[str, typer.Argument(help="A Hugging Face model: folder or hub name.")]
Plans = Annotated[
    list[str] | None,
    typer.Option("--plan", metavar="PLAN", help=f"Also run under a plan: {PLAN}; may be repeated."),
]
Arms = Annotated[
    list[str] | None,
    typer.Option(
        "--arm", help=f"Also run a peer: {', '.join(peer.examples for peer in PEERS.values())}."
    ),
]
SuiteOption = Annotated[
    str | None, typer.Option("--suite", help=f"Lengths and samples: {', '.join(SUITES)}.")
]
Lengths = Annotated[
    str | None, typer.Option(help="Tokens of prompt and answers, by commas (4096).")
]
Samples = Annotated[int | None, typer.Option(help="Samples of each task at each length (8).")]
UntilOption = Annotated[
    str | None,
    typer.Option(
        metavar="decided",
        help=f"Ask in rounds of {ROUND} samples of each task at each length, until each verdict is "
        f"certain or --samples ({MOST}) are asked.",
    ),
]
Batch = Annotated[int, typer.Option(help="Samples of one task and length that run together.")]
Seed = Annotated[int, typer.Option(help="Of every sample; the same seed gives the same prompts.")]
Output = Annotated[
    Path, typer.Option("-o", "--output", help="Results directory; an unfinished run goes on.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")]
ChatOption = Annotated[Chat, typer.Option(help="Use the tokenizer's chat template if it has one.")]
Cap = Annotated[
    int | None,
    typer.Option("--max-new-tokens", help="Of an answer, where a task asks for more."),
]
Squad = Annotated[
    str | None, typer.Option("--squad", help="qa_1: SQuAD v2's dev JSON file, or `datasets`.")
]
HotpotQA = Annotated[
    str | None, typer.Option("--hotpotqa", help="qa_2: HotpotQA's dev file, or `datasets`.")
]


def read_size(
    suite: str | None,
    lengths: str | None,
    samples: int | None,
    usual: Size = USUAL,
    until: str | None = None,
) -> Size:
    """What a suite's name stands for, or what is usual; a flag of its own goes before both.

    UsageError where a run that goes on `until` it is decided may not ask a whole round.
    """
    if until not in (None, "decided"):
        raise UsageError(f"unknown --until {until}: give decided, or leave it out")
    if until:
        usual = replace(usual, samples=MOST)
    if suite and suite not in SUITES:
        near = difflib.get_close_matches(suite, SUITES, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown suite {suite}: did you mean {near}? ({', '.join(SUITES)})")
    size = SUITES[suite] if suite else usual
    if lengths is not None:
        numbers = read_numbers("lengths", lengths, int, lambda length: length > 0, "above 0")
        size = replace(size, lengths=tuple(numbers))
    if samples is not None:
        size = replace(size, samples=check_positive("samples", samples))
    if until and size.samples < ROUND:
        raise UsageError(
            f"samples is {size.samples}: a round of --until decided asks {ROUND} of each task at "
            f"each length, give {ROUND} or more"
        )
    return replace(size, decided=until is not None)


def check_positive(name: str, number: int) -> int:
    if number < 1:
        raise UsageError(f"{name} is {number}: give 1 or more")
    return number


def read_numbers(name: str, given: str, kind: type, fits: Callable, wanted: str) -> list:
    try:
        numbers = [kind(word) for word in _split(given)]
    except ValueError:
        numbers = []
    if not numbers or not all(map(fits, numbers)):
        raise UsageError(f"{name} is {given!r}: give numbers {wanted}, by commas")
    return numbers


def names_by_default(suite: str) -> str:
    """The names, by commas, of the tasks that a command runs if none are named."""
    return ",".join(name for name, task in of_suite(suite).items() if task.default)


def pick_tasks(names: str | None, known: Mapping) -> list:
    """The tasks of these names, or those that run by default."""
    if names is None:
        # The invented questions are run only where the real ones are missing.
        replaced = {name_stand_in(name) for name in WITH_DATA if name in known}
        return [task for task in known.values() if task.default and task.name not in replaced]
    chosen = []
    for name in _split(names):
        stand_in = name_stand_in(name)
        if name in WITH_DATA and name not in known and stand_in in known:
            raise UsageError(
                f"{name} needs its data: give --{WITH_DATA[name]} FILE, or take {stand_in}"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UsageError(f"unknown task {name}: did you mean {near[0]}? ({', '.join(known)})")
        chosen.append(known[name])
    if not chosen:
        raise UsageError(f"no task given: give some of {', '.join(known)}")
    return chosen


def check_books_asked(books: Iterable[str], chosen: Iterable) -> None:
    """UsageError for books, by the options that give them, of which no task asks."""
    names = {task.name for task in chosen}
    for name, option in WITH_DATA.items():
        if option in books and name not in names:
            raise UsageError(
                f"--{option} is the data of {name}, which --tasks leaves out: name it there, or "
                "leave the data out"
            )


def _split(words: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
