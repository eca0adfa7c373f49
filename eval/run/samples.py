"""Samples: a task's draft made to fit a length in a model's own tokens.

The length counts as in RULER: the prompt with chat template and answer prefix, without the BOS
token, plus the tokens reserved for the answer; of a conversation, all turns and all answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from random import Random
from typing import Protocol

from hfsparse.errors import UsageError
from hfsparse_eval.run.prompter import Prompter, Sample
from hfsparse_eval.tasks import Task
from hfsparse_eval.tasks.draft import Draft, largest
from hfsparse_eval.tasks.own_questions import Question


@dataclass(frozen=True)
class Case:
    """Names a sample before it is made."""

    task: str
    length: int
    depth: float | None  # percent, where a grid sets it
    index: int

    @property
    def id(self) -> str:
        place = "" if self.depth is None else f"-at{self.depth:g}"
        return f"{self.task}-{self.length}{place}-{self.index:04d}"


@dataclass(frozen=True)
class OwnCase:
    """Names a question of the user's own, by the id that its file gives."""

    id: str
    length: int
    task: str
    depth: None = None


class Samples(Protocol):
    """What a run asks of the samples it is given; they are made one by one, when they are run."""

    cases: Sequence[Case | OwnCase]

    def sample(self, case: Case | OwnCase) -> Sample: ...


class Maker:
    """Makes the samples of one task at one length; the haystack's size is found once, then kept."""

    def __init__(self, task: Task, length: int, prompter: Prompter, seed: int = 0):
        self.task = task.fitted(prompter.tokens, length)
        self.length = length
        self.prompter = prompter
        self.seed = seed
        self.step = self.task.step(length)
        self.size = self._size() if self.step else 0

    def sample(self, case: Case | OwnCase) -> Sample:
        seed = _seed(self.seed, case.id)
        for size in range(self.size, 0, -self.step) if self.step else [0]:
            draft = self.task.draw(Random(seed), size, case.depth)
            if self._real(draft) <= self.length:
                break
        else:
            raise self._too_short()
        return self.prompter.sample(
            draft,
            self.task.new_tokens,
            id=case.id,
            task=self.task.name,
            seed=seed,
            length=self.length,
            metric=self.task.metric,
        )

    def _real(self, draft: Draft) -> int:
        return self.prompter.real(draft, self.task.new_tokens)

    def _size(self) -> int:
        """The largest haystack that fits, from one step to three times an estimate."""
        seed = _seed(self.seed, f"{self.task.name}-{self.length}-size")

        def real(size: int) -> int:
            return self._real(self.task.draw(Random(seed), size))

        per_unit = (real(2 * self.step) - real(self.step)) / self.step
        most = max(int(self.length / max(per_unit, 0.5) * 3), self.step)
        size = largest(lambda size: real(size) <= self.length, self.step, most)
        if size is None:
            raise self._too_short()
        return size

    def _too_short(self) -> UsageError:
        return UsageError(
            f"{self.task.name} does not fit {self.length} tokens even with its smallest haystack: "
            "give a longer length"
        )


class Suite:
    """Every sample of a run, by case; a sample depends on its own id and the seed, nothing else."""

    def __init__(
        self,
        tasks: Iterable[Task],
        lengths: Iterable[int],
        count: int,
        prompter: Prompter,
        seed: int = 0,
        depths: Iterable[float | None] = (None,),
    ):
        if count < 1:
            raise UsageError(f"samples is {count}: give 1 or more")
        tasks, depths = list(tasks), list(dict.fromkeys(depths))
        self.makers: dict[tuple[str, int], Maker] = {}
        self.cases: list[Case] = []
        for length in sorted(set(lengths)):
            for task in tasks:
                self.makers[task.name, length] = Maker(task, length, prompter, seed)
                self.cases += [
                    Case(task.name, length, depth, i) for depth in depths for i in range(count)
                ]

    def first(self, count: int) -> Suite:
        """The first `count` samples of each task, length and depth."""
        return self._only(lambda case: case.index < count)

    def without(self, given: Collection[tuple[str, int]]) -> Suite:
        """All but these tasks at these lengths."""
        return self._only(lambda case: (case.task, case.length) not in given)

    def _only(self, wanted: Callable[[Case], bool]) -> Suite:
        fewer = copy(self)
        fewer.cases = [*filter(wanted, self.cases)]
        return fewer

    def sample(self, case: Case) -> Sample:
        return self.makers[case.task, case.length].sample(case)


class OwnSuite:
    """The user's own questions, shortest first; each has the power of two that it fits as length.

    UsageError names a question that needs more than the window.
    """

    def __init__(self, questions: Sequence[Question], prompter: Prompter, window: int | None):
        sizes = {each.id: prompter.real(each.draft, each.new_tokens) for each in questions}
        for each in questions:
            if window and sizes[each.id] > window:
                raise UsageError(
                    f"line {each.line} (id {each.id}) needs {sizes[each.id]} tokens with its "
                    f"answers, this model's window is {window}: shorten or leave it out"
                )
        self.makers: dict[str, Maker] = {}
        self.cases: list[OwnCase] = []
        for each in sorted(questions, key=lambda each: sizes[each.id]):
            length = 1 << (sizes[each.id] - 1).bit_length()
            self.makers[each.id] = Maker(each, length, prompter)
            self.cases.append(OwnCase(each.id, length, each.name))

    def sample(self, case: OwnCase) -> Sample:
        return self.makers[case.id].sample(case)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")
