"""One choice a head under budgets, as an integer programme (scipy's HiGHS).

A kv head is either a ring, and then its q heads stream with it, or each of its q heads takes a
prefill pattern, and the kv head evicts or keeps its cache, perhaps in fewer bits, and takes a page
selector; all may stay full. The sum of effects is least; mean pair density, cache share and decode
share stay within their budgets. All heads here do equal work without a plan, so that means over
them are shares of it. Layers that read another's keys have its choice of cache and decode, whose
effect is the sum of theirs; each has its own patterns, and none keeps anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from hfsparse.errors import Error
from hfsparse.plan import Layer


@dataclass(frozen=True)
class Budget:
    """Greatest shares of what the layers without a window of their own do without a plan.

    A share of 1 is no limit: whole pages, and indexes of selectors, take a little more than keys
    alone. More than 1 is one, where a budget in GiB is so large. `loss`, where given, is a share of
    the sum of effects with the worst ring on every kv head.
    """

    pairs: float
    cache: float
    decode: float
    loss: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """The most that pairs, cache and decode may be."""
        shares = {"pairs": self.pairs, "cache": self.cache, "decode": self.decode}
        return {name: np.inf if share == 1 else share for name, share in shares.items()}

    def wider(self, by: float) -> Budget:
        """Each share by this part of its way to 1, the loss to 0."""
        shares = (self.pairs, self.cache, self.decode)
        pairs, cache, decode = (round(float(x + by * max(0, 1 - x)), 4) for x in shares)
        loss = None if self.loss is None else round(float(self.loss * (1 - by)), 6)
        return Budget(pairs, cache, decode, loss)


@dataclass(frozen=True)
class Options:
    """Measured choices: names, effects (what is lost) and costs, by layer and head."""

    prefill: np.ndarray  # [layers, options, q heads] names of patterns
    prefill_effect: np.ndarray
    prefill_cost: np.ndarray
    rings: list[str]
    ring_effect: np.ndarray  # [layers, rings, kv heads], of the whole group
    ring_cost: np.ndarray
    ring_kept: list[float]  # share of a row that each ring keeps, and that a decode step reads
    ring_read: list[float]
    selectors: list[str]
    page_effect: np.ndarray  # [layers, selectors, kv heads], of the whole group
    page_kept: list[float]  # as of rings: keys and the selector's index
    page_read: list[float]
    full_kept: float  # whole pages
    evictions: list[str] = field(default_factory=list)
    evict_effect: np.ndarray | None = None  # [layers, evictions, kv heads], of the whole group
    evict_kept: list[float] = field(default_factory=list)  # as of rings
    evict_read: list[float] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)  # full caches in fewer bits
    packed_effect: np.ndarray | None = None  # [layers, packed, kv heads], of the whole group
    packed_kept: list[list[float]] = field(default_factory=list)  # read by `full`, and by selectors
    producers: list[int] = field(default_factory=list)  # the layer whose keys each reads; none: own

    @property
    def members(self) -> dict[int, list[int]]:
        """The layers that read the keys of each that makes some, itself first."""
        found: dict[int, list[int]] = {}
        for layer, producer in enumerate(self.producers or range(len(self.prefill))):
            found.setdefault(producer, []).append(layer)
        return found


class Infeasible(Error):
    """No choice meets the budgets; `least`: the smallest that each share can be by itself."""

    least: dict[str, float] | None = None


@dataclass
class _Programme:
    """Variables that are 0 or 1: each group takes one, and uses stay within limits."""

    limits: dict[str, float]
    loss: list[float] = field(default_factory=list)
    names: list[dict[tuple, str]] = field(default_factory=list)  # by group, what it then takes
    uses: list[tuple] = field(default_factory=list)  # constraint, variable, coefficient

    def add(self, groups: list[tuple], name: str, loss: float, **uses: float) -> None:
        """Add a choice called `name`, which counts in each of `groups`."""
        self.add_named(dict.fromkeys(groups, name), loss, **uses)

    def add_named(self, groups: dict[tuple, str], loss: float, **uses: float) -> None:
        """Add a choice that has a name of its own in each of `groups`."""
        at = len(self.loss)
        self.uses.extend((group, at, 1.0) for group in groups)
        self.uses.extend((key, at, float(use)) for key, use in uses.items())
        self.loss.append(float(loss))
        self.names.append(groups)

    def limit_loss(self, most: float) -> None:
        """Bound the loss by `most`, and minimise the sum of what has limits in its place."""
        self.uses += [("loss", at, loss) for at, loss in enumerate(self.loss)]
        self.minimise(*self.limits)
        self.limits["loss"] = most

    def minimise(self, *limited: str) -> None:
        """Minimise what is used of these limits, in sum, in place of the loss."""
        self.loss = [0.0] * len(self.loss)
        for key, at, use in self.uses:
            if key in limited:
                self.loss[at] += use

    def solve(self) -> tuple[dict[tuple, str], float]:
        """What each group takes at least loss, and the loss."""
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
        if found.status != 0:  # infeasible, or not solved in time: half a search is no plan
            raise Infeasible("" if found.status == 2 else f": {found.message}")
        taken = (self.names[i] for i in np.flatnonzero(found.x > 0.5))
        return dict(chain.from_iterable(each.items() for each in taken)), float(found.fun)


def allocate(options: Options, budget: Budget) -> list[Layer]:
    """The choice of least effect, a Layer each; Infeasible where no choice meets the budgets."""
    layers, _, q_heads = options.prefill.shape
    kv_heads = options.ring_effect.shape[2]
    try:
        taken, _ = _build_programme(options, budget).solve()
    except Infeasible as error:
        loss = "" if budget.loss is None else f", loss {budget.loss}"
        least = {share: _find_smallest(options, share, budget.loss) for share in budget.limits}
        pairs, cache, decode = (f"{share:.3f}" for share in least.values())
        problem = Infeasible(
            f"no choice of patterns meets the budgets (pair density {budget.pairs}, cache share "
            f"{budget.cache:.5g}, decode share {budget.decode}{loss}){error}. The smallest that "
            f"each can be by itself: pair density {pairs}, cache share {cache}, decode share "
            f"{decode}"
        )
        problem.least = least
        raise problem from None
    read = dict.fromkeys(options.rings, "ring") | dict.fromkeys(options.evictions, "kept")
    choices, keeps = [], options.producers or range(layers)
    for layer, at in enumerate(keeps):
        prefill = tuple(taken["prefill", layer, h] for h in range(q_heads))
        cache = tuple(taken["cache", at, g] for g in range(kv_heads))
        decode = tuple(read.get(kept) or taken["decode", at, g] for g, kept in enumerate(cache))
        choices.append(Layer(prefill, cache, decode))
    return choices


def find_least_loss(options: Options, budget: Budget) -> float:
    """Sum of effects of the choice that `allocate` makes; Infeasible where there is none."""
    return _build_programme(options, budget).solve()[1]


def _find_smallest(options: Options, share: str, loss: float | None) -> float:
    """The smallest that one share can be, within a budget of loss if one is given."""
    programme = _build_programme(options, Budget(1, 1, 1, loss))
    programme.minimise(share)
    return programme.solve()[1]


def sum_losses(options: Options, layers: Sequence[Layer]) -> np.ndarray:
    """What each kv head of a choice loses, its q heads in prompts and its decode: [layers, Hkv]."""
    kv_heads = options.ring_effect.shape[2]
    group, found = options.prefill.shape[2] // kv_heads, np.zeros((len(layers), kv_heads))
    for at, layer in enumerate(layers):
        for g, (cache, decode) in enumerate(zip(layer.cache, layer.decode, strict=True)):
            if cache in options.rings:
                found[at, g] = options.ring_effect[at, options.rings.index(cache), g]
                continue
            for h in range(g * group, (g + 1) * group):
                same = options.prefill[at, :, h] == layer.prefill[h]  # none, where it is full
                found[at, g] += options.prefill_effect[at, same, h][:1].sum()
            if cache in options.evictions:
                found[at, g] += options.evict_effect[at, options.evictions.index(cache), g]
            if cache in options.packed:
                found[at, g] += options.packed_effect[at, options.packed.index(cache), g]
            if decode in options.selectors:
                found[at, g] += options.page_effect[at, options.selectors.index(decode), g]
    return found


def _build_programme(options: Options, budget: Budget) -> _Programme:
    layers, _, q_heads = options.prefill.shape
    kv_heads = options.ring_effect.shape[2]
    group, members = q_heads // kv_heads, options.members
    # A kv head's part of a mean: over layers, and over those that keep keys.
    one, held = 1 / (layers * kv_heads), 1 / (len(members) * kv_heads)
    programme = _Programme(budget.limits)
    for at, readers in members.items():
        reads = one * len(readers)
        for g in range(kv_heads):
            cache, decode, heads = ("cache", at, g), ("decode", at, g), range(group)
            prefill = [("prefill", layer, g * group + h) for layer in readers for h in heads]

            def total(effect: np.ndarray, i: int, readers=readers, g=g) -> float:
                return effect[readers, i, g].sum()

            for i, name in enumerate(options.rings):
                programme.add(
                    [cache, decode, *prefill],
                    name,
                    total(options.ring_effect, i),
                    pairs=one * total(options.ring_cost, i),
                    cache=held * options.ring_kept[i],
                    decode=reads * options.ring_read[i],
                )
            # What is kept is ranked by the queries of one layer: losses of others aren't measured.
            for i, name in enumerate(options.evictions if len(readers) == 1 else ()):
                programme.add(
                    [cache, decode],
                    name,
                    total(options.evict_effect, i),
                    cache=held * options.evict_kept[i],
                    decode=reads * options.evict_read[i],
                )
            for i, name in enumerate(options.packed):
                lost = total(options.packed_effect, i)
                for j, word in enumerate(["full", *options.selectors]):
                    programme.add_named(
                        {cache: name, decode: word},
                        lost + (total(options.page_effect, j - 1) if j else 0.0),
                        cache=held * options.packed_kept[i][j],
                        decode=reads * (options.page_read[j - 1] if j else 1.0),
                    )
            programme.add([cache], "full", 0.0)
            programme.add([decode], "full", 0.0, cache=held * options.full_kept, decode=reads)
            for i, name in enumerate(options.selectors):
                kept, read = held * options.page_kept[i], reads * options.page_read[i]
                programme.add(
                    [decode], name, total(options.page_effect, i), cache=kept, decode=read
                )
            for key in prefill:
                _, layer, h = key
                programme.add([key], "full", 0.0, pairs=one / group)
                for i, name in enumerate(options.prefill[layer, :, h]):
                    cost = options.prefill_cost[layer, i, h]
                    effect = options.prefill_effect[layer, i, h]
                    programme.add([key], name, effect, pairs=one / group * cost)
    if budget.loss is not None:
        programme.limit_loss(budget.loss * options.ring_effect.max(1).sum())
    return programme
