"""Options that commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hfsparse_eval.suites import SUITES


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
    list[Path] | None, typer.Option("--plan", help="Also run under this plan; may be repeated.")
]
Arms = Annotated[
    list[str] | None,
    typer.Option("--arm", help="Also run a peer: kvpress:SnapKV:0.5[:agnostic], modelopt:0.7."),
]
SuiteOption = Annotated[
    str | None, typer.Option("--suite", help=f"Lengths and samples: {', '.join(SUITES)}.")
]
Lengths = Annotated[
    str | None, typer.Option(help="Tokens of prompt and answers, by commas (4096).")
]
Samples = Annotated[int | None, typer.Option(help="Samples of each task at each length (8).")]
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
