"""A directory of results: `run.json` says what makes them comparable, `results.jsonl` grows.

One line a sample and arm, flushed as it comes. A run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from hfsparse.loading import UsageError

Key = tuple[str, str, "str | None", str]  # sample, arm, plan hash, model fingerprint


@dataclass(frozen=True)
class Settings:
    """What all results of a directory share. Lengths, tasks, sample counts and plans may grow."""

    kind: str  # ruler or needle
    model: str
    fingerprint: str
    weights: str
    version: str
    dtype: str
    seed: int
    chat: str
    max_new_tokens: int | None
    prose: str
    squad: str | None = None  # which data asks qa_1's questions
    hotpotqa: str | None = None  # and qa_2's


class Results:
    def __init__(self, folder: Path, settings: Settings, session: dict):
        self.folder = folder
        self.settings = settings
        self.sessions = self._sessions(session)
        self.lines = self._read()
        self.done = {key(line) for line in self.lines}
        _write_whole(folder / "run.json", {"settings": asdict(settings), "sessions": self.sessions})

    @property
    def path(self) -> Path:
        return self.folder / "results.jsonl"

    def append(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        self.done.add(key(line))

    def _sessions(self, session: dict) -> list[dict]:
        """Machines and versions so far; raises if the directory belongs to another run."""
        path = self.folder / "run.json"
        if not path.exists():
            if self.path.exists():
                raise UsageError(f"{self.folder} holds results without a run.json: give another -o")
            return [session]
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            old, sessions = run["settings"], run["sessions"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is not a run's settings: give another -o") from None
        for name, new in asdict(self.settings).items():
            if old.get(name) != new:
                raise UsageError(
                    f"{self.folder} holds results with {name} {old.get(name)}, this run has {new}: "
                    "give another -o"
                )
        return sessions if session in sessions else [*sessions, session]

    def _read(self) -> list[dict]:
        """The whole lines; a torn last one is cut off the file, so that its sample runs again."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return parse(whole.decode("utf-8"), self.path)


def parse(content: str, path: Path) -> list[dict]:
    lines = []
    for number, line in enumerate(content.split("\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
            key(lines[-1])
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path}, line {number}: not a result; remove it or give another -o"
            ) from None
    return lines


def key(line: dict) -> Key:
    return line["id"], line["arm"], line["plan"], line["model"]


def writable(folder: Path) -> None:
    """Make `folder`, or say in a sentence why nothing can be written there."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise UsageError(f"cannot write to {folder}: {problem.strerror}") from problem


def _write_whole(path: Path, content: dict) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
