"""What a method is given: the model, calibration prompts and budgets, and a place for partial work.

A method is a module of this package with one function, `plan(job) -> Plan`, and a line in METHODS.
`profile()` checks the settings before it, and adds `made` and writes the plan after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfsparse.models.fingerprint import windows
from hfsparse.patcher.figures import Prompts, predict
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.profiler.parts import Parts
from hfsparse.profiler.prompts.calibration import Prompt
from hfsparse.profiler.solve.allocation import Budget

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
