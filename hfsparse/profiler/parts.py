"""What a profile run keeps beside its plan, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from hfsparse.models.weights import weights_mark
from hfsparse.plan import ModelId
from hfsparse.profiler.prompts.calibration import Prompt
from hfsparse.profiler.settings import Settings
from hfsparse.reading import local
from hfsparse.version import __version__


def identify_run(
    model: PreTrainedModel, settings: Settings, prompts: dict[int, list[Prompt]]
) -> str:
    """What measurements depend on: config, weights, settings, prompts, versions."""
    seen = hashlib.sha256()
    for prompt in chain.from_iterable(prompts.values()):
        seen.update(prompt.ids.cpu().numpy().tobytes())
    run = {
        "versions": [__version__, torch.__version__, transformers.__version__],
        "model": [ModelId.of(model).fingerprint, weights_mark(model), str(model.dtype)],
        "seen": seen.hexdigest(),
    }
    return json.dumps(run | settings.identity, sort_keys=True)


def mark(*given) -> str:
    """Names a part after what it was made from."""
    seen = hashlib.sha256()
    for each in given:
        seen.update(each.tobytes() if isinstance(each, np.ndarray) else repr(each).encode())
    return seen.hexdigest()[:12]


class Parts:
    """Arrays made so far, in a folder beside the plan until it is written.

    `run` identifies them (`identify_run`): those of another run are removed. Without a plan file
    (`out` None) nothing is kept. Each part is computed within `alone()`, so that it is the same
    whatever was computed before.
    """

    def __init__(
        self,
        out: str | Path | None,
        run: str,
        alone: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.alone = alone
        self.folder = None if out is None else local(f"{out}.parts")
        if self.folder is None:
            return
        mark = self.folder / "settings.json"
        if mark.is_file() and mark.read_text(encoding="utf-8") == run:
            return
        self.remove()
        self.folder.mkdir(parents=True)
        mark.write_text(run, encoding="utf-8")

    def get(
        self, key: str | int, compute: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """What an earlier run computed under this key (a file name), or what `compute` answers."""
        if self.folder is None:
            return self._compute(compute)
        file = self.folder / f"{key}.npz"
        if not self._is_readable(file):
            draft = file.with_suffix(".draft.npz")
            np.savez(draft, **self._compute(compute))
            draft.replace(file)
        with np.load(file) as saved:
            return dict(saved)

    def _compute(self, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        with self.alone():
            return compute()

    def _is_readable(self, file: Path) -> bool:
        """Whether an earlier run wrote this file and it can be read."""
        try:
            with file.open("rb") as opened, np.load(opened) as saved:
                return bool(dict(saved))
        except (OSError, ValueError, EOFError, BadZipFile):
            return False

    def remove(self) -> None:
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)
