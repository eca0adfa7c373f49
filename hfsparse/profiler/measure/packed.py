"""What steps read where a cache holds its keys and values in fewer bits.

Each page comes back as `hfsparse.lists.packed` packs it. A step at row p reads the page of token
p + 1, which is not full, as it came, and all others packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hfsparse.lists import PAGE
from hfsparse.lists.packed import Bits, pack, unpack
from hfsparse.profiler.measure.capture import Seen
from hfsparse.profiler.measure.exact import scores_of, weigh


@dataclass(frozen=True)
class ReadBack:
    """What steps at the n key rows of a layer find."""

    mass: Tensor  # [Hq, n, L] their attention, float32; a sink logit takes its share
    values: Tensor  # [Hq, L, Dv] as they come back
    lost: Tensor  # [Hq, L, Dv] what these lack of the values as they came
    whole: Tensor  # [n, L] bool: the page that is read as it came

    @classmethod
    def of(cls, seen: Seen, bits: Bits) -> ReadBack:
        """Of a layer whose full pages are in so many bits."""
        rows, (Hq, Hkv, L) = seen.keys, (seen.q.shape[1], *seen.k.shape[1:3])
        k, v = (come_back(t[0], bits, over) for t, over in ((seen.k, -2), (seen.v, -1)))
        place = torch.arange(L, device=rows.device)
        whole = place // PAGE == (rows[:, None] + 1) // PAGE
        scores = partial(scores_of, logits=seen.logits)
        mass = []
        for head in range(Hq):
            q, kv = seen.q[0, head, rows], head // (Hq // Hkv)
            mixed = torch.where(whole, scores(q, seen.k[0, kv]), scores(q, k[kv]))
            mass.append(weigh(mixed, rows, seen.logits, head))
        values, lost = (
            t.float().repeat_interleave(Hq // Hkv, 0) for t in (v, seen.v[0].float() - v.float())
        )
        return cls(torch.stack(mass), values, lost, whole)

    def output(self, kept: Tensor | None = None) -> Tensor:
        """Attention's output [Hq, n, Dv] over the keys of a mask [Hq, n, L]; None: over all."""
        mass = self.mass if kept is None else self.mass * kept
        share = 1 - (self.mass - mass).sum(-1)  # what a sink logit takes stays
        out = mass @ self.values + (mass * self.whole) @ self.lost
        return out / share.clamp(min=1e-9)[..., None]


def come_back(t: Tensor, bits: Bits, over: int) -> Tensor:
    """t `[H, L, D]` with its full pages packed and read again; steps are between ends over a page
    (-2) or a token (-1)."""
    full = t.shape[1] // PAGE * PAGE
    pages = t[:, :full].unflatten(1, (-1, PAGE))
    ends = pages.amin(over, keepdim=True), pages.amax(over, keepdim=True)
    return torch.cat([unpack(pack(pages, *ends, bits), *ends, bits).flatten(1, 2), t[:, full:]], 1)
