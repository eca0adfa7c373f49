"""Short prompts that every layer of a call reads alike: densely, and no row has pads or a past.

A layer's Python is much of such a prompt's time, so that what one layer found serves the others:
they ask whether they are like it, call the same kernel and let their keys wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfsparse.kernels import Kernel
from hfsparse.lists import Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.precision import casts
from hfsparse.runtime.call import Call, running
from hfsparse.runtime.layer_plan import LayerPlan
from hfsparse.runtime.rows import device_guard


def kind_of(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    """In what queries, keys and values of layers that are alike agree."""
    return q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device


@dataclass(frozen=True, eq=False)
class PlainPrompt:
    """How one layer of a call has read a prompt."""

    kind: tuple  # as `kind_of` tells it
    case: tuple[bool, bool]  # whether rows are under below.prefill, and below.cache
    lengths: Lengths
    grid: Grid
    work: tuple[int, int]  # pairs and blocks of dense attention
    kernel: Kernel

    def attend(
        self, call: Call, layer_plan: LayerPlan, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor | None:
        """Another layer's attention `[B, Hq, Q, Dv]`; None: it is not alike, nothing is done."""
        layer, lengths = call.layer, self.lengths
        if (
            layer is None
            or self.case not in layer_plan.plain_cases
            or kind_of(q, k, v) != self.kind
            or layer_plan.mode.observe is not None
            or torch.is_grad_enabled()
            or casts(q.device.type)
            or layer.types != (k.dtype, v.dtype)
            or layer.seen != lengths.columns
            or not layer.put_off(k, v, lengths)
        ):
            return None
        call.take_layer()
        layer.advance(lengths)
        counts = layer_plan.counts
        counts.add(counts.whole, layer_plan.cases[self.case].heads, self.work)
        with device_guard(q):
            return self.kernel.run(q, k, v, self.grid, scale=scale)


def plain_prompt(layer_plan: LayerPlan | None) -> PlainPrompt | None:
    """What another layer of the call that runs has found, if it is a call of this layer's patch."""
    call = running()
    mine = call is not None and layer_plan is not None and call.owner == layer_plan.owner
    return call.plain if mine else None
