"""Plans of ours in forms of other projects, as far as these can say them.

    text, notes = export_plan(plan, "modelopt", length=131_072)

`notes` says in plain sentences what gets lost. Forms: `modelopt` (NVIDIA ModelOpt's skip-softmax,
BLASST, arXiv 2512.12087).
"""

from __future__ import annotations

from collections.abc import Callable

from hfsparse.errors import UsageError
from hfsparse.plan.exporters import modelopt
from hfsparse.plan.plan import Plan
from hfsparse.plan.words import nearest, show

WRITERS: dict[str, Callable[[Plan, int | None], tuple[str, list[str]]]] = {
    "modelopt": modelopt.write,
}


def export_plan(plan: Plan, form: str, length: int | None = None) -> tuple[str, list[str]]:
    """The text of a file of this form, and what of the plan it can't say.

    length: `modelopt`: tokens at which its threshold is to be `skip`.
    """
    if form not in WRITERS:
        raise UsageError(f"unknown form {show(form)}: {nearest(form, WRITERS)}")
    plan.validate()
    return WRITERS[form](plan, length)
