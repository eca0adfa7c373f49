"""Every message that a user can meet stands in troubleshooting.md, and nothing else does.

A message is read from the code, `…` in place of what differs in it; an entry is how it begins.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.docs.pages import DOCS, ROOT, code, text

PAGE = DOCS / "troubleshooting.md"
RULES = "A plan that can't be read"  # the section of what a plan's reader and rules report
REASONS = "Why a model can't be patched"
# What is raised for users, or for what tells them. Errors of INNER rooms are for who calls them.
ERROR = re.compile(
    r"(Usage|Patch|Plan|Cache|Shape|Value|OutOfMemory)Error|PlanMismatch|Infeasible|warn"
)
INNER = {"kernels", "lists"}
LETTERS = 8  # in a message of its own: one of fewer carries another, such as `…, line …: …`


def template(node: ast.expr | None) -> str | None:
    """The sentence of a literal, on one line."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.split())
    if isinstance(node, ast.JoinedStr):
        parts = (each.value if isinstance(each, ast.Constant) else "…" for each in node.values)
        return " ".join(re.sub("…+", "…", "".join(parts)).split())
    return None


@cache
def modules() -> tuple[ast.Module, ...]:
    files = [file for top in ("hfsparse", "eval") for file in (ROOT / top).rglob("*.py")]
    return tuple(ast.parse(text(file)) for file in files if INNER.isdisjoint(file.parts))


@cache
def every_sentence() -> frozenset[str]:
    """Whatever stands as text in the code."""
    said = (template(node) for module in modules() for node in ast.walk(module))
    return frozenset(each for each in said if each)


def name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def messages(module: ast.Module) -> Iterator[str]:
    """What errors are made with: literals, constants, and what local functions say of them."""
    constants = {
        target.id: each.value
        for each in module.body
        if isinstance(each, ast.Assign)
        for target in each.targets
        if isinstance(target, ast.Name)
    }
    functions = {f.name: f for f in ast.walk(module) if isinstance(f, ast.FunctionDef)}
    for function in functions.values():
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or not call.args or not ERROR.fullmatch(name(call)):
                continue
            given = call.args[0]
            if isinstance(given, ast.Name):
                given = constants.get(given.id, function)
            elif isinstance(given, ast.Call):
                given = functions.get(name(given))
            if isinstance(given, ast.FunctionDef):
                yield from told_by(given)
            elif said := template(given):
                yield said


def told_by(function: ast.FunctionDef) -> Iterator[str]:
    """The sentences of a function that makes a message: returned, assigned, or in a table."""
    for node in ast.walk(function):
        parts = [node.value] if isinstance(node, ast.Return) else getattr(node, "elts", [])
        yield from (said for part in parts if (said := template(part)) and ": " in said)


def rules(module: ast.Module) -> Iterator[str]:
    """What a plan's rules yield, a reader says, patterns and selectors require, and settings
    refuse."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and name(node) in ("say", "require", "within", "one_of"):
            yield from filter(None, [template(node.args[-1])])
        if isinstance(node, ast.FunctionDef) and re.search(
            r"_rules$|wrong_value$|^_refuse_", node.name
        ):
            yield from filter(None, map(template, results(node)))


def reasons(module: ast.Module) -> Iterator[str]:
    """Why `patch` refuses a model."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and "obstacles" in node.name:
            yield from filter(None, map(template, results(node)))
        if isinstance(node, ast.Call) and name(node) == "Unlike":
            yield from filter(None, map(template, node.args))


def results(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """What a function returns or yields; of a pair, the last."""
    for node in ast.walk(function):
        if isinstance(node, ast.Return | ast.Yield) and node.value is not None:
            yield node.value.elts[-1] if isinstance(node.value, ast.Tuple) else node.value


def entries() -> list[tuple[str, str]]:
    """Section and message of each row of the page."""
    found, section = [], ""
    for line in text(PAGE).splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("| `"):
            found.append((section, code(line)[0]))
    return found


def begins(message: str, entry: str) -> bool:
    return message.startswith(entry.rstrip("…"))


def fits(message: str, entry: str) -> bool:
    """As `begins`, where an entry's `…` also stands for words."""
    return re.match(".*?".join(map(re.escape, entry.split("…"))), message) is not None


def of_its_own(said: str) -> bool:
    return len(re.findall("[a-z]", said)) >= LETTERS


@pytest.mark.parametrize(
    ("kind", "matches", "sections"),
    [
        (messages, begins, lambda section: section not in (RULES, REASONS)),
        (rules, fits, lambda section: True),
        (reasons, begins, lambda section: section == REASONS),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_every_message_has_an_entry(kind, matches, sections):
    said = {each for module in modules() for each in kind(module) if of_its_own(each)}
    known = [entry for section, entry in entries() if sections(section)]
    assert len(said) > 5
    assert not [each for each in sorted(said) if not any(matches(each, entry) for entry in known)]


def test_every_entry_is_the_beginning_of_something_that_the_code_says():
    said = every_sentence()
    stale = [
        entry
        for section, entry in entries()
        if not any((fits if section == RULES else begins)(each, entry) for each in said)
    ]
    assert not stale


def test_no_entry_stands_twice():
    found = [entry for _, entry in entries() if of_its_own(entry)]
    assert sorted(set(found)) == sorted(found)
