"""Processes that share a model's heads: `answers = run(2, work, folder)`, one a rank.

They are forked from one process that has imported what they need, so that a rank costs no imports.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PRELOADED = ["tests.patcher.context_work", "tests.patcher.shared_work"]
TIMEOUT = 300  # seconds


def run(ranks: int, work: Callable[[Path], Any], folder: Path, backend: str = "gloo") -> list[Any]:
    """What `work(folder)` answers on each rank of a group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = [
        context.Process(target=_rank, args=(rank, ranks, work, folder, backend))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT)
    for process in started:
        process.kill()
    found = [_answer(folder, work, rank) for rank in range(ranks)]
    assert all(each.exists() for each in found), f"a rank has no answer after {TIMEOUT} s"
    answers = [torch.load(each, weights_only=False) for each in found]
    for answer in answers:
        assert not isinstance(answer, BaseException), answer
    return answers


def _rank(rank: int, ranks: int, work: Callable, folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}"}
    meet = f"file://{folder}/meet-{work.__name__}"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend, init_method=meet, rank=rank, world_size=ranks)
    try:
        answer = work(folder)
    except BaseException:
        answer = RuntimeError(traceback.format_exc())
    torch.save(answer, _answer(folder, work, rank))
    distributed.destroy_process_group()


def _answer(folder: Path, work: Callable[[Path], Any], rank: int) -> Path:
    return folder / f"answer-{work.__name__}-{rank}.pt"
