"""The patterns that look at q and k, fused: `lists(pattern, ...)` is `pattern.lists(...)` on a GPU.

No host synchronisation, and no map of scores larger than SCRATCH or the lists themselves: scores
are made and turned into lists for some query blocks after others. Each family of patterns makes its
scores in a file of its own; `select` does the second half, but of `sample` and `hip`, which choose
by their own definitions, `hip` by a map of all blocks. `antidiagonal`, `energy` and `sample` are
bound by FLOPs, the others by reading q and k once or twice, `hip` more often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from hfsparse.kernels.triton import (
    estimate_antidiagonal,
    estimate_flexprefill,
    estimate_keys,
    estimate_means,
    estimate_probes,
    select,
)
from hfsparse.kernels.triton.limits import BLOCKS, WIDEST
from hfsparse.lists import BlockLists, Grid
from hfsparse.patterns.antidiagonal import Antidiagonal
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.energy import Energy
from hfsparse.patterns.flexprefill import FlexPrefill
from hfsparse.patterns.hip import HiP
from hfsparse.patterns.sample import Sample
from hfsparse.patterns.sparge import Sparge
from hfsparse.patterns.vertical_slash import VerticalSlash

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need

PARTS = (  # where the kernels are
    estimate_antidiagonal,
    estimate_flexprefill,
    estimate_keys,
    estimate_means,
    estimate_probes,
    select,
)
FUSED: dict[type, Callable] = {
    VerticalSlash: estimate_probes.vertical_slash,
    BlockTopK: estimate_means.block_topk,
    Antidiagonal: estimate_antidiagonal.antidiagonal,
    Energy: estimate_means.energy,
    Sparge: estimate_means.sparge,
    FlexPrefill: estimate_flexprefill.flexprefill,
    Sample: estimate_keys.sample,
    HiP: estimate_keys.hip,
}


def lists(pattern, q: Tensor, k: Tensor, grid: Grid, scale: float) -> BlockLists:
    """Blocks kept for q `[B, H, Sq, D]` over k `[B, Hkv, Sk, D]`."""
    q, k = (t.detach() if t.stride(-1) == 1 else t.detach().contiguous() for t in (q, k))
    return FUSED[type(pattern)](pattern, q, k, grid, scale)


def why_not(need: Need) -> str | None:
    """Why these kernels can't choose a pattern's blocks; None: they can."""
    kind = type(need.chooser)
    if kind not in FUSED:
        return f"{need.chooser.kind} is not fused"
    if need.head_dim > WIDEST:
        return f"head dim {need.head_dim}: at most {WIDEST} is supported"
    if kind in (VerticalSlash, FlexPrefill, Sample) and not estimate_probes.stages(
        need.device, need.dtype, need.head_dim
    ):
        return f"{need.dtype} heads of {need.head_dim}: too wide for this GPU's shared memory"
    if need.dropped:
        return "a grid with dropped keys"
    if need.block not in BLOCKS:
        return f"blocks of {need.block} tokens: 16, 32, 64 and 128 are supported"
    return None
