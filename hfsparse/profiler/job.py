"""What a method is given: the model, calibration prompts and budgets, and a place for partial work.

A method is a module of this package with one function, `plan(job) -> Plan`, and a line in METHODS.
`profile()` checks the settings before it, and adds `made` and writes the plan after it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfsparse.figures import Prompts, predict
from hfsparse.fingerprint import windows
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.profiler.allocate import Budget
from hfsparse.profiler.prompts import Prompt
from hfsparse.progress import Bar, Clock
from hfsparse.reading import local

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Job:
    """One call of `profile()`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: dict[int, list[Prompt]]  # by length in tokens, ascending
    budget: Budget
    parts: Parts
    progress: Callable[[Iterable[tuple[str, object]]], Iterator]  # of (label, item): each item
    seed: int = 0
    proxy: str | None = None  # `duo`: what ranks heads in place of training
    # Set by a method that can tell what any choice of its words does, by length: in prompts, and
    # in all, as a plan says it under `expected`.
    prompted: Callable[[tuple[Layer, ...]], dict[int, Prompts]] | None = None
    expect: Callable[[tuple[Layer, ...]], dict[int, dict[str, float]]] | None = None
    # Likewise, by one that can choose anew, without measuring: the plan of another budget, or None
    # where there is none.
    choose: Callable[[Budget], Plan | None] | None = None
    # Likewise, by one that can tell what its plan loses, by layer and kv head `[layers, kv heads]`.
    suspects: np.ndarray | None = None
    draw: Callable[[], Figure] | None = None  # likewise, by one that can draw `curves`
    held: dict[int, list[Prompt]] = field(default_factory=dict)  # by length; not calibrated on

    @property
    def free(self) -> np.ndarray:
        """Which layers `[layers]` have no window of their own: their heads may be sparse."""
        return np.array([window is None for window in windows(self.model)])

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values `[free layers, ...]` as `[layers, ...]`, 0 in those with a window of their own."""
        every = np.zeros((len(self.free), *values.shape[1:]))
        every[self.free] = values
        return every

    def tell(
        self,
        patterns: dict[str, Any],
        prompted: Callable[[tuple[Layer, ...]], dict[int, Prompts]],
    ) -> None:
        """Set what tells of choices of these words what they do; `recall` is of free heads."""

        def expect(layers: tuple[Layer, ...]) -> dict[int, dict[str, float]]:
            plan = Plan(ModelId.of(self.model), patterns, layers, self.below)
            told = {}
            for n, each in prompted(layers).items():
                told[n] = predict(self.model.config, plan, n, each, self.model.device).figures()
                if each.recall is not None:
                    told[n]["recall"] = round(float(each.recall[self.free].mean()), 4)
            return told

        self.prompted, self.expect = prompted, expect

    @property
    def below(self) -> Below:
        """Rows so short that none like them were looked at stay full."""
        floor = min(self.prompts) // 2
        return Below(floor, floor, floor)


def mark(*given) -> str:
    """Names a part after what it was made from."""
    seen = hashlib.sha256()
    for each in given:
        seen.update(each.tobytes() if isinstance(each, np.ndarray) else repr(each).encode())
    return seen.hexdigest()[:12]


class Parts:
    """Arrays made so far, in a folder beside the plan until it is written, for one setting.

    Without a plan file (`out` None) nothing is kept.
    """

    def __init__(self, out: str | Path | None, settings: str):
        self.folder = None if out is None else local(f"{out}.parts")
        if self.folder is None:
            return
        mark = self.folder / "settings.json"
        if mark.is_file() and mark.read_text(encoding="utf-8") == settings:
            return
        self.remove()
        self.folder.mkdir(parents=True)
        mark.write_text(settings, encoding="utf-8")

    def get(
        self, key: str | int, compute: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """What an earlier run computed under this key (a file name), or what `compute` answers."""
        if self.folder is None:
            return compute()
        file = self.folder / f"{key}.npz"
        if not self._whole(file):
            draft = file.with_suffix(".draft.npz")
            np.savez(draft, **compute())
            draft.replace(file)
        with np.load(file) as saved:
            return dict(saved)

    def _whole(self, file: Path) -> bool:
        """Whether an earlier run wrote this file and it can be read."""
        try:
            with file.open("rb") as opened, np.load(opened) as saved:
                return bool(dict(saved))
        except (OSError, ValueError, EOFError, BadZipFile):
            return False

    def remove(self) -> None:
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)


def silent(pairs: Iterable[tuple[str, object]]) -> Iterator:
    """Each item, without a bar."""
    for _, item in pairs:
        yield item


def bar(clock: Clock, pairs: Iterable[tuple[str, object]]) -> Iterator:
    """Each item, with a progress bar that shows its label; the bars of one job share a clock."""
    if not (pairs := list(pairs)):
        return  # all is known
    with Bar(clock=clock) as shown:
        task = shown.add_task(pairs[0][0], total=len(pairs))
        for label, item in pairs:
            shown.update(task, description=label)
            yield item
            shown.advance(task)
