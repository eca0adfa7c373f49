"""DuoAttention's plans: a gate for each kv head, which is full or streams (arXiv 2410.10819).

A folder: full_attention_heads.tsv, a line a layer; config.json, with the sizes of its training.
"""

from __future__ import annotations

import math
from pathlib import Path

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
    read_text,
)
from hfsparse.plan.words import show

SHARE, SINK, RECENT = 0.5, 64, 256  # as its authors deploy it


def read(path: Path, share: float = SHARE) -> Found:
    """Streaming or full, `[layers][kv heads]`: the share of lowest gates streams."""
    if not path.is_dir():
        what = "it is a file" if path.exists() else "there is no such folder"
        raise no_plan(path, "duo", what)
    file, settings = path / "full_attention_heads.tsv", path / "config.json"
    config, gates = read_json(settings, "duo"), _read_gates(file)
    if not isinstance(config, dict):
        raise no_plan(settings, "duo", f"it is {describe(config)}")
    names = ("sink_size", "recent_size", "deploy_sink_size", "deploy_recent_size")
    sink, recent, *deployed = (_size(settings, config, name) for name in names)
    stream = Streaming(deployed[0] or SINK, deployed[1] or RECENT)
    streams, tied = cut(gates, share)
    notes = [
        f"trained with sink {sink} and recent {recent}, imported with sink {stream.sink} and "
        f"recent {stream.recent}, as deployed",
        "heads stream from a prompt's first token on (there: its first chunk is dense, and later "
        "chunks see all of themselves)",
        "gates are left out: a head is full or streams",
    ]
    if tied:
        notes.append(
            "equal gates lie on both sides of the cut (there: parted at random), of which the "
            f"first in order stream: {describe_heads(tied)}"
        )
    rows = [[stream if streaming else None for streaming in row] for row in streams]
    return Found(rows, "kv_heads", True, notes + note_unread(config, *names))


def cut(gates: list[list[float]], share: float) -> tuple[list[list[bool]], dict[int, list[int]]]:
    """Which heads stream, `[layers][kv heads]`, and the heads whose gate ties at the cut.

    The authors keep full what is not below numpy's quantile `share` of all gates, clipped to
    [0, 1]: it lies at (n - 1) * share of the sorted gates. Of equal ones, first in order go first.
    """
    flat = [min(max(gate, 0.0), 1.0) for row in gates for gate in row]
    count = len(flat) if share == 1 else math.ceil((len(flat) - 1) * share)
    order = sorted(range(len(flat)), key=flat.__getitem__)
    chosen, width, tied = {*order[:count]}, len(gates[0]), {}
    starts = range(0, len(flat), width)
    if 0 < count < len(flat) and flat[order[count - 1]] == flat[order[count]]:
        for layer, start in enumerate(starts):
            row = flat[start : start + width]
            note_heads(tied, layer, [gate == flat[order[count]] for gate in row])
    return [[start + head in chosen for head in range(width)] for start in starts], tied


def _read_gates(file: Path) -> list[list[float]]:
    lines = [line.split("\t") for line in read_text(file, "duo").split("\n") if line.strip()]
    try:
        gates = [[float(value) for value in line] for line in lines]
    except ValueError as error:
        raise no_plan(file, "duo", str(error)) from None
    check_rectangle(file, "duo", gates)
    if not all(math.isfinite(gate) for row in gates for gate in row):
        raise no_plan(file, "duo", "a gate is no finite number")
    return gates


def _size(file: Path, config: dict, name: str) -> int | None:
    value, deployed = config.get(name), name.startswith("deploy_")
    if (value is None and deployed) or (type(value) is int and 1 <= value < 2**31):
        return value
    raise no_plan(file, "duo", f"{name} is {show(value)}, not a number of tokens")
