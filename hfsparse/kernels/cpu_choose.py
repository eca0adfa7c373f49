"""Which units of a cache a decode step reads, on a CPU: `Budget.choose` in few operations.

Rows' lengths are read from the tensor, which costs nothing here: budgets are the host's numbers,
nothing beyond a row is masked, and a row that reads all of its units scores none. Rows of one
length choose together, others one after another.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hfsparse.kernels.need import Need
from hfsparse.lists import PAGE, PageLists
from hfsparse.selectors.budget import Budget


def why_not(need: Need) -> str | None:
    """Why it can't serve, if it can't."""
    if need.device.type != "cpu":
        return f"serves the CPU, not {need.device.type}"
    if not hasattr(need.chooser, "scores"):
        return f"{need.chooser.kind} has no scores"
    budget = need.chooser.budget
    return "no refresh, top_p or means" if budget.counted or budget.means else None


def pages(
    selector,
    q: Tensor,
    index: dict[str, Tensor],
    length: Tensor,
    scale: float,
    heads: slice | Tensor = slice(None),
    below: int = 0,
    choice: None = None,
    read: None = None,
) -> PageLists:
    """`selector.pages` of some heads of q, as `hfsparse.kernels.table` has it of SELECT."""
    q, rows, H = q[:, heads], length.tolist(), next(iter(index.values())).shape[1]
    if len({*rows}) == 1:
        units = _choose(selector, q, index, length, rows[0] if rows[0] >= below else 0, scale, H)
        count = torch.full(units.shape[:2], units.shape[2], device="cpu")
        return PageLists(units, count, selector.budget.unit)
    found = []
    for b, n in enumerate(rows):
        row = slice(b, b + 1)
        own = {name: t[row, :, : -(-n // PAGE)] for name, t in index.items()}
        n = n if n >= below else 0
        found.append(_choose(selector, q[row], own, length[row], n, scale, H))
    count = torch.tensor([units.shape[2] for units in found], device="cpu")[:, None]
    width = max(units.shape[2] for units in found)
    units = torch.cat([pad(units, (0, width - units.shape[2])) for units in found])
    return PageLists(units, count.expand(-1, H), selector.budget.unit)


def _choose(
    selector, q: Tensor, index: dict[str, Tensor], length: Tensor, n: int, scale: float, H: int
) -> Tensor:
    """[b, H, count] the units that the last Q of n tokens read, as `Budget.best` has them."""
    budget = selector.budget
    total, newest, count = _reading(budget, n, q.shape[2])
    if count >= total:
        return torch.arange(total, device="cpu").expand(len(q), H, -1)
    scores = selector.scores(q, index, length, scale)[..., :total]
    vote = torch.softmax(scores, -1).view(len(q), H, -1, total).amax(2)
    vote[..., : budget.per_page].fill_(torch.inf)
    vote[..., newest:].fill_(torch.inf)
    best = torch.sort(vote, dim=-1, descending=True, stable=True).indices[..., :count]
    return best.sort(-1).values


@lru_cache  # the layers of a step ask alike
def _reading(budget: Budget, n: int, queries: int) -> tuple[int, ...]:
    return tuple(int(t) for t in budget.reading(np.int64(n), queries))
