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
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from string import ascii_uppercase
from uuid import UUID

from hfsparse import reading
from hfsparse.errors import UsageError
from hfsparse_eval.tasks.needle_words import ADJECTIVES, NOUNS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_WELL_DOCUMENTED = """
argparse configparser difflib doctest pickle pickletools mailbox _pydecimal turtle subprocess typing
inspect tarfile zipfile threading datetime _pydatetime statistics optparse logging/__init__ random
shutil ssl socket tempfile unittest/case unittest/mock xmlrpc/client urllib/request
""".split()
SLOTS = [round(100 * i / 39) for i in range(40)]  # depths of a needle in prose, percent
KEYS = range(len(ADJECTIVES) * len(NOUNS))  # each needle key as a number, which `key` spells
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|(?<=[。！？])\s*(?=\S)")
# Scripts that put no blanks between words: Thai to Myanmar, Khmer, kana and Han with their
# punctuation. Each character counts as a word; so do four letters of a run that no word is.
_UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3001-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_LETTER = rf"[^\s{_UNSPACED}]"
_WORD = re.compile(rf"([{_UNSPACED}]|{_LETTER}{{1,60}}(?!{_LETTER})|{_LETTER}{{4}})\s*")
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
    return f"CPython {_source()[0]}, {len(text.split())} words, {_mark(text.encode())}"


def key(number: int) -> str:
    adjective, noun = divmod(number, len(NOUNS))
    return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"


def draw_distinct(rng: Random, kind: str, count: int) -> list[str]:
    """`count` distinct words, five capital letters, seven-digit numbers or version 4 uuids."""
    if kind == "word":
        return [key(n) for n in rng.sample(KEYS, count)]
    if kind == "letters":
        return [_capitals(n) for n in rng.sample(range(26**5), count)]
    if kind == "number":
        return [str(n) for n in rng.sample(range(10**6, 10**7), count)]
    return [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def _capitals(number: int) -> str:
    return "".join(ascii_uppercase[number // 26**place % 26] for place in range(5))


def excerpt(rng: Random, words: int, own: Sequence[str] = ()) -> list[str]:
    """Sentences of `words` words of prose from a random sentence on, repeated past its end."""
    sentences = own or prose()
    start = rng.randrange(len(sentences))
    taken: list[str] = []
    at = start
    while len(taken) < words:
        taken += split_words(f"{sentences[at % len(sentences)]} ")
        at += 1
    found = split_sentences("".join(taken[:words]).rstrip())
    return [piece for sentence in found for piece in cut(sentence)] if own else found


def split_sentences(text: str) -> list[str]:
    return _SENTENCE_END.split(text)


def split_words(text: str) -> list[str]:
    """Its words, each with the blanks behind it."""
    return [match[0] for match in _WORD.finditer(text)]


def cut(sentence: str, most: int = 60) -> list[str]:
    """Pieces of at most so many words: what has no sentences still has places for needles."""
    found = split_words(sentence)
    return ["".join(found[i : i + most]).rstrip() for i in range(0, len(found), most)]


def read_haystack(path: Path) -> tuple[tuple[str, ...], str]:
    """The sentences of a text file in reading order, and the file's name and hash."""
    content, mark = read(path)
    sentences = tuple(split_sentences(" ".join(content.split())))
    if not any(sentences):
        raise UsageError(f"{path} holds no words: give a text file")
    return sentences, mark


def read(path: Path) -> tuple[str, str]:
    """A file's text, and its name and hash."""
    try:
        content = reading.content(path)
        return reading.decode(content), f"{path.name}, {_mark(content)}"
    except (OSError, ValueError) as problem:
        raise UsageError(f"{path}: can't read: {reading.why(problem)}") from None


def _mark(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()[:12]}"


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
