"""What a method is given, and what it returns.

A method reads a `Job`: the model, calibration prompts and budgets, and a place for partial work.
It returns what it has `Found`. `run` checks the settings before it, and adds `made` and writes the
plan after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfsparse.models.layers import LayerShape, layer_shapes
from hfsparse.patcher.figures import Prompts, predict
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.plan.files import DataFile
from hfsparse.profiler.parts import Parts
from hfsparse.profiler.prompts.calibration import Prompt
from hfsparse.profiler.settings import Settings
from hfsparse.profiler.solve.allocation import Budget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Layers: TypeAlias = tuple[Layer, ...]


@dataclass(frozen=True)
class Job:
    """One call of `profile()`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: dict[int, list[Prompt]]  # by length in tokens, ascending
    budget: Budget  # that of the settings, or the part of it that a method is to keep
    parts: Parts
    progress: Callable[[Iterable[tuple[str, object]]], Iterator]  # of (label, item): each item
    settings: Settings = field(default_factory=Settings)
    held: dict[int, list[Prompt]] = field(default_factory=dict)  # by length; not calibrated on
    together: bool = False  # whether the method chooses for layers that share keys, together

    @property
    def free(self) -> np.ndarray:
        """Which layers `[layers]` may be sparse: with attention, no window of their own and, where
        the method doesn't choose for these together, keys that are no other layer's, too."""
        return np.array([shape.may_be_sparse(self.together) for shape in layer_shapes(self.model)])

    @property
    def producers(self) -> list[int]:
        """Of each free layer the one among them that keeps what it reads, mostly itself."""
        shapes, layers = layer_shapes(self.model), np.flatnonzero(self.free).tolist()
        read = (shapes[at].producer for at in layers)
        return [layers.index(at if it is None else it) for at, it in zip(layers, read, strict=True)]

    @property
    def shape(self) -> LayerShape:
        """That of these layers."""
        return layer_shapes(self.model)[int(self.free.argmax())]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values `[free layers, ...]` as `[layers, ...]`, 0 in the others."""
        every = np.zeros((len(self.free), *values.shape[1:]))
        every[self.free] = values
        return every

    def fill(self, taken: Iterable[Layer]) -> Layers:
        """The layers of a plan: those taken for the free ones, in order, and full in the others."""
        rest, every = iter(taken), Plan.full(ModelId.of(self.model)).layers
        return tuple(
            next(rest) if free else full for free, full in zip(self.free, every, strict=True)
        )

    @property
    def cache_length(self) -> int:
        """Tokens in a row at which the budget of cache counts."""
        return self.settings.at or max(self.prompts)

    @property
    def below(self) -> Below:
        """Rows shorter than half of the shortest prompt stay full: none like them was measured."""
        floor = min(self.prompts) // 2
        return Below(floor, floor, floor)


@dataclass(frozen=True)
class Forecast:
    """What any choice of a method's words does, by length in tokens."""

    job: Job
    patterns: dict[str, Any]  # by word
    prompts: Callable[[Layers], dict[int, Prompts]]  # what a choice does in prompts
    data: dict[str, DataFile] = field(default_factory=dict)  # what selectors among them read

    def __call__(self, layers: Layers) -> dict[int, dict[str, float]]:
        """What a plan of these layers says under `expected`; `recall` is of free heads."""
        job, found = self.job, {}
        plan = Plan(ModelId.of(job.model), self.patterns, layers, job.below, data=self.data)
        for n, each in self.prompts(layers).items():
            given = job.model.config, plan, n, each, job.model.device, job.model.dtype.itemsize
            found[n] = predict(*given).figures()
            if each.recall is not None:
                found[n]["recall"] = round(float(each.recall[job.free].mean()), 4)
        return found


@dataclass(frozen=True)
class Found:
    """What a method found: its plan and, as far as the method can, what it knows of others."""

    plan: Plan
    expect: Forecast | None = None
    # The plan of another budget, without measuring; None where no choice meets it.
    choose: Callable[[Budget], Plan | None] | None = None
    suspects: np.ndarray | None = None  # what the plan loses by head, `[layers, kv heads]`
    draw: Callable[[], Figure] | None = None  # the figure of `curves`


class Method(Protocol):
    """One way to choose a plan."""

    def __call__(self, job: Job) -> Found:
        """The best plan within `job.budget`; UsageError where there is none.

        Heads of layers that are not `job.free` stay full. What takes long goes through `job.parts`,
        so that a killed run goes on, and is shown by `job.progress`.
        """
