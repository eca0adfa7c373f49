"""One layer's attention in a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfsparse.kernels.rows import q_heads_of
from hfsparse.lists.lengths import Lengths, on_device
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.call import Call
from hfsparse.runtime.latent import Latents
from hfsparse.runtime.layer_plan import LayerPlan, Logits
from hfsparse.runtime.masks import shift_rows


class LayerCall:
    """What attention is given in one layer, rows moved to column 0; the cache's are longer by it.

    layer: of the cache, None without one. mask: the first real column of each row `[B, 1, 1, 1]`,
    None: all 0. q `[B, Hq, Q, D]`, k `[B, Hkv, S, D]`, v `[B, Hkv, S, Dv]`: by columns. S is Q but
    where another layer's keys are read and, of its queries, only the last ones are of use. latents:
    of which k and v were made, where the cache keeps those.
    """

    def __init__(
        self,
        call: Call,
        layer_plan: LayerPlan,
        layer: CacheLayer | None,
        mask: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits: Logits,
        latents: Latents | None = None,
    ):
        self.call, self.layer_plan, self.layer, self.logits = call, layer_plan, layer, logits
        (batch, _, columns, _), given = q.shape, k.shape[2]
        starts = None if mask is None else call.starts_of(mask)
        seen = given if layer is None else layer.seen
        self.lengths = call.once(Lengths.of, starts, seen - columns, columns, batch)
        self.given = self.lengths  # of the keys
        if given != columns:
            self.given = call.once(Lengths.of, starts, seen - given, given, batch)
        if layer is not None and layer_plan.producer is None:
            layer.advance(self.lengths)
        self.pads: Tensor | None = None  # [B] columns that rows were moved by
        if self.lengths.padded:
            self.pads = call.once(self.lengths.pads, q.device)
            q = shift_rows(q, self.pads)
        if self.given.padded:
            pads = call.once(self.given.pads, q.device)
            k, v = shift_rows(k, pads), shift_rows(v, pads)
        self.q, self.k, self.v, self.latents = q, k, v, latents
        self.kept = k, v  # what the cache takes
        if latents is not None:
            self.kept = latents.kept
            if self.pads is not None:
                self.kept = tuple(shift_rows(t, self.pads) for t in latents.kept)

    def newest_queries(
        self, kv_heads: Sequence[int], count: int | None
    ) -> tuple[Tensor, slice | Tensor]:
        """Of each row the last `count` new queries, or all that it has, as the cache's keys take
        them: `[B, heads, n, D]`, of those q heads that read some kv heads, and an index of these.
        """
        layer_plan, q, new = self.layer_plan, self.q, self.lengths.new
        ratio = layer_plan.counts.q_heads // layer_plan.kv_heads
        at = layer_plan.at(q_heads_of(kv_heads, ratio), q.device)
        q, n = q[:, at], q.shape[2] if count is None else min(count, q.shape[2])
        if n < q.shape[2]:
            first = on_device([max(m - n, 0) for m in new], q.device)
            rows = (first[:, None] + torch.arange(n, device=q.device))[:, None, :, None]
            q = q.gather(2, rows.expand(-1, q.shape[1], -1, q.shape[3]))
        return (q if self.latents is None else self.latents.absorb(q)), at

    def expand(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as prompts read them, of what the cache holds."""
        return (k, v) if self.latents is None else self.latents.expand(k)
