"""One layer's attention in a call."""

from __future__ import annotations

from torch import Tensor

from hfsparse.lists.lengths import Lengths
from hfsparse.runtime.cache.layer import CacheLayer
from hfsparse.runtime.call import Call
from hfsparse.runtime.latent import Latents
from hfsparse.runtime.layer_plan import LayerPlan, Logits
from hfsparse.runtime.masks import shift_rows


class LayerCall:
    """What attention is given in one layer, rows moved to column 0; the cache's are longer by it.

    layer: of the cache, None without one. mask: the first real column of each row `[B]`, None: all
    0. q `[B, Hq, Q, D]`, k `[B, Hkv, Q, D]`, v `[B, Hkv, Q, Dv]`: by columns. latents: of which k
    and v were made, where the cache keeps those.
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
        columns = q.shape[2]
        starts = None if mask is None else call.starts_of(mask)
        before = 0 if layer is None else layer.seen - columns
        self.lengths = call.once(Lengths.of, starts, before, columns, q.shape[0])
        if layer is not None:
            layer.advance(self.lengths)
        self.pads: Tensor | None = None  # [B] columns that rows were moved by
        if self.lengths.padded:
            self.pads = call.once(self.lengths.pads, q.device)
            q, k, v = (shift_rows(t, self.pads) for t in (q, k, v))
        self.q, self.k, self.v, self.latents = q, k, v, latents
        self.kept = k, v  # what the cache takes
        if latents is not None:
            self.kept = latents.kept
            if self.pads is not None:
                self.kept = tuple(shift_rows(t, self.pads) for t in latents.kept)

    def expand(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as prompts read them, of what the cache holds."""
        return (k, v) if self.latents is None else self.latents.expand(k)
