"""How many query-key pairs BlockLists keep, counted on the GPU: `BlockLists.pairs` in one launch.

A program counts one query block of one head, a block's keys as an interval. Bound by its launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfsparse.kernels.triton.limits import NEVER, bands_on
from hfsparse.lists import BlockLists

if TYPE_CHECKING:
    from hfsparse.kernels.need import Need


def why_not(need: Need) -> str | None:
    """It counts wherever Triton runs."""


def pairs(lists: BlockLists) -> Tensor:
    """[B, H] int64."""
    grid, B, H = lists.grid, len(lists.grid.q_len), lists.heads
    device = grid.q_len.device
    out = torch.zeros(B, H, dtype=torch.int64, device=device)
    full = lists.full_count.expand(B, -1, -1)
    part, index = lists.part_count.expand(B, -1, -1), lists.part_index.expand(B, -1, -1, -1)
    columns, covered = full, index  # stand-ins that are not read
    if lists.columns is not None:
        columns = lists.columns.clamp(max=NEVER.value).int().expand(B, -1, -1)
        covered = lists.covered.view(torch.uint8).expand(B, -1, -1, -1)
    _pairs[(B * H * grid.nq,)](
        *(out, grid.q_len, grid.k_len, grid.first, grid.live, bands_on(lists.bands, str(device))),
        *(full, part, index, columns, covered),
        *(grid.first.stride(0), grid.live.stride(0), *full.stride()[:2], *part.stride()[:2]),
        *(*index.stride()[:3], *columns.stride()[:2], *covered.stride()[:3]),
        *(H, grid.nq, columns.shape[-1] if lists.columns is not None else 0),
        grid.window or NEVER.value,
        BLOCK=grid.block,
    )
    return out


@triton.jit(
    do_not_specialize=(
        "first_b live_b fc_b fc_h pc_b pc_h pi_b pi_h pi_i col_b col_h cov_b cov_h cov_i "
        "H nq n_columns window"
    ).split()
)
def _pairs(
    OUT, Q_LEN, K_LEN, FIRST, LIVE, BANDS, FULL_COUNT, PART_COUNT, PART_INDEX, COLUMNS, COVERED,
    first_b: tl.int64, live_b: tl.int64, fc_b: tl.int64, fc_h: tl.int64,
    pc_b: tl.int64, pc_h: tl.int64, pi_b: tl.int64, pi_h: tl.int64, pi_i: tl.int64,
    col_b: tl.int64, col_h: tl.int64, cov_b: tl.int64, cov_h: tl.int64, cov_i: tl.int64,
    H, nq, n_columns, window, BLOCK: tl.constexpr,
):  # fmt: skip
    i, head = tl.program_id(0) % nq, tl.program_id(0) // nq
    b, h = head // H, head % H
    q_len = tl.load(Q_LEN + b).to(tl.int32)
    offset = tl.load(K_LEN + b).to(tl.int32) - q_len
    rows = i * BLOCK + tl.arange(0, BLOCK)
    at = tl.where(rows < q_len, offset + rows, -1)
    sink, recent = tl.load(BANDS + h * 3), tl.load(BANDS + h * 3 + 1)
    start = at - (recent + (at * tl.load(BANDS + h * 3 + 2) >> 16)) + 1  # as Band.start
    oldest = at - window + 1
    start = tl.maximum(tl.maximum(start, sink), oldest).to(tl.int32)

    alive = tl.sum((rows < q_len).to(tl.int64), 0)
    total = tl.load(FULL_COUNT + b * fc_b + h * fc_h + i).to(tl.int64) * alive * BLOCK
    index = PART_INDEX + b * pi_b + h * pi_h + i * pi_i
    for j in range(0, tl.load(PART_COUNT + b * pc_b + h * pc_h + i)):
        block = tl.load(index + j)
        low = tl.load(FIRST + b * first_b + block).to(tl.int32)
        high = low + tl.load(LIVE + b * live_b + block).to(tl.int32) - 1
        near = tl.minimum(high, at) - tl.maximum(low, start) + 1
        far = tl.minimum(high, tl.minimum(at, sink - 1)) - tl.maximum(low, oldest) + 1
        total += tl.sum(tl.maximum(near, 0) + tl.maximum(far, 0), 0)

    first, last = offset + i * BLOCK, tl.max(at, 0)
    for c in range(0, n_columns, 1024):
        slot = c + tl.arange(0, 1024)
        column = tl.load(COLUMNS + b * col_b + h * col_h + slot, mask=slot < n_columns, other=NEVER)
        hidden = tl.load(
            COVERED + b * cov_b + h * cov_h + i * cov_i + slot, mask=slot < n_columns, other=1
        )
        newest = tl.minimum(last.to(tl.int64), column.to(tl.int64) + window - 1)
        readers = tl.maximum(newest - tl.maximum(first, column) + 1, 0)
        total += tl.sum(tl.where(hidden == 0, readers, 0), 0)
    tl.atomic_add(OUT + head, total)
