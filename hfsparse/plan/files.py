"""Tables in files beside a plan.

A plan names each table by a file that lies beside it and by what that file holds:

    data: {pca: {file: plan.pca.safetensors, sha256: 9f86d081…}}

What is computed depends on the content, so plans that differ in it alone have another hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from hfsparse import reading
from hfsparse.errors import PlanError
from hfsparse.writing import write_whole

FILE = re.compile(r"\w[\w.-]{0,127}\.safetensors", re.ASCII)  # no folders: it lies beside the plan
ANEW = "or make plan and table anew: hfsparse profile MODEL -o plan.yaml"
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_BYTES = 1 << 30  # of a table


@dataclass(frozen=True)
class DataFile:
    """A safetensors file beside the plan, and what it holds once it is read."""

    file: str
    sha256: str  # of its bytes
    content: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, file: str, tensors: dict[str, Tensor]) -> DataFile:
        """A table that no file holds yet: `Plan.save` writes it."""
        from safetensors.torch import save

        content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        return cls(file, hashlib.sha256(content).hexdigest(), content)

    @classmethod
    def of_plan(
        cls, plan: str | os.PathLike | None, name: str, tensors: dict[str, Tensor]
    ) -> DataFile:
        """A new table, in a file that is named after its plan: `plan.NAME.safetensors`."""
        stem = "plan" if plan is None else re.sub(r"[^\w.-]|^\W", "_", Path(plan).stem, flags=re.A)
        return cls.of(f"{stem[:60]}.{name}.safetensors", tensors)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, on the CPU. PlanError: it was not read, or is no such file."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        if self.content is None:
            raise PlanError(f"{self.file} was not read: read the plan from its file, by Plan.load")
        try:
            return load(self.content)
        except SafetensorError as error:
            raise PlanError(f"{self.file} is not a safetensors file: {error}") from error

    def read(self, folders: Iterable[Path]) -> DataFile:
        """With its content, of the first folder that has it; PlanError says what is wrong."""
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                return self._filled(folder / self.file)
        raise PlanError(
            f"{self.file} is not beside the plan: copy it there too, save the plan again from "
            f"where its files are, {ANEW}"
        )

    def _filled(self, path: Path) -> DataFile:
        try:
            regular = path.is_file() or not path.exists()
            content = reading.content(path, MAX_BYTES + 1) if regular else None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise PlanError(f"can't read {self.file}: {reading.why(error)}") from error
        if content is None:  # a pipe or a device may never end
            raise PlanError(
                f"can't read {self.file}: it is a folder, a pipe or a device. Give the file that "
                "the plan was made with"
            )
        if len(content) > MAX_BYTES:
            raise PlanError(
                f"{self.file} is longer than {MAX_BYTES >> 30} GiB: give a smaller table"
            )
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise PlanError(
                f"{self.file} has sha256 {found}, not the plan's: it was changed or belongs to "
                f"another plan. Give the file that the plan was made with, {ANEW}"
            )
        filled = replace(self, content=content)
        _ = filled.tensors  # it is a safetensors file
        return filled

    def placed(self, folder: Path) -> DataFile:
        """As it will lie in a folder: under another name where its own is taken by other content.

        PlanError: its content is not known, and not there either.
        """
        try:
            return self.read([folder])
        except PlanError as error:
            if self.content is None:
                raise PlanError(f"its data can't be saved: {error}") from error
        if not (folder / self.file).exists():
            return self
        stem = self.file.removesuffix(".safetensors")[:100]
        return replace(self, file=f"{stem}-{self.sha256[:12]}.safetensors")

    def write(self, folder: Path) -> None:
        """Put it there, unless it is there."""
        try:
            self.read([folder])
        except PlanError:
            write_whole(folder / self.file, self.content)
