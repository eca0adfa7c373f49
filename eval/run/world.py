"""What every step of a run is given: its processes, its model, and the results that it fills."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from hfsparse_eval.arms import Arm
from hfsparse_eval.run.results import Results


@dataclass(frozen=True)
class World:
    """This process among those of `accelerate launch`: number `index` of `count`."""

    index: int = 0
    count: int = 1
    state: Any = None  # accelerate's

    def share(self, cases: Sequence) -> Sequence:
        """The cases that this process runs."""
        return cases[self.index :: self.count]

    def wait(self) -> None:
        """Until every process is here."""
        if self.state:
            self.state.wait_for_everyone()

    @contextmanager
    def first_process_first(self) -> Iterator[None]:
        """The others begin when the first has ended its block; all leave together."""
        if self.index:
            self.wait()
        yield
        if not self.index:
            self.wait()
        self.wait()


def join(device: str) -> tuple[World, str]:
    """This process's world, and the device that is its own."""
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    if state.num_processes > 1 and device in ("auto", "cuda"):
        device = str(state.device)
    return World(state.process_index, state.num_processes, state), device


@dataclass(frozen=True)
class Session:
    """A run under way."""

    model: Any
    tokenizer: Any
    results: Results
    arms: Sequence[Arm] = ()  # beside the dense model
    world: World = World()

    def gather(self) -> None:
        """Once every process is here, each knows the results of all."""
        self.world.wait()
        if self.world.index == 0:
            self.results.merge()
        self.world.wait()
        if self.world.index:
            self.results.load()
