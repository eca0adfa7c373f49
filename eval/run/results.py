"""A directory of results: `run.json` says what makes them comparable, `results.jsonl` grows.

One line a sample and arm, flushed as it comes. A run that was cut off goes on where it stopped.
Of several processes each appends to a `results-N.jsonl` of its own; the first merges them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from hfsparse.errors import UsageError
from hfsparse.writing import write_whole

# sample, arm, plan hash, model fingerprint, transformers (another version is another run)
Key = tuple[str, str, "str | None", str, "str | None"]


@dataclass(frozen=True)
class Settings:
    """What all results of a directory share. Lengths, tasks, sample counts and plans may grow."""

    kind: str  # the command: ruler, needle, turns, …
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
    data: str | None = None  # the user's own file
    stride: int | None = None  # of windows; else they lie side by side
    metric: str | None = None  # of the user's own questions
    turns: str | None = None  # of conversations: whose answers go on, what is read when


class Results:
    """The results in `folder`, and of process `part` those still to come; the first makes it ready.

    machine: where they are made, as `run.machine.describe` tells it; each is noted once.
    arms: what each arm is, as `Arm.facts` tells it; those of earlier runs stay known.
    """

    def __init__(self, folder: Path, settings: Settings, machine: dict, arms=(), part: int = 0):
        self.folder = folder
        self.settings = settings
        self.part = part
        self.sessions, known = self._run(machine)
        self.arms = _named([*(old for old in known if _arm(old) not in {*map(_arm, arms)}), *arms])
        if part == 0:
            self.merge()
            content = {"settings": asdict(settings), "sessions": self.sessions, "arms": self.arms}
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            write_whole(folder / "run.json", text.encode())
        else:
            self.load()

    @property
    def path(self) -> Path:
        return self.folder / "results.jsonl"

    def append(self, line: dict) -> None:
        part = self.folder / f"results-{self.part}.jsonl" if self.part else self.path
        _append(part, [line])
        self._take([line])

    @property
    def failed(self) -> list[dict]:
        """Failures of samples that no later try made good."""
        return [x for x in self.lines if "failed" in x and key(x) not in self.done]

    def merge(self) -> None:
        """Take over what other processes left; one that was cut off may have left some before."""
        self.load()
        for part in sorted(self.folder.glob("results-*.jsonl")):
            new = [line for line in _read(part) if key(line) not in self.done]
            _append(self.path, new)
            self._take(new)
            part.unlink()

    def load(self) -> None:
        """Read anew what is there."""
        self.lines: list[dict] = []
        self.done: set[Key] = set()
        self._take(_read(self.path))

    def _take(self, lines: list[dict]) -> None:
        self.lines += lines
        self.done |= {key(line) for line in lines if "failed" not in line}

    def _run(self, machine: dict) -> tuple[list[dict], list[dict]]:
        """Machines and versions so far, and arms; raises if the directory is of another run."""
        path = self.folder / "run.json"
        if not path.exists():
            if self.path.exists():
                raise UsageError(f"{self.folder} holds results without a run.json: give another -o")
            return [machine], []
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            old, sessions, arms = run["settings"], run["sessions"], run.get("arms", [])
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is not a run's settings: give another -o") from None
        for name, new in asdict(self.settings).items():
            if old.get(name) != new:
                raise UsageError(
                    f"{self.folder} holds results with {name} {old.get(name)}, this run has {new}: "
                    "give another -o"
                )
        return sessions if machine in sessions else [*sessions, machine], arms


def _read(path: Path) -> list[dict]:
    """The whole lines; the sample of a torn last one runs again."""
    content = path.read_bytes() if path.exists() else b""
    return parse(content[: content.rfind(b"\n") + 1].decode("utf-8"), path)


def _append(path: Path, lines: list[dict]) -> None:
    """A torn line that a killed process left at the end is cut off first.

    Only here: who reads a file can't know whether another process is writing that line.
    """
    with path.open("ab+") as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


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
    return line["id"], line["arm"], line["plan"], line["model"], line.get("transformers")


def _arm(facts: dict) -> tuple[str, str | None]:
    return facts["arm"], facts["plan"]


def _named(arms: list[dict]) -> list[dict]:
    """Each with a title of its own: a plan's file may have changed since an earlier run."""
    count = Counter(arm["title"] for arm in arms)
    return [
        arm if count[arm["title"]] == 1 else {**arm, "title": f"{arm['title']} {arm['plan'][7:13]}"}
        for arm in arms
    ]


def writable(folder: Path) -> None:
    """Make `folder`, or say in a sentence why nothing can be written there."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise UsageError(f"cannot write to {folder}: it is a file, give a folder") from None
    except OSError as problem:
        raise UsageError(f"cannot write to {folder}: {problem.strerror}") from problem
