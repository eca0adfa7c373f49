"""Which q heads of a layer attend alike in prompts: grouped once, when a plan is resolved.

A layer's heads are attended to together, or store by store. Heads are numbered within these, and
in `heads` as the layer numbers them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

from hfsparse.lists import FULL, Band
from hfsparse.patterns import Pattern


@dataclass(frozen=True, eq=False)
class Route:
    """The q heads that follow one pattern, and the kv heads that they read."""

    pattern: Pattern | None  # None: every key
    band: Band | None  # what it keeps, where positions alone decide
    q: tuple[int, ...]
    kv: tuple[int, ...]  # each once where whole groups are meant, else one a q head
    heads: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Listed:
    """Routes whose heads follow lists of blocks, in one call of a kernel."""

    routes: tuple[Route, ...]
    q: tuple[int, ...]  # of all routes, ascending
    kv: tuple[int, ...]  # the kv head of each
    heads: tuple[int, ...]
    order: tuple[int, ...]  # where each stands among the routes' heads, one route after another

    @cached_property
    def means(self) -> tuple[int, ...]:
        """Places in `q` of heads that read what they leave out by its means."""
        held = [
            i for route in self.routes for i in route.q if getattr(route.pattern, "means", False)
        ]
        return tuple(i for i, head in enumerate(self.q) if head in held)


@dataclass(frozen=True, eq=False)
class Routes:
    """How q heads that are attended to together do so."""

    heads: tuple[int, ...]
    dense: Route | None  # those that read every key
    listed: Listed | None  # those that follow a pattern
    every: Listed  # all, as lists: for calls in which dense heads follow lists of every block


Cases = dict[tuple[bool, bool], Routes]  # by whether a row is under below.prefill, and below.cache


def routes_by_case(
    patterns: Sequence[Pattern | None],
    heads: Sequence[int],
    rings: Collection[int],
    ratio: int,
    expanded: bool = False,
) -> Cases:
    """Routes of q heads by what a row's length makes of them.

    patterns: of each q head of the layer; rings: kv heads that read every key of rows under
    below.cache, the others of rows under below.prefill; ratio: q heads a kv head; expanded: each
    q head reads keys of its own, made of the latent that its kv head keeps (MLA).
    """
    found = {}
    for short, kept in product((False, True), repeat=2):
        whole = [kept if head // ratio in rings else short for head in heads]
        own = (None if all_ else patterns[h] for h, all_ in zip(heads, whole, strict=True))
        found[short, kept] = group_heads(tuple(own), tuple(heads), 1 if expanded else ratio)
    return found


def heads_of(cases: Cases, kv: slice) -> Cases:
    """Those of the q heads that read some kv heads of a store, numbered within these."""
    if kv == slice(None):
        return cases
    return {case: _some(routes, kv.start, kv.stop) for case, routes in cases.items()}


@lru_cache(1024)
def _some(routes: Routes, first: int, end: int) -> Routes:
    """Routes of the q heads that read a run of the kv heads."""
    every, place = routes.every, {}
    for route in every.routes:
        place |= dict.fromkeys(route.heads, route.pattern)
    ratio = every.kv.count(every.kv[0])
    heads = routes.heads[first * ratio : end * ratio]
    return group_heads(tuple(place[head] for head in heads), heads, ratio)


@lru_cache(1024)  # layers are often alike
def group_heads(patterns: tuple[Pattern | None, ...], heads: tuple[int, ...], ratio: int) -> Routes:
    """Routes of q heads that follow these patterns, one a head."""
    routes = {}
    for pattern in dict.fromkeys(patterns):
        q = tuple(i for i, other in enumerate(patterns) if other == pattern)
        band = FULL if pattern is None else getattr(pattern, "band", None)
        own = tuple(heads[i] for i in q)
        routes[pattern] = Route(pattern, band, q, _kv_heads(q, ratio), own)
    every = _listed(routes.values(), heads, ratio)
    dense = routes.pop(None, None)
    listed = every if dense is None else _listed(routes.values(), heads, ratio) if routes else None
    return Routes(heads, dense, listed, every)


def _listed(routes: Iterable[Route], heads: tuple[int, ...], ratio: int) -> Listed:
    routes = tuple(routes)
    held = [i for route in routes for i in route.q]
    order = tuple(sorted(range(len(held)), key=held.__getitem__))
    q = tuple(held[i] for i in order)
    return Listed(routes, q, tuple(i // ratio for i in q), tuple(heads[i] for i in q), order)


def _kv_heads(q: tuple[int, ...], ratio: int) -> tuple[int, ...]:
    kv = tuple(i // ratio for i in q)
    whole = all(kv.count(g) == ratio for g in kv)
    return tuple(sorted(set(kv))) if whole else kv
