"""How far long work has come: a bar on a terminal, elsewhere (logs, pipes) a line a minute."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass
class Clock:
    """When a log last got a line, or when work began; bars that follow one another share it."""

    last: float = field(default_factory=monotonic)


class Bar(Progress):
    """A rich progress bar on standard error, which also speaks where no bar can be drawn."""

    minute = 60.0  # seconds between two lines of a log

    def __init__(self, console: Console | None = None, clock: Clock | None = None):
        console = console or Console(stderr=True)
        times = TimeElapsedColumn(), TimeRemainingColumn()
        words = TextColumn("{task.description}", markup=False)  # labels hold brackets
        super().__init__(BarColumn(), TaskProgressColumn(), *times, words, console=console)
        self._drawn = console.is_terminal or console.is_jupyter
        self._clock = clock or Clock()
        self._stopped = threading.Event()
        self._log = threading.Thread(target=self._speak, daemon=True)

    def start(self) -> None:
        super().start() if self._drawn else self._log.start()

    def stop(self) -> None:
        if self._drawn:
            return super().stop()
        self._stopped.set()
        self._log.join()

    def _speak(self) -> None:
        while not self._stopped.wait(max(self._clock.last + self.minute - monotonic(), 0.01)):
            for task in self.tasks:
                self._clock.last = monotonic()
                self.console.print(_describe(task), markup=False, highlight=False, soft_wrap=True)


def _describe(task: Task) -> str:
    left = task.time_remaining
    rest = "" if left is None else f", about {timedelta(seconds=int(left))} left"
    elapsed = timedelta(seconds=int(task.elapsed or 0))
    return f"{task.percentage:.0f} % after {elapsed}{rest}: {task.description}"
