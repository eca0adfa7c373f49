"""Recipes: named settings of `profile`, each a YAML page that a person can read.

    plan = hfsparse.profile(model, tokenizer, **recipe.load("duo"))

A recipe is a comment, whose first line says what it is for, and settings by their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

from hfsparse import reading
from hfsparse.errors import UsageError
from hfsparse.plan.nodes import plain
from hfsparse.plan.parts import BAD
from hfsparse.plan.words import nearest, show
from hfsparse.profiler.settings import Settings

HERE = Path(__file__).parent
FOLDER = next(each for each in (HERE / "recipes", HERE.parent / "recipes") if each.is_dir())


def names() -> dict[str, str]:
    """Every recipe of this project, with the first line of its comment."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {f.stem: f.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ") for f in files}


def load(name: str) -> dict[str, Any]:
    """Arguments for `profile` from a recipe's name, or from a path that ends in .yaml.

    `recipe` among them is its name. UsageError names what is wrong with it.
    """
    known = names()
    own = name.endswith((".yaml", ".yml"))
    if not own and name not in known:
        raise UsageError(f"no recipe {name}: {nearest(name, known)} (or a path, my-own.yaml)")
    file = Path(name) if own else FOLDER / f"{name}.yaml"
    try:
        text = reading.content(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read the recipe {file}: {reading.why(error)}") from None
    return {**parse(text, str(file)), "recipe": file.stem}


def parse(text: str | bytes, name: str) -> dict[str, Any]:
    """The settings that a recipe's YAML gives, of the types that `profile` takes."""
    problems: list[str] = []
    lines: dict[tuple, int] = {}

    def say(line: int, sentence: str) -> None:
        problems.append(f"line {line}: {sentence}")

    raw = plain(text, say, lines)
    types = get_type_hints(Settings)
    hints = {key: types[key] for key in Settings.names("recipe")}
    settings = {}
    if not problems and (type(raw) is not dict or not raw):
        say(1, f"give settings such as method: balanced, and others of {', '.join(hints)}")
    for key, value in raw.items() if type(raw) is dict else ():
        if key not in hints:
            say(lines[key,], f"unknown setting {show(key)}: {nearest(key, hints)}")
            continue
        kind, fits = KINDS[hints[key]]
        if value is not BAD and not fits(value):
            say(lines[key,], f"{key} is {show(value)}: give {kind}")
        settings[key] = tuple(value) if type(value) is list else value
    if problems:
        raise UsageError(f"the recipe {name}, {'; '.join(problems[:10])}")
    return settings


def describe_sources(page: dict[str, Any], flags: dict[str, Any]) -> str:
    """Where each setting came from: a flag goes before the recipe, the recipe before defaults."""
    pieces = []
    for key, value in {**page, **flags}.items():
        if key == "recipe":
            continue
        origin = "recipe" if key not in flags else "flag"
        if key in flags and page.get(key, flags[key]) != flags[key]:
            origin += f", not {_format(page[key])}"
        pieces.append(f"{key.replace('_', ' ')} {_format(value)} ({origin})")
    return f"recipe {page['recipe']}: {', '.join(pieces)}"


def _format(value: Any) -> str:
    if type(value) is bool:
        return "on" if value else "off"
    return " and ".join(map(str, value)) if type(value) is tuple else str(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int


KINDS = {
    tuple[int, ...] | None: (
        "whole numbers, such as [1024, 2048]",
        lambda value: type(value) is list and all(_is_whole(n) and n > 0 for n in value or [0]),
    ),
    tuple[int | str, ...] | None: (
        "bits, such as [16, 8, 4]",
        lambda value: type(value) is list and all(type(x) in (int, str) for x in value or [0.0]),
    ),
    int: ("a whole number", _is_whole),
    int | None: ("a whole number", _is_whole),
    float: ("a number", lambda value: type(value) in (int, float)),
    float | None: ("a number", lambda value: type(value) in (int, float)),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("text", lambda value: type(value) is str),
    str | None: ("text", lambda value: type(value) is str),
}
