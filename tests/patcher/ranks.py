"""Processes that share a model's heads, on a CPU: `answers = run(2, work, folder)`, one a rank.

They are forked from one process that has imported what they need, so that a rank costs no imports.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PRELOADED = ["tests.patcher.shared_work"]
TIMEOUT = 300  # seconds


def run(ranks: int, work: Callable[[Path], Any], folder: Path) -> list[Any]:
    """What `work(folder)` answers on each rank of a gloo group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = [
        context.Process(target=_rank, args=(rank, ranks, work, folder)) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT)
    left = [process for process in started if process.exitcode is None]
    for process in left:
        process.kill()
    assert not left, f"{len(left)} of {ranks} ranks still waited after {TIMEOUT} s"
    assert all(process.exitcode == 0 for process in started), "a rank failed: see its traceback"
    return [torch.load(_answer(folder, ranks, rank), weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, work: Callable[[Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{ranks}-{work.__name__}"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    torch.save(work(folder), _answer(folder, ranks, rank))
    distributed.destroy_process_group()


def _answer(folder: Path, ranks: int, rank: int) -> Path:
    return folder / f"answer-{ranks}-{rank}.pt"
