"""Needles in a haystack: RULER's eight retrieval tasks (arXiv 2404.06654), by their wording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from hfsparse.errors import UsageError
from hfsparse_eval.tasks import haystack as text
from hfsparse_eval.tasks.draft import Draft, insert, mean_depth

MOST = 100  # needles of a sample


@dataclass(frozen=True)
class Niah:
    """Values to be looked up by key."""

    name: str
    haystack: str  # noise, prose, or needles
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1
    key: str = "word"  # or uuid
    value: str = "number"  # or uuid
    new_tokens: int = 128
    metric: str = "all"
    own: tuple[str, ...] = field(default=(), repr=False)  # sentences in place of the prose
    suite, ruler, default, placed = "ruler", True, True, True

    @property
    def needles(self) -> int:
        return self.keys * self.values

    def step(self, length: int) -> int:
        """By how many words of prose or lines a sample that is too long is shortened."""
        if self.key == "uuid":
            return 1  # RULER's 25 lines of two uuids each would leave half of 4096 tokens empty
        short = length < 4096
        if self.haystack == "prose":
            return 50 if short else 500
        return 5 if short else 25

    def fitted(self, tokens: Callable[[str], int], length: int) -> Niah:
        """With more room for its answers than RULER's where many are asked for."""
        values = text.draw_distinct(Random(0), self.value, self.queries * self.values)
        return replace(self, new_tokens=max(self.new_tokens, 2 * tokens(", ".join(values))))

    def draw(self, rng: Random, size: int, depth: float | None = None) -> Draft:
        """`size` counts words of prose, or lines.

        `depth` (percent) places the first needle; further ones follow evenly up to the end.
        """
        lines = size if self.haystack == "needles" else 0
        keys = text.draw_distinct(rng, self.key, self.keys + lines)
        values = text.draw_distinct(rng, self.value, self.needles + lines)
        owners = [i // self.values for i in range(self.needles)] + [*range(self.keys, len(keys))]
        lines = [self._needle(keys[i], value) for i, value in zip(owners, values, strict=True)]
        asked = rng.sample(range(self.keys), self.queries)
        order = rng.sample(range(self.needles), self.needles)
        units, places = self._haystack(rng, size, lines[self.needles :], depth)
        glue = " " if self.haystack == "prose" else "\n"
        context, spans = insert(units, places, [lines[i] for i in order], glue)
        wanted = [i for key in asked for i in range(self.needles) if owners[i] == key]
        kept = [order.index(i) for i in wanted]
        return Draft(
            context=context,
            answers=tuple(values[i] for i in wanted),
            gold=tuple(spans[i] for i in kept),
            depth=mean_depth([places[i] for i in kept], len(units)) if depth is None else depth,
            **self._wording(_listed([keys[i] for i in asked])),
        )

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value}s for {key} is: {value}."

    def _wording(self, query: str) -> dict[str, str]:
        one = self.queries * self.values == 1
        kind = self.value if one else f"{self.value}s"
        asked = f"the special magic {kind} for {query} mentioned in the provided text"
        return {
            "before": f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} "
            "hidden within the following text. Make sure to memorize it. I will quiz you about the "
            f"{kind} afterwards.\n",
            "after": f"\nWhat {'is' if one else 'are all'} {asked}?",
            "prefix": f" T{asked[1:]} {'is' if one else 'are'}",
        }

    def _haystack(self, rng, size, distractors, depth) -> tuple[list[str], list[int]]:
        """Its sentences or lines, and ascending places among them for this task's needles."""
        step = 0 if depth is None else (100 - depth) / self.needles
        depths = [] if depth is None else [depth + step * i for i in range(self.needles)]
        if self.haystack == "prose":
            units = text.excerpt(rng, size, self.own)
            depths = depths or sorted(_drawn(rng, text.SLOTS, self.needles))
            return units, [int(len(units) * d / 100) for d in depths]
        units = distractors or [text.NOISE] * size
        if depths:
            return units, [int(len(units) * d / 100) for d in depths]
        return units, sorted(_drawn(rng, range(len(units)), self.needles))


def _drawn(rng: Random, places: Sequence[int], count: int) -> list[int]:
    """Each place once, unless there are too few."""
    return rng.sample(places, count) if count <= len(places) else rng.choices(places, k=count)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


TASKS = [
    Niah("niah_single_1", "noise"),
    Niah("niah_single_2", "prose"),
    Niah("niah_single_3", "prose", value="uuid"),
    Niah("niah_multikey_1", "prose", keys=4),
    Niah("niah_multikey_2", "needles"),
    Niah("niah_multikey_3", "needles", key="uuid", value="uuid"),
    Niah("niah_multivalue", "prose", values=4),
    Niah("niah_multiquery", "prose", keys=4, queries=4),
]
GRID = {task.name: task for task in TASKS if task.needles == 1}  # whose needle a depth places


def hide(task: Niah, needles: int, haystack: Path | None) -> tuple[Niah, dict[str, str]]:
    """The task with so many needles, in a haystack of the user's own, and what names that."""
    if needles > MOST:
        raise UsageError(f"needles is {needles}: give up to {MOST}")
    if needles > 1:
        task = replace(task, name=f"{task.name}_x{needles}", keys=needles, queries=needles)
    if haystack is None:
        return task, {}
    if task.haystack != "prose":
        prose = [name for name, one in GRID.items() if one.haystack == "prose"]
        raise UsageError(
            f"{task.name} makes its own haystack: --haystack goes with {', '.join(prose)}"
        )
    sentences, mark = text.read_haystack(haystack)
    return replace(task, own=sentences), {"prose": mark}
