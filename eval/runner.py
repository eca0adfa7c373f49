"""Run a suite on a model, dense and under a plan, on identical token ids."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import hfsparse

from .generate import answer
from .results import Results
from .samples import Case, Sample, Suite
from .tasks import score

MEASURED = ("pair_density", "block_density", "decode_share", "cache_share")


def run(
    model, tokenizer, suite: Suite, results: Results, plan=None, cap: int | None = None
) -> None:
    """Fill `results` with what it lacks: a length at a time, dense first, then under `plan`."""
    rounds = [
        (arm, todo)
        for length in dict.fromkeys(case.length for case in suite.cases)
        for arm in ((None, plan) if plan else (None,))
        if (todo := list(_missing(suite.cases, length, arm, results)))
    ]
    with _progress() as progress:
        total = sum(case.length for _, todo in rounds for case in todo)
        bar = progress.add_task("", total=total, left=sum(len(todo) for _, todo in rounds))
        for arm, todo in rounds:
            with hfsparse.patch(model, arm) if arm else nullcontext() as handle:
                for case in todo:
                    progress.update(bar, description=f"{case.id} {_name(arm)}")
                    sample = suite.sample(case)
                    results.append(_measure(model, tokenizer, sample, results, arm, handle, cap))
                    progress.update(bar, advance=case.length)


def _measure(model, tokenizer, sample: Sample, results, plan, handle, cap) -> dict:
    if handle:
        handle.reset_stats()
    said = answer(model, tokenizer, sample, cap)
    stats = handle.stats() if handle else None
    return {
        "id": sample.id,
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "arm": _name(plan),
        "plan": plan.hash() if plan else None,
        "model": results.settings.fingerprint,
        "score": score(said.text, sample.answers, sample.metric),
        "answers": sample.answers,
        "output": said.text,
        "gold": sample.gold,
        "metric": sample.metric,
        "real": sample.real,
        "prompt_tokens": len(sample.ids),
        "new_tokens": said.new_tokens,
        "seconds": said.seconds,
        "first_token_seconds": said.first_token_seconds,
        **{name: _number(stats, name) for name in MEASURED},
        "device": device_name(model.device),
    }


def _missing(cases: Iterable[Case], length: int, plan, results: Results) -> Iterable[Case]:
    rest = (_name(plan), plan.hash() if plan else None, results.settings.fingerprint)
    ours = (case for case in cases if case.length == length)
    return (case for case in ours if (case.id, *rest) not in results.done)


def _number(stats, name: str) -> float | None:
    """What was measured; None where nothing ran, as NaN is no JSON."""
    value = getattr(stats, name, math.nan)
    return None if math.isnan(value) else round(value, 6)


def _name(plan) -> str:
    return "sparse" if plan else "dense"


def _progress() -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, threads: {torch.get_num_threads()}"


def session(device: torch.device) -> dict[str, str]:
    """The machine and the versions behind results."""
    return {
        "machine": f"{device_name(device)}, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "hfsparse": hfsparse.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
