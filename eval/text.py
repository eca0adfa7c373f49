"""Haystacks that need no download: a noise line, prose shipped with CPython, and needle keys.

RULER's essays are not free to copy. Their place is taken by the language reference that CPython
carries in `pydoc_data.topics`, or by the standard library's docstrings where an installation lacks
it. `prose_source()` names which, and belongs beside every score made with it.
"""

import ast
import hashlib
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from .words import ADJECTIVES, NOUNS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_WELL_DOCUMENTED = """
argparse configparser difflib doctest pickle pickletools mailbox _pydecimal turtle subprocess typing
inspect tarfile zipfile threading datetime _pydatetime statistics optparse logging/__init__ random
shutil ssl socket tempfile unittest/case unittest/mock xmlrpc/client urllib/request
""".split()
KEYS = range(len(ADJECTIVES) * len(NOUNS))  # each needle key as a number, which `key` spells
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PLAIN = re.compile(r"[A-Z][A-Za-z0-9_ ,;:'’\"()\-./]+\.")
_LAYOUT = re.compile(r">>>|::=|^\s*[-=*]{3,}", re.MULTILINE)  # code, grammars, underlined titles


@lru_cache(maxsize=1)
def prose() -> tuple[str, ...]:
    """Sentences of flowing English in reading order, each once."""
    return tuple(dict.fromkeys(_plain_sentences(_source()[1])))


@lru_cache(maxsize=1)
def prose_source() -> str:
    """Where the prose comes from, its size and its hash: two runs compare only if this is equal."""
    text = " ".join(prose())
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"CPython {_source()[0]}, {len(text.split())} words, sha256:{digest}"


def key(number: int) -> str:
    adjective, noun = divmod(number, len(NOUNS))
    return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"


def split_sentences(text: str) -> list[str]:
    return _SENTENCE_END.split(text)


def _source() -> tuple[str, Iterable[str]]:
    version = platform.python_version()
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return f"{version} standard-library docstrings", _docstrings()
    return f"{version} pydoc_data.topics", topics.values()


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in (library / f"{name}.py" for name in _WELL_DOCUMENTED):
        if not path.exists():
            continue
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""


def _plain_sentences(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            if _LAYOUT.search(paragraph):
                continue
            text = re.sub(r"\s+", " ", re.sub(r"^\s*\* ", "", paragraph)).strip()
            text = re.sub(r"(?<=\w)- (?=\w)", "-", text)  # "read- only" was broken at the hyphen
            for sentence in split_sentences(text):
                if 6 <= len(sentence.split()) <= 60 and _PLAIN.fullmatch(sentence):
                    yield sentence
