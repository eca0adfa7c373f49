"""One choice a head under budgets, as two integer programmes (scipy's HiGHS).

First which kv heads become rings, of what size: the sum of their effects on the answers is least, within
the cache budget, and within the pair and decode budgets even if all other heads took their cheapest
choice. Then a prefill pattern for each other q head and a page selector for each other kv head: the sum of
output errors is least, within what the rings leave of the pair and decode budgets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array


@dataclass(frozen=True)
class Budget:
    """Greatest mean shares of dense attention, over all heads that may be sparse."""

    pairs: float
    cache: float
    decode: float


@dataclass(frozen=True)
class Options:
    """Measured choices: names, what they lose and what they cost, by layer and head."""

    prefill: np.ndarray  # [layers, options, q heads] names of patterns
    prefill_error: np.ndarray  # relative, after o_proj
    prefill_cost: np.ndarray
    rings: list[str]
    ring_effect: np.ndarray  # [layers, rings, kv heads], of the whole group on the answer's margin
    ring_cost: np.ndarray
    ring_kept: list[float]  # share of a row that each ring keeps, and that a decode step reads of it
    ring_read: list[float]
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


@dataclass
class _Programme:
    """Variables that are 0 or 1: one of each group is taken, and uses stay within limits."""

    limits: dict[str, float]
    loss: list[float] = field(default_factory=list)
    names: list[tuple] = field(default_factory=list)
    uses: list[tuple] = field(default_factory=list)  # constraint, variable, coefficient

    def add(self, group: tuple, name: str, loss: float, **uses: float) -> None:
        at = len(self.loss)
        self.uses.append((group, at, 1.0))
        self.uses.extend((key, at, float(use)) for key, use in uses.items())
        self.loss.append(float(loss))
        self.names.append((group, name))

    def solve(self) -> dict[tuple, str]:
        """What each group takes, at least loss."""
        rows = {key: i for i, key in enumerate(dict.fromkeys(key for key, _, _ in self.uses))}
        keys, columns, values = zip(*self.uses, strict=True)
        shape = (len(rows), len(self.loss))
        use = coo_array((values, ([rows[key] for key in keys], columns)), shape=shape).tocsr()
        low = [-np.inf if key in self.limits else 1.0 for key in rows]
        high = [self.limits.get(key, 1.0) for key in rows]
        found = milp(
            np.array(self.loss),
            constraints=LinearConstraint(use, low, high),
            integrality=np.ones(len(self.loss)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-3, "time_limit": 60},
        )
        if found.x is None:
            raise Infeasible(found.message)
        return dict(self.names[i] for i in np.flatnonzero(found.x > 0.5))


def allocate(options: Options, budget: Budget) -> list[Choice]:
    """The choice of least loss, a Choice a layer; Infeasible where no choice meets the budgets."""
    layers, _, q_heads = options.prefill.shape
    kv_heads = options.ring_effect.shape[2]
    group = q_heads // kv_heads
    try:
        cache = _rings(options, budget, group).solve()
        rest = _rest(options, budget, group, cache).solve()
    except Infeasible as error:
        raise Infeasible(
            f"no choice of patterns meets the budgets (pair density {budget.pairs}, cache share "
            f"{budget.cache}, decode share {budget.decode}): {error}"
        ) from None
    choices = []
    for layer in range(layers):
        kept = [cache["cache", layer, g] for g in range(kv_heads)]
        prefill = [rest.get(("prefill", layer, h), kept[h // group]) for h in range(q_heads)]
        decode = [rest.get(("decode", layer, g), "ring") for g in range(kv_heads)]
        choices.append(Choice(tuple(prefill), tuple(kept), tuple(decode)))
    return choices


def _rings(options: Options, budget: Budget, group: int) -> _Programme:
    layers, _, kv_heads = options.ring_effect.shape
    one = 1 / (layers * kv_heads)  # a kv head's part of a mean
    cheapest = options.prefill_cost.min(1).reshape(layers, kv_heads, group).mean(2)
    fewest = options.page_share.min(1)
    programme = _Programme({"pairs": budget.pairs, "cache": budget.cache, "decode": budget.decode})
    for layer in range(layers):
        for g in range(kv_heads):
            key = ("cache", layer, g)
            pairs, pages = one * cheapest[layer, g], one * fewest[layer, g]
            programme.add(key, "full", 0.0, pairs=pairs, cache=one, decode=pages)
            for i, name in enumerate(options.rings):
                pairs = one * options.ring_cost[layer, i, g]
                kept, read = one * options.ring_kept[i], one * options.ring_read[i]
                effect = options.ring_effect[layer, i, g]
                programme.add(key, name, effect, pairs=pairs, cache=kept, decode=read)
    return programme


def _rest(options: Options, budget: Budget, group: int, cache: dict[tuple, str]) -> _Programme:
    layers, _, q_heads = options.prefill.shape
    kv = 1 / (layers * q_heads // group)
    ring = {name: i for i, name in enumerate(options.rings)}
    taken = [(layer, ring[name], g) for (_, layer, g), name in cache.items() if name in ring]
    pairs = budget.pairs - kv * sum(options.ring_cost[at] for at in taken)
    decode = budget.decode - kv * sum(options.ring_read[i] for _, i, _ in taken)
    programme = _Programme({"pairs": pairs, "decode": decode})
    for (_, layer, g), name in cache.items():
        if name in ring:
            continue
        programme.add(("decode", layer, g), "full", 0.0, decode=kv)
        for i, selector in enumerate(options.selectors):
            share, error = options.page_share[layer, i, g], options.page_error[layer, i, g]
            programme.add(("decode", layer, g), selector, error, decode=kv * share)
        for h in range(g * group, (g + 1) * group):
            programme.add(("prefill", layer, h), "full", 0.0, pairs=kv / group)
            for i, pattern in enumerate(options.prefill[layer, :, h]):
                cost, error = options.prefill_cost[layer, i, h], options.prefill_error[layer, i, h]
                programme.add(("prefill", layer, h), pattern, error, pairs=kv / group * cost)
    return programme
