"""Text and paths that users give, read in one way.

    try:
        text = reading.text(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read {file}: {reading.why(error)}") from None

Files are UTF-8, with a byte order mark or without; lines end with LF, CRLF or CR. What can't be
used is a ValueError that says what was found.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfsparse.errors import UsageError

# UTF-32's first: the mark of UTF-16 LE begins that of UTF-32 LE.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
SURROGATE = re.compile("[\ud800-\udfff]")


def local(path: str | os.PathLike) -> Path:
    """A path on this machine, `~` read as the home folder; UsageError for what is no path."""
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"a path is text or a Path, not of type {type(path).__name__}")
    if not os.fspath(path):
        raise UsageError("the path is empty: give that of a file or a folder")
    return Path(os.path.expanduser(path))


def content(path: str | os.PathLike, most: int = -1) -> bytes:
    """A file's bytes, of a longer one the first `most`."""
    with open(local(path), "rb") as file:
        return file.read(most)


def decode(data: bytes) -> str:
    """Text of a file's bytes, each line ended by LF."""
    for mark, name in MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"it is {name} text: save it as UTF-8")
    if b"\0" in data:
        raise ValueError("it holds NUL bytes (UTF-16, or no text): save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{error.object[error.start]:02x} in line {line}"
        raise ValueError(f"it is not UTF-8 text ({found}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text(path: str | os.PathLike) -> str:
    """A file's text."""
    return decode(content(path))


def rows(text: str) -> Iterator[tuple[int, str]]:
    """Number and line of each line that isn't blank; U+2028 and its like end no line."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def parse(text: str) -> Any:
    """JSON as data; ValueError names, as a noun, what was found instead."""
    if not text.strip():
        raise ValueError("an empty text")
    try:
        data = json.loads(text, object_pairs_hook=_mapping)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if "\\ud" in text.lower() and (half := SURROGATE.search(json.dumps(data, ensure_ascii=False))):
        found = f"half a character, \\u{ord(half[0]):04x}"
        raise ValueError(f"JSON with {found}: give both halves, or neither")
    return data


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"JSON with the key {twice[:60]!r} given twice: keep one")
    return data


def why(error: Exception) -> str:
    """The reason in an OSError or ValueError, in words."""
    return getattr(error, "strerror", None) or str(error)
