"""MInference's plans: a pattern for each q head, in prompts (arXiv 2407.02490).

A JSON list of layers, each `{"0": [type, vertical, slash, score], ...}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfsparse.patterns import Pattern
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.patterns.vertical_slash import VerticalSlash
from hfsparse.plan.importers.form import (
    Found,
    check_rectangle,
    describe,
    describe_heads,
    no_plan,
    note_heads,
    read_json,
)
from hfsparse.plan.words import show

LEAST_COLUMNS, LEAST_DIAGONALS = 30, 50  # its floors at run time
BLOCKS = BlockTopK(share=0.0001, min_blocks=50)  # its 100 blocks of 64 tokens, in our 128s
MAKERS = {
    "vertical_and_slash": lambda vertical, slash: VerticalSlash(
        max(vertical, LEAST_COLUMNS), max(slash, LEAST_DIAGONALS)
    ),
    "stream_llm": lambda sink, recent: Streaming(sink, recent),
    "block_sparse": lambda *unread: BLOCKS,
}


def read(path: Path) -> Found:
    """Patterns for prompts, `[layers][q heads]`; caches and decode stay full, as there."""
    layers = read_json(path, "minference")
    if not isinstance(layers, list) or not layers:
        raise no_plan(path, "minference", f"it is {describe(layers)}")
    rows, blocks, raised = [], {}, {}
    for index, layer in enumerate(layers):
        entries = _entries(path, index, layer)
        row = [_pattern(path, index, *pair) for pair in enumerate(entries)]
        rows.append(row)
        note_heads(blocks, index, [pattern is BLOCKS for pattern in row])
        note_heads(raised, index, [_raised(*pair) for pair in zip(entries, row, strict=True)])
    check_rectangle(path, "minference", rows)
    notes = [
        "the form says nothing of cache and decode: every key is kept and read",
        "scores are left out: they are of its own search, no figure that a plan expects",
    ]
    if blocks:
        notes.append(
            "block_sparse heads keep their 50 best blocks of 128 tokens, or of 32 on a CPU below "
            "4,096 tokens (there: 100 of 64, whatever the file's numbers): "
            + describe_heads(blocks)
        )
    if raised:
        least = f"{LEAST_COLUMNS} columns and {LEAST_DIAGONALS} diagonals"
        notes.append(f"raised to at least {least}, as MInference does: {describe_heads(raised)}")
    return Found(rows, "q_heads", False, notes)


def _entries(path: Path, index: int, layer: Any) -> list:
    """A layer's entries in the order of its heads, which must be 0, 1, ..."""
    names = [str(head) for head in range(len(layer))] if isinstance(layer, dict) else []
    if not names or {*layer} != {*names}:
        what = f"layer {index} is {describe(layer)}, not a mapping of the q heads 0, 1, ..."
        raise no_plan(path, "minference", what)
    return [layer[name] for name in names]


def _pattern(path: Path, layer: int, head: int, entry: Any) -> Pattern:
    where = f"layer {layer} head {head}"
    sizes = entry[1:3] if isinstance(entry, list) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        what = f"{where} is {describe(entry)}, not a type and two numbers of tokens"
        raise no_plan(path, "minference", what)
    kind = entry[0]
    if not isinstance(kind, str) or kind not in MAKERS:
        known = ", ".join(MAKERS)
        raise no_plan(path, "minference", f"{where} has the type {show(kind)}, known are {known}")
    try:
        return MAKERS[kind](*sizes)
    except ValueError as error:
        raise no_plan(path, "minference", f"{where}: {error}") from None


def _raised(entry: list, pattern: Pattern) -> bool:
    sizes = isinstance(pattern, VerticalSlash) and [pattern.columns, pattern.diagonals]
    return bool(sizes) and sizes != entry[1:3]
