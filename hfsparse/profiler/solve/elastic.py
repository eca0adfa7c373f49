"""One rule a q head and at most two a layer, as an integer programme over several lengths (MoA).

Least loss at one length, with the losses at the others, pair density and cache share bounded at
each; `pareto` is the set of such choices that no other found beats at every length. The two rules
of a layer are nested, so a kv head's ring is the widest rule of its q heads, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, csr_array, identity, kron

from hfsparse.profiler.solve.allocation import Budget, Infeasible

LIMIT = 2  # rules a layer
POINTS = 5  # steps of a bounded loss, its ends included
GAP = 1e-2  # a loss this much (relative) above the least is as good


@dataclass(frozen=True)
class Programme:
    """One rule a q head, at least loss, within the budgets at each length.

    Variables: x `[layers, q heads, rules]`, the head takes the rule; y `[layers, rules]`, the layer
    may use it; c `[layers, kv heads, lengths]`, the share of its cache that a kv head keeps.
    """

    costs: np.ndarray  # [losses, layers, q heads, rules]
    pairs: np.ndarray  # [lengths, rules]
    held: np.ndarray  # [lengths, rules]
    crossing: np.ndarray  # [rules, rules]
    kv_heads: int
    budget: Budget

    def solve(self, at: int, limits: np.ndarray | None = None) -> np.ndarray | None:
        """Rules `[layers, q heads]` of least loss at length `at`; None: none within the limits."""
        losses, layers, heads, rules = self.costs.shape
        aim, (matrix, low, high) = self.scaled[at].ravel(), self.constraints
        if limits is not None:
            high = np.concatenate([high[:-losses], limits])
        width, free = matrix.shape[1], matrix.shape[1] - aim.size
        whole = np.arange(width) < width - layers * self.kv_heads * len(self.held)
        found = milp(
            np.pad(aim, (0, free)),
            constraints=LinearConstraint(matrix, low, high),
            integrality=whole,
            bounds=Bounds(0, np.where(whole, 1, np.inf)),
            options={"mip_rel_gap": GAP, "time_limit": 600},
        )
        if found.status == 2:
            return None
        if found.status != 0:  # half a search is no plan
            raise Infeasible(f"the choice of rules was not solved: {found.message}")
        return found.x[: aim.size].reshape(layers, heads, rules).argmax(2)

    @cached_property
    def scaled(self) -> np.ndarray:
        """Costs as parts of the most that can be lost, for the solver's tolerances."""
        most = self.costs.max(3).sum((1, 2))
        return self.costs / np.where(most > 0, most, 1)[:, None, None, None]

    def loss(self, choice: np.ndarray) -> np.ndarray:
        """Losses at each length of rules `[layers, q heads]`, scaled."""
        return np.take_along_axis(self.scaled, choice[None, ..., None], 3).sum((1, 2, 3))

    @cached_property
    def constraints(self) -> tuple[csr_array, np.ndarray, np.ndarray]:
        losses, layers, heads, rules = self.costs.shape
        lengths, kv, most = len(self.held), self.kv_heads, self.budget.limits
        all_heads, all_kv, group = layers * heads, layers * kv, heads // kv
        per_layer = kron(_eye(layers), np.ones((heads, 1)))
        per_group = kron(_eye(all_kv), np.ones((group, 1)))
        nested = LIMIT * np.eye(rules) + self.crossing  # y_r = 1 forbids what crosses r
        rows = [  # x, y, c, least, most
            (kron(_eye(all_heads), np.ones((1, rules))), None, None, 1, 1),
            (_eye(all_heads * rules), -kron(per_layer, _eye(rules)), None, -np.inf, 0),
            (None, kron(_eye(layers), np.ones((1, rules))), None, -np.inf, LIMIT),
            (None, kron(_eye(layers), nested), None, -np.inf, LIMIT),
            (_mean(self.pairs, all_heads), None, None, -np.inf, most["pairs"]),
            (kron(_eye(all_heads), self.held), None, -kron(per_group, _eye(lengths)), -np.inf, 0),
            (None, None, _mean(np.eye(lengths), all_kv), -np.inf, most["cache"]),
            (csr_array(self.scaled.reshape(losses, -1)), None, None, -np.inf, np.inf),
        ]
        sizes = [next(part for part in row[:3] if part is not None).shape[0] for row in rows]
        matrix = block_array([row[:3] for row in rows], format="csr")
        low, high = (np.repeat([float(row[i]) for row in rows], sizes) for i in (3, 4))
        return matrix, low, high


def _eye(n: int) -> csr_array:
    return csr_array(identity(n))


def _mean(each: np.ndarray, count: int) -> csr_array:
    """Means over `count` of variables that come in runs as long as a row of `each`."""
    return kron(np.full((1, count), 1 / count), csr_array(each))


def pareto(programme: Programme) -> np.ndarray:
    """Choices `[plans, layers, q heads]` that no other found beats in the losses at all lengths.

    The epsilon-constraint method: for each length least loss there, the others under each of
    POINTS - 1 limits between the least and the most that they take when one length alone counts.
    """
    count = len(programme.costs)
    alone = [programme.solve(at) for at in range(count)]
    if any(choice is None for choice in alone):
        raise Infeasible(
            f"no rules meet the budgets (pair density {programme.budget.pairs}, cache share "
            f"{programme.budget.cache}) at each length and at the unseen one"
        )
    ends = np.array([programme.loss(choice) for choice in alone])
    levels = np.linspace(ends.min(0), ends.max(0), POINTS)[1:]
    found = list(alone)
    for at in range(count):
        solved = [(np.full(count, np.inf), alone[at])]
        for cell in product(range(len(levels))[::-1], repeat=count - 1):
            steps = np.insert(np.array(cell, dtype=int), at, 0)
            limits = levels[steps, np.arange(count)] * (1 + GAP)
            limits[at] = np.inf
            if not _is_known(programme, solved, limits):
                solved.append((limits, programme.solve(at, limits)))
        found += [choice for _, choice in solved[1:] if choice is not None]
    found = list({choice.tobytes(): choice for choice in found}.values())
    loss = np.array([programme.loss(choice) for choice in found])
    better = (loss[:, None] <= loss).all(2) & (loss[:, None] < loss).any(2)
    return np.array(
        [choice for choice, beaten in zip(found, better.any(0), strict=True) if not beaten]
    )


def _is_known(programme: Programme, solved: list, limits: np.ndarray) -> bool:
    """Whether wider limits had no answer, or one that lies within these too."""
    wider = (choice for other, choice in solved if (other >= limits).all())
    return any(choice is None or (programme.loss(choice) <= limits).all() for choice in wider)
