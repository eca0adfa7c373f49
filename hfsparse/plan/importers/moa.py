"""MoA's plans: a span that grows with the text, for each q head (arXiv 2406.14909).

JSON with `alphas` and `betas`. A text of N tokens has the span alpha + beta * N, at least 128,
after a sink of 64. Our spans are a line from position 0 on, so they are at least as long.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hfsparse.patterns.streaming import Streaming
from hfsparse.plan.importers.form import (
    Found,
    check_rectangle,
    describe,
    describe_heads,
    no_plan,
    note_heads,
    note_unread,
    read_json,
)

SINK, LEAST = 64, 128


def read(path: Path) -> Found:
    """Streaming patterns with a rate, `[layers][q heads]`, full where beta is 1."""
    data = read_json(path, "moa")
    if not isinstance(data, dict) or not {"alphas", "betas"} <= {*data}:
        raise no_plan(path, "moa", f"it is {describe(data)}")
    alphas, betas = (_numbers(path, name, data[name]) for name in ("alphas", "betas"))
    if (len(alphas), len(alphas[0])) != (len(betas), len(betas[0])):
        raise no_plan(path, "moa", "alphas and betas differ in shape")
    rows, wider, dense = [], {}, {}
    for index, lines in enumerate(zip(alphas, betas, strict=True)):
        rules = list(zip(*lines, strict=True))
        if wrong := [beta for _, beta in rules if not 0 <= beta <= 1]:
            raise no_plan(path, "moa", f"layer {index} has a beta of {wrong[0]:g}, not 0 to 1")
        rows.append([elastic(*rule) for rule in rules])
        note_heads(wider, index, [alpha < LEAST and 0 < beta < 1 for alpha, beta in rules])
        note_heads(dense, index, [alpha < 0 and beta == 1 for alpha, beta in rules])
    notes = [
        "a span follows each query's position (there: the length of the whole text, in steps of "
        "64, for all its queries), so early queries of a prompt read less"
    ]
    if wider:
        note = f"spans are {LEAST} + beta N, not max({LEAST}, alpha + beta N), so up to"
        notes.append(f"{note} {LEAST} - alpha tokens longer: {describe_heads(wider)}")
    if dense:
        note = "full, as beta is 1 (there: the -alpha tokens after the sink are not read)"
        notes.append(f"{note}: {describe_heads(dense)}")
    return Found(rows, "q_heads", True, notes + note_unread(data, "alphas", "betas"))


def elastic(alpha: float, beta: float) -> Streaming | None:
    """At every position N at least what the rule keeps; None where that is every key."""
    return None if beta == 1 else Streaming(SINK, max(LEAST, math.ceil(alpha)), float(beta))


def _numbers(path: Path, name: str, values: Any) -> list[list[float]]:
    check_rectangle(path, "moa", values, name)
    for value in (value for row in values for value in row):
        if type(value) not in (int, float) or not abs(value) < 2**31:  # NaN too
            raise no_plan(path, "moa", f"{name} has {describe(value)}, not a number of tokens")
    return values
