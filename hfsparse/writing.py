"""Files are written whole, or not at all: a draft beside them is renamed."""

from __future__ import annotations

import contextlib
import os
import secrets


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write a file or, on failure, leave what was there untouched (OSError)."""
    draft = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)
