"""One choice a head under budgets, as an integer programme (scipy's HiGHS).

A kv head is either a ring, and then its q heads stream with it, or keeps its cache, and then each of
its q heads takes a prefill option and the kv head a page selector; both may stay full. The sum of
output errors is least; mean pair density, cache share and decode share stay within their budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array


@dataclass(frozen=True)
class Budget:
    """Greatest mean shares of dense attention, over all heads of the layers that may be sparse."""

    pairs: float
    cache: float
    decode: float


@dataclass(frozen=True)
class Options:
    """Measured choices: names, errors (relative, after o_proj) and costs, by layer and head."""

    prefill: np.ndarray  # [layers, options, q heads] names of patterns
    prefill_error: np.ndarray
    prefill_cost: np.ndarray
    rings: list[str]
    ring_error: np.ndarray  # [layers, rings, kv heads], of the whole group
    ring_cost: np.ndarray
    selectors: list[str]
    page_error: np.ndarray  # [layers, selectors, kv heads]
    page_share: np.ndarray


@dataclass(frozen=True)
class Choice:
    """What one layer's heads do, in the words of a plan."""

    prefill: tuple[str, ...]
    cache: tuple[str, ...]
    decode: tuple[str, ...]


class Infeasible(ValueError):
    """No choice meets the budgets."""


def allocate(
    options: Options, budget: Budget, ring_share: list[float], ring_read: list[float]
) -> list[Choice]:
    """The choice of least error. ring_share, ring_read: share of a row that each ring keeps and reads."""
    layers, _, q_heads = options.prefill.shape
    kv_heads = options.ring_error.shape[2]
    group = q_heads // kv_heads
    cost, rows = [], []  # objective, and (constraint, variable, coefficient)
    choices = []  # (layer, kind, head, name) of each variable
    limits = {"pairs": budget.pairs, "cache": budget.cache, "decode": budget.decode}

    def variable(place: tuple, error: float, exactly_one: tuple, **uses: float) -> None:
        rows.extend((key, len(cost), 1.0) for key in exactly_one)
        rows.extend((key, len(cost), use) for key, use in uses.items() if use)
        cost.append(error)
        choices.append(place)

    for layer in range(layers):
        for g in range(kv_heads):
            heads = range(g * group, (g + 1) * group)
            cache_of = ("cache", layer, g)
            prefill_of = [("prefill", layer, h) for h in heads]
            for i, name in enumerate(options.rings):
                variable(
                    (layer, "ring", g, name),
                    float(options.ring_error[layer, i, g]),
                    (cache_of, ("decode", layer, g), *prefill_of),
                    pairs=float(options.ring_cost[layer, i, g]) / (layers * kv_heads),
                    cache=ring_share[i] / (layers * kv_heads),
                    decode=ring_read[i] / (layers * kv_heads),
                )
            variable((layer, "cache", g, "full"), 0.0, (cache_of,), cache=1 / (layers * kv_heads))
            pages = [("full", 0.0, 1.0)]
            for i, name in enumerate(options.selectors):
                pages.append((name, options.page_error[layer, i, g], options.page_share[layer, i, g]))
            for name, error, share in pages:
                use = float(share) / (layers * kv_heads)
                variable((layer, "decode", g, name), float(error), (("decode", layer, g),), decode=use)
            for h, key in zip(heads, prefill_of, strict=True):
                variable((layer, "prefill", h, "full"), 0.0, (key,), pairs=1 / (layers * q_heads))
                for i, name in enumerate(options.prefill[layer, :, h]):
                    use = float(options.prefill_cost[layer, i, h]) / (layers * q_heads)
                    error = float(options.prefill_error[layer, i, h])
                    variable((layer, "prefill", h, name), error, (key,), pairs=use)
    picked = _solve(cost, rows, limits)
    return _choices([choices[i] for i in picked], layers, q_heads, kv_heads)


def _solve(cost: list[float], rows: list[tuple], limits: dict[str, float]) -> np.ndarray:
    """Variables that are one in the cheapest choice: budgets at most, every other constraint exactly one."""
    keys = {key: i for i, key in enumerate(dict.fromkeys(key for key, _, _ in rows))}
    at = [keys[key] for key, _, _ in rows]
    use = coo_array(
        ([u for _, _, u in rows], (at, [i for _, i, _ in rows])), shape=(len(keys), len(cost))
    ).tocsr()
    low = np.array([-np.inf if key in limits else 1.0 for key in keys])
    high = np.array([limits.get(key, 1.0) if isinstance(key, str) else 1.0 for key in keys])
    found = milp(
        np.array(cost),
        constraints=LinearConstraint(use, low, high),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-3, "time_limit": 60},
    )
    if found.x is None:
        least = ", ".join(f"{name} {limit}" for name, limit in limits.items())
        raise Infeasible(f"no choice of patterns meets the budgets ({least}): {found.message}")
    return np.flatnonzero(found.x > 0.5)


def _choices(picked: list[tuple], layers: int, q_heads: int, kv_heads: int) -> list[Choice]:
    prefill = [["full"] * q_heads for _ in range(layers)]
    cache = [["full"] * kv_heads for _ in range(layers)]
    decode = [["full"] * kv_heads for _ in range(layers)]
    group = q_heads // kv_heads
    for layer, kind, head, name in picked:
        if kind == "ring":
            cache[layer][head], decode[layer][head] = name, "ring"
            prefill[layer][head * group : (head + 1) * group] = [name] * group
        elif kind == "decode":
            decode[layer][head] = name
        elif kind == "prefill":
            prefill[layer][head] = name
    return [Choice(tuple(p), tuple(c), tuple(d)) for p, c, d in zip(prefill, cache, decode, strict=True)]
