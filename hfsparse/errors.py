"""What users see when something is wrong: every error of this package is an `Error`.

    try:
        hfsparse.patch(model, "plan.yaml")
    except hfsparse.Error as error:
        print(error)     # what was given, what is supported, what to do

It is a ValueError, too. Command lines print it as one line, `error: …`; any other exception is a
fault of the code and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

MAX_PROBLEMS = 100  # that one error of a plan names
Problem = tuple[int | None, str]  # line, sentence


class Error(ValueError):
    """The base of every error that hfsparse raises for what it was given."""


class UsageError(Error):
    """A setting, a file or a model's name that can't be used."""


class PatchError(Error):
    """A model that can't be patched, or is used in a way its patch can't follow."""


class HandleError(PatchError, TypeError, AttributeError):
    """The handle of a patch is used as if it were the model."""


class CacheError(Error):
    """A cache is used in a way that would give wrong answers."""


class ShapeError(Error):
    """A config that does not say how its attention is shaped, or not in one way for all layers."""


class PlanError(Error):
    """A plan that can't be used; `problems` holds (line or None, sentence) for each thing wrong."""

    def __init__(self, message: str, problems: Iterable[Problem] = ()):
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, name: str, problems: Collection[Problem]) -> PlanError:
        """One error for all problems of the plan called `name`, in the order of its lines."""
        problems = sorted(problems, key=lambda problem: problem[0] or 0)
        lines = [f"line {line}: {text}" if line else text for line, text in problems]
        if len(lines) == 1:
            return cls(f"{name}: {lines[0]}", problems)
        many = f"the first {len(lines)}" if len(lines) >= MAX_PROBLEMS else str(len(lines))
        return cls("\n  ".join([f"{name}: {many} problems", *lines]), problems)


class PlanMismatch(PlanError):
    """A plan that was made for another model."""


def first_line(problem: Exception) -> str:
    """The first line of what an exception says; its class where it says nothing."""
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
