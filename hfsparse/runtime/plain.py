"""Short prompts that every layer of a call reads alike: densely, and no row has pads or a past.

A layer's Python is much of such a prompt's time, so that what one layer found serves the others:
they ask whether they are like it, call the same kernel and let their keys wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfsparse.kernels import Kernel
from hfsparse.lists import Grid
from hfsparse.lists.lengths import Lengths
from hfsparse.precision import casts
from hfsparse.runtime.call import Call
from hfsparse.runtime.counts import Counts
from hfsparse.runtime.layer_plan import LayerPlan
from hfsparse.runtime.rows import NO_GUARD, device_guard


class PlainPrompt:
    """How one layer of a call has read a prompt, q `[B, Hq, Q, D]` over k and v `[B, Hkv, Q, D]`.

    case: whether rows are under below.prefill, and below.cache; work: pairs and blocks of dense
    attention.
    """

    def __init__(
        self,
        case: tuple[bool, bool],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Lengths,
        grid: Grid,
        work: tuple[int, int],
        kernel: Kernel,
    ):
        self.case, self.lengths, self.grid, self.work = case, lengths, grid, work
        self.run, self.guard = kernel.run, device_guard(q)
        # In what layers that are alike agree, and their caches.
        self.shapes, self.dtype, self.place = (q.shape, k.shape, v.shape), q.dtype, q.device
        self.readers: list[tuple[Counts, tuple[int, ...]]] = []  # not counted yet
        self.types, self.kind = (k.dtype, v.dtype), q.device.type

    def attend(
        self, call: Call, layer_plan: LayerPlan, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor | None:
        """Another layer's attention `[B, Hq, Q, Dv]`; None: it is not alike, nothing is done."""
        layer, heads = call.layer, layer_plan.plain_heads.get(self.case)
        if (
            layer is None
            or heads is None
            or layer_plan.owner != call.owner
            or layer.seen != self.lengths.columns
            or layer.rows != self.lengths.past
            or (q.shape, k.shape, v.shape) != self.shapes
            or (k.dtype, v.dtype) != self.types
            or layer.types != self.types
            or q.dtype != self.dtype
            or q.device != self.place
            or torch.is_grad_enabled()
            or casts(self.kind)
            or not layer.put_off(k, v, self.lengths)
        ):
            return None
        call.layer, call.taken[layer.index] = None, layer
        layer.rows = self.lengths.rows
        self.readers.append((layer_plan.counts, heads))
        if self.guard is NO_GUARD:
            return self.run(q, k, v, self.grid, scale=scale)
        with self.guard:
            return self.run(q, k, v, self.grid, scale=scale)

    def count(self) -> None:
        """What other layers have read; layer by layer, Python would wait for memory."""
        for counts, heads in self.readers:
            counts.add(counts.whole, heads, self.work)
