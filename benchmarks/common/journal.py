"""Rows of a long benchmark, kept as they come: a job that was killed goes on with the next arm."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch


class Journal:
    """What arms gave, by name, in a file of one JSON object a line; None keeps them in memory.

    `made` says what all rows were made by (device, versions, shape). A file with rows of another
    is refused.
    """

    def __init__(self, file: Path | None, made: str):
        self.file, self.made = file, made
        held, self.rows = read(file) if file else (None, {})
        if held not in (None, made):
            sys.exit(f"{file} holds rows of {held}\nthis is {made}: name another --out")
        self.drop([])  # a row that was cut short

    def row(self, name: str, run: Callable[[], dict]) -> dict:
        """What `run` gives, or {"failed": why}; what is there already is not run again."""
        if name in self.rows:
            print(f"  {name}: there already", file=sys.stderr, flush=True)
            return self.rows[name]
        broken = None
        try:
            found = run()
        except Exception as error:
            found = {"failed": failure(error)}
            broken = lost(error)
        self.add(name, **found)
        print(f"  {name}: {json.dumps(found)}", file=sys.stderr, flush=True)
        if broken:
            sys.exit(f"{name}: {broken}. Start this again: it goes on with the next arm")
        return found

    def add(self, name: str, **row) -> None:
        self.rows[name] = row
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                _write(out, {"name": name, **row})

    def drop(self, names: list[str]) -> None:
        """Forget these rows: they are run again."""
        for name in names:
            del self.rows[name]
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".tmp")
        with beside.open("w", encoding="utf-8") as out:
            _write(out, {"made": self.made}, *({"name": n, **r} for n, r in self.rows.items()))
        beside.replace(self.file)


def read(file: Path) -> tuple[str | None, dict[str, dict]]:
    """What made the rows of a file, and the rows by name; a line that was cut short is no row."""
    made, rows = None, {}
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "name" in row:
            rows[row.pop("name")] = row
        else:
            made = row["made"]
    return made, rows


def rows_of(folder: Path) -> dict[str, dict]:
    """The rows of all files of a folder, by name."""
    rows = {}
    for file in sorted(folder.glob("*.jsonl")):
        rows |= read(file)[1]
    return rows


def _write(out: IO[str], *rows: dict) -> None:
    out.write("".join(json.dumps(row) + "\n" for row in rows))
    out.flush()
    os.fsync(out.fileno())


def failure(error: Exception) -> str:
    """Why an arm gave nothing, in a few words; the whole story goes to stderr."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    traceback.print_exception(error)
    told = " ".join(str(error).split())[:100]
    return f"{type(error).__name__}: {told}"


def lost(error: Exception) -> str | None:
    """Why nothing can run on the GPU after an error; None: other arms can."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or not torch.cuda.is_available():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as after:
        return " ".join(str(after).split())[:100]
    return None


def cards() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES of another names them."""
    if not torch.cuda.is_available():
        return []
    every = ",".join(map(str, range(torch.cuda.device_count())))
    return os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")


def end_in_order() -> None:
    """SIGTERM, as `timeout` sends it, ends the script through its `finally` clauses."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
