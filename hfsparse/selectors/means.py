"""Means of units, which stand for those that a step leaves out: its index beside a selector's."""

from __future__ import annotations

from torch import Tensor

MEANS = ("mean_key", "mean_value")


def unit_means(keys: Tensor, values: Tensor, real: Tensor, unit: int) -> dict[str, Tensor]:
    """Of pages of keys and values `[B, H, n, PAGE, D]`: each unit's means `[B, H, n, each, D]`.

    Over the tokens that are `real`, as `Selector.summarise` has it; 0 where a unit has none.
    """
    real = real.unflatten(3, (-1, unit))
    number = real.sum(4).clamp(min=1)
    found = {}
    for name, x in zip(MEANS, (keys, values), strict=True):
        tokens = x.float().unflatten(3, (-1, unit)).masked_fill(~real, 0)
        found[name] = (tokens.sum(4) / number).to(x.dtype)
    return found
