"""What the model does with trials and texts under plans: each is run once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from transformers import PreTrainedModel

from hfsparse.patcher import patch
from hfsparse.plan import ModelId, Plan
from hfsparse.profiler.job import Job

T = TypeVar("T")


@dataclass
class Runs(Generic[T]):
    """Items of one kind by name, run on demand; a killed profile continues after those it has."""

    job: Job
    kind: str  # begins the names of its parts
    compute: Callable[[PreTrainedModel, T], dict[str, np.ndarray]]
    items: dict[str, T] = field(default_factory=dict)
    found: dict[tuple[str, str], dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def dense(self) -> Plan:
        return Plan.full(ModelId.of(self.job.model))

    def get(
        self, plan: Plan, names: Iterable[str], label: str | None = None
    ) -> dict[str, dict[str, np.ndarray]]:
        """What the model patched with `plan` does with each of these; a label shows a bar."""
        names, mark = list(names), plan.hash()[7:19]
        todo = [name for name in names if (mark, name) not in self.found]
        if todo:
            with patch(self.job.model, plan):
                for name in self.job.progress((label, n) for n in todo) if label else todo:
                    compute = partial(self.compute, self.job.model, self.items[name])
                    part = f"{self.kind}-{name}-{mark}"
                    self.found[mark, name] = self.job.parts.get(part, compute)
        return {name: self.found[mark, name] for name in names}
