"""Files and folders are written whole, or not at all: a draft beside them is renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write a file or, on failure, leave what was there untouched (OSError)."""
    draft = _draft(path)
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of what is at `path`; on failure, none."""
    draft, before = Path(_draft(path)), None
    draft.mkdir()
    try:
        yield draft
        for file in draft.iterdir():
            with open(file, "r+b") as written:
                os.fsync(written.fileno())
        if os.path.lexists(path):
            before = _draft(path)
            os.rename(path, before)
        try:
            os.rename(draft, path)
        except BaseException:
            if before is not None:
                os.rename(before, path)
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def _draft(path: str | os.PathLike) -> str:
    """A new name beside a path."""
    return os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
